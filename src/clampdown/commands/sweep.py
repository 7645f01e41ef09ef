"""`clampdown sweep`: one plan at many strengths beside the baseline, on the suites and split that were asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clampdown.activations.collect import collect
from clampdown.activations.stream import plan_pass, read_sae
from clampdown.commands.experiment import Sizes, Subject, measure_arms
from clampdown.commands.stages import Stages
from clampdown.errors import PlanError, PromptSetError, StrengthError
from clampdown.featuresets import check_made_for
from clampdown.steering.arms import BASELINE
from clampdown.steering.plan import Edit, ModelRef, Plan, SaeRef, read_plan, write_plan
from clampdown.store import read_feature_set
from clampdown.tradeoff.sweep import sweep_arms
from clampdown.types import Split


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for on the command line: features by index, from a file, or a whole plan."""

    multiples: tuple[float, ...]
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


def run_sweep(subject: Subject, request: Request, out: Path, stages: Stages) -> dict[str, Any]:
    """Write a run directory with one arm per strength; returns its summary."""
    split = _split(request.split)
    plan, units = _plan_and_units(subject, request, stages)
    arms = [BASELINE, *sweep_arms(plan, units, request.multiples)]
    write_plan(out / "plan.toml", plan)
    chosen = _only(subject, split, request)
    sizes = Sizes(per_suite=request.limit, kl_prompts=min(60, request.limit))
    notes = {"strength_unit": "raw activation", "split": split.value}
    return measure_arms(chosen, arms, out, sizes, stages, lambda _records: notes, split=split)


def _split(name: str) -> Split:
    allowed = (Split.VALIDATION, Split.TEST)
    if name not in {split.value for split in allowed}:
        raise PromptSetError(f"'{name}' is not a split to measure on", hint="validation, or test (read it once)")
    return Split(name)


def _only(subject: Subject, split: Split, request: Request) -> Subject:
    """The subject with just the suites asked for; the benign one always stays, for the cost in KL."""
    available = [suite.name for suite in subject.suites(split, 1)]
    unknown = [name for name in request.suites if name not in available]
    if unknown:
        raise PromptSetError(f"no suite called {', '.join(unknown)}", hint=f"one of: {', '.join(available)}")
    wanted = {*request.suites, "benign"} if request.suites else set(available)
    return subject.with_suites(wanted)


def _plan_and_units(subject: Subject, request: Request, stages: Stages) -> tuple[Plan, list[float]]:
    """The plan at multiple 1, and the raw strength that multiple 1 means for each of its strengths."""
    given = [request.features, request.features_file, request.plan_file]
    if sum(bool(item) for item in given) != 1:
        raise PlanError("say what to steer in exactly one way", hint="--feature N, --features FILE or --plan FILE")
    if request.plan_file:
        plan = read_plan(request.plan_file)
        return plan, [strength for edit in plan.edits for strength in edit.strengths]
    features = request.features
    if request.features_file:
        found = read_feature_set(request.features_file, with_columns=False)
        sae = subject.sae
        check_made_for(found, sae=sae.name, revision=sae.revision, site=sae.cfg.site.name)
        features = found.ranking[:1]
    if not features:
        raise PlanError(f"{request.features_file} lists no features")
    units = _largest_activations(subject, features, stages)
    return _feature_plan(subject, features, units, request), units


def _largest_activations(subject: Subject, features: tuple[int, ...], stages: Stages) -> list[float]:
    """Each feature's largest activation on harmful and benign discovery prompts: the unit of the sweep."""
    view = subject.sae.select(features)
    prompts = subject.prompts(Split.DISCOVERY, 120, "harmful", "jailbroken_seen", "benign")
    with stages.stage("Reading activations") as tick:
        found = collect(plan_pass(subject.lm, [read_sae(subject.sae)], prompts), tick)
    largest = np.maximum.reduce([found.moments(name).max for name in found.poolings])
    peaks = [float(largest[feature]) for feature in view.features]
    for feature, peak in zip(features, peaks, strict=True):
        if peak <= 0:
            raise StrengthError(f"feature {feature} never fired on the discovery prompts: it has no scale to multiply")
    return peaks


def _feature_plan(subject: Subject, features: tuple[int, ...], units: list[float], request: Request) -> Plan:
    sae, site = subject.sae, subject.sae.cfg.site.name
    edit = Edit(
        site=site,
        operator=request.operator,
        features=features,
        strengths=tuple(units),
        scope=request.scope,
        error_term="drop" if request.error_term == "drop" else "keep",
    )
    return Plan(
        name=f"{request.operator} {'+'.join(map(str, features))}",
        model=ModelRef(name=subject.lm.name, revision=subject.lm.revision),
        saes=(SaeRef(site=site, name=sae.name, revision=sae.revision),),
        edits=(edit,),
        provenance={"unit": "largest activation on discovery prompts"},
    )
