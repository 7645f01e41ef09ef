"""`clampdown sweep`: one plan at many strengths beside the baseline, on the suites and split that were asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from clampdown.errors import PlanError, PromptSetError, StrengthError
from clampdown.featuresets import check_made_for
from clampdown.results.run import Run
from clampdown.steering.arms import BASELINE, Arm
from clampdown.steering.plan import Edit, Plan, read_plan, write_plan
from clampdown.steering.units import Calibration, Strength, Unit, calibrate, measured, resolve
from clampdown.store import read_feature_set
from clampdown.study.measure import Asked, measure_arms
from clampdown.study.progress import Stages
from clampdown.study.sizes import Answering
from clampdown.study.strengths import sweep_arms
from clampdown.study.study import Study
from clampdown.types import ArmKind, PromptRole, Split

UNIT_PROMPTS = 120
UNIT_ROLES = (PromptRole.HARMFUL, PromptRole.JAILBROKEN, PromptRole.BENIGN)
"""What the units of strength are measured on."""


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for on the command line: features by index, from a file, or a whole plan."""

    multiples: tuple[float, ...]
    unit: Unit = Unit.MAX
    features: tuple[int, ...] = ()
    features_file: Path | None = None
    plan_file: Path | None = None
    operator: str = "clamp"
    scope: str = "all"
    error_term: str = "keep"
    suites: tuple[str, ...] = ()
    split: str = "validation"
    limit: int = 50


def parse_multiples(text: str) -> tuple[float, ...]:
    """Comma-separated numbers. Raises `StrengthError`."""
    try:
        values = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise StrengthError(f"'{text}' is not a list of numbers", hint="for example --multiples 0.5,1,1.5") from error
    if not values:
        raise StrengthError("no strengths to sweep", hint="for example --multiples 0.5,1,1.5")
    return values


def parse_unit(name: str) -> Unit:
    """Raises `StrengthError`."""
    try:
        return Unit(name)
    except ValueError as error:
        raise StrengthError(f"'{name}' is not a unit of strength", hint=f"one of: {', '.join(Unit)}") from error


def run_sweep(study: Study, request: Request, out: Path, stages: Stages) -> Run:
    """Write a run directory with one arm per strength; returns its summary."""
    split = split_to_measure(request.split)
    plan, steered = _plan_and_arms(study, request, stages)
    arms = [BASELINE, *steered]
    write_plan(out / "plan.toml", plan)
    chosen = _only(study, request)
    answering = Answering(per_suite=request.limit, kl_prompts=min(60, request.limit))
    notes = {"strength_unit": "raw activation", "split": split.value}
    asked = Asked(chosen.suites(split, request.limit), split)
    return measure_arms(chosen, arms, asked, out, answering, stages, lambda _records: notes)


def split_to_measure(name: str) -> Split:
    allowed = (Split.VALIDATION, Split.TEST)
    if name not in {split.value for split in allowed}:
        raise PromptSetError(f"'{name}' is not a split to measure on", hint="validation, or test (read it once)")
    return Split(name)


def _only(study: Study, request: Request) -> Study:
    """The study with just the suites asked for; the benign ones always stay, for the cost in KL."""
    if not request.suites:
        return study
    return study.only([*request.suites, *study.data.roles_of(PromptRole.BENIGN)])


def _plan_and_arms(study: Study, request: Request, stages: Stages) -> tuple[Plan, tuple[Arm, ...]]:
    """The plan to keep (at multiple 1, or the first strength when 1 is not a sensible one), and an arm per multiple."""
    given = [request.features, request.features_file, request.plan_file]
    if sum(bool(item) for item in given) != 1:
        raise PlanError("say what to steer in exactly one way", hint="--feature N, --features FILE or --plan FILE")
    if request.error_term not in ("keep", "drop"):
        raise PlanError(f"a sweep cannot '{request.error_term}' the error term", hint="keep or drop; --plan FILE")
    if request.plan_file:
        plan = read_plan(request.plan_file)
        units = [strength for edit in plan.edits for strength in edit.strengths]
        return plan, sweep_arms(plan, units, request.multiples)
    features = request.features
    if request.features_file:
        features = read_features(study, request.features_file)[:1]
    calibration = calibration_of(study, features, stages)
    arms = tuple(_feature_arm(study, features, m, calibration, request) for m in request.multiples)
    if request.unit in (Unit.MAX, Unit.P99):
        return _feature_plan(study, features, 1.0, calibration, request), arms
    return _feature_plan(study, features, request.multiples[0], calibration, request), arms


def calibration_of(study: Study, features: tuple[int, ...], stages: Stages) -> Calibration:
    """What the features do on harmful and benign discovery prompts: the units of the sweep."""
    prompts = study.prompts(Split.DISCOVERY, UNIT_PROMPTS, *UNIT_ROLES)
    with stages.stage("Reading activations"):
        return calibrate(study.lm, study.sae.cfg.site, study.sae.select(features), prompts)


def read_features(study: Study, path: Path) -> tuple[int, ...]:
    """The features of a file, best first. Raises `PlanError` when there are none, its kin for another SAE's file."""
    found = read_feature_set(path, with_columns=False)
    sae = study.sae
    check_made_for(found, sae=sae.name, revision=sae.revision, site=sae.cfg.site.name)
    if not found.ranking:
        raise PlanError(f"{path} lists no features")
    return tuple(found.ranking)


def _feature_arm(
    study: Study, features: tuple[int, ...], multiple: float, calibration: Calibration, request: Request
) -> Arm:
    plan = _feature_plan(study, features, multiple, calibration, request)
    by = f"x{multiple:g}" if request.unit is Unit.MAX else str(Strength(multiple, request.unit))
    named = plan.named(f"{plan.name} {by}")
    return Arm(named.name, ArmKind.FEATURE, named, named.edits[0].strengths[0], group=plan.name)


def _feature_plan(
    study: Study, features: tuple[int, ...], multiple: float, calibration: Calibration, request: Request
) -> Plan:
    sae, site = study.sae, study.sae.cfg.site.name
    edit = Edit(
        site=site,
        operator=request.operator,
        features=features,
        strengths=resolve([Strength(multiple, request.unit)], request.operator, calibration),
        scope=request.scope,
        error_term="drop" if request.error_term == "drop" else "keep",
    )
    name = f"{request.operator} {'+'.join(map(str, features))}"
    made_from = {"strengths": str(Strength(multiple, request.unit)), "calibrated on": "discovery prompts"}
    return Plan.of(study.lm, [sae], [measured(edit, calibration)], name, provenance=made_from)
