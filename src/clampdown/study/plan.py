"""`clampdown plan make` and `show`: a plan from features and strengths in any unit, and what a plan does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clampdown.activations.fit import warn_unless_fitting
from clampdown.config import CODE_VERSION, ORGANISM
from clampdown.discovery.subspace import find_subspace
from clampdown.errors import CheckpointError, PlanError, PromptSetError
from clampdown.evaluation.suites import read_suites
from clampdown.models.loading import LanguageModel, load_model
from clampdown.saes.catalog import PAGES, find_release
from clampdown.saes.checkpoints import open_sae
from clampdown.saes.sae import FeatureSource, check_features, check_fits
from clampdown.steering.operators import OPERATORS
from clampdown.steering.plan import Edit, Gate, Plan, SaeRef, read_plan, write_plan
from clampdown.steering.program import check_plan
from clampdown.steering.units import Strength, Unit, calibrate, in_words, measured, resolve
from clampdown.store import prompts_hash
from clampdown.study.along import Along, plan_along
from clampdown.study.correcting import RANK, correct
from clampdown.types import Prompt, Site, Split

_PAGES_SHOWN = 10
CALIBRATION_SUITES, CALIBRATION_PROMPTS = ("harmful", "jailbroken_seen", "benign"), 120
DIRECTION_PROMPTS = 240
NO_SAE = "none"
CORRECT = "correct"
ERROR_TERMS = ("keep", "drop", CORRECT)


@dataclass(frozen=True, slots=True)
class Request:
    """One edit of a plan: features, a strength for all or one for each, what is done and where."""

    features: tuple[int, ...]
    strengths: tuple[Strength, ...]
    operator: str = "clamp"
    scope: str = "all"
    error_term: str = "keep"
    name: str = ""
    directions: int = 0
    """How many directions of refusal are found and edited, in place of features."""
    rank: int = RANK
    """In how many directions a corrected error term is passed on."""


def make_plan(model: str, sae: str, request: Request, prompts: Path | None, out: Path, site: str | None = None) -> Plan:
    """Resolve the strengths on calibration prompts and write the plan. Raises `PlanError`, `StrengthError` and kin."""
    if request.directions:
        return _make_along(model, sae, request, prompts, out, site)
    _check(request)
    lm = load_model(model)
    opened = open_sae(sae, device=str(lm.device), site=Site.parse(site) if site else None)
    check_fits(opened, lm.d_model, lm.n_layers)
    warn_unless_fitting(lm, opened)
    check_features(request.features, opened.cfg.d_sae)  # before prompts are read
    plan = plan_of(lm, opened, request, calibration_prompts(model, prompts))
    if request.error_term == CORRECT:
        plan = correct(lm, opened.whole(), plan, sides(model, prompts)[1], request.rank)
    check_plan(plan, lm, {opened.cfg.site.name: opened})
    write_plan(out, plan)
    return plan


def _make_along(model: str, sae: str, request: Request, prompts: Path | None, out: Path, site: str | None) -> Plan:
    """Along directions of refusal, found on the calibration prompts. Without an SAE (`none`) the site is named."""
    asked = _along(request)
    if sae == NO_SAE and site is None:
        raise PlanError("without an SAE nothing says where to edit", hint="--site blocks.3.hook_resid_post")
    lm = load_model(model)
    where = Site.parse(site) if site else None
    opened = None if sae == NO_SAE else open_sae(sae, device=str(lm.device), site=where)
    if opened is not None:
        check_fits(opened, lm.d_model, lm.n_layers)
        where = opened.cfg.site
    assert where is not None, "an SAE has a site, and without one it was named"
    lm.layout.hook_point(where)
    harmful, harmless = sides(model, prompts)
    found = find_subspace(lm, harmful, harmless, where, request.directions)
    shown = (*harmful, *harmless)
    plan = plan_along(lm, opened, found, asked, shown, request.name)
    made_from = {"strengths": str(asked.strength), "calibration": prompts_hash(shown), "code": CODE_VERSION}
    plan = plan.changed(provenance=made_from)
    check_plan(plan, lm, {} if opened is None else {where.name: opened})
    write_plan(out, plan)
    return plan


def _along(request: Request) -> Along:
    if request.features:
        raise PlanError("a plan is made of features or of directions, not of both", hint="--feature or --directions")
    if len(request.strengths) != 1 or request.error_term != "keep":
        raise PlanError("directions have one strength for all, and do not pass through an SAE", hint="--strength 1gap")
    asked = Along(request.operator, request.strengths[0], request.scope)
    asked.check()
    return asked


def sides(model: str, path: Path | None) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Harmful and harmless prompts of a file (its discovery split, if it has one), for the embedded model by default
    its own. Raises `PromptSetError`."""
    if path is not None:
        labelled = [(suite.harmful, prompt) for suite in read_suites(path) for prompt in suite.prompts]
        labelled = [each for each in labelled if each[1].split is Split.DISCOVERY] or labelled
        return tuple(p for side, p in labelled if side), tuple(p for side, p in labelled if not side)
    if model != ORGANISM:
        raise PromptSetError("directions are found on prompts", hint="--prompts FILE, with a column `harmful`")
    from clampdown.organism.suites import one_suite

    harmful, harmless = (one_suite(name, Split.DISCOVERY, DIRECTION_PROMPTS).prompts for name in ("harmful", "benign"))
    return harmful, harmless


def _check(request: Request) -> None:
    operator = OPERATORS.get(request.operator)
    if operator is None or operator.dense:
        known = ", ".join(name for name, row in OPERATORS.items() if not row.dense)
        raise PlanError(f"'{request.operator}' is not an operator on features", hint=f"one of: {known}")
    if not request.features:
        raise PlanError("a plan needs a feature, or directions", hint="--feature N or --directions K")
    if request.error_term not in ERROR_TERMS:
        raise PlanError(f"error term '{request.error_term}' is not known", hint=f"one of: {', '.join(ERROR_TERMS)}")
    if request.rank < 1:
        raise PlanError("a corrected error term is passed on in one direction or more", hint="--rank 16")


def plan_of(lm: LanguageModel, sae: FeatureSource, request: Request, prompts: Sequence[Prompt]) -> Plan:
    """The plan with raw strengths. Without prompts only raw strengths can be resolved, and no other unit is shown."""
    site = sae.cfg.site
    raw_only = all(strength.unit is Unit.RAW for strength in request.strengths)
    calibration = None
    if prompts or not raw_only:
        calibration = calibrate(lm, site, sae.select(request.features), prompts)
    values = tuple(s.value for s in request.strengths) * (1 if len(request.strengths) > 1 else len(request.features))
    edit = Edit(
        site=site.name,
        operator=request.operator,
        features=request.features,
        strengths=resolve(request.strengths, request.operator, calibration) if calibration else values,
        scope=request.scope,
        error_term="drop" if request.error_term == "drop" else "keep",
    )
    asked = " ".join(map(str, request.strengths))
    made_from = {"strengths": asked, "calibration": prompts_hash(prompts) if prompts else "none", "code": CODE_VERSION}
    name = request.name or f"{request.operator} {'+'.join(map(str, request.features))}"
    edits = (measured(edit, calibration) if calibration else edit,)
    return Plan.of(lm, [sae], edits, name, provenance=made_from)


def calibration_prompts(model: str, path: Path | None) -> tuple[Prompt, ...]:
    """Prompts of a file; for the embedded model its own; else none."""
    if path is not None:
        return tuple(prompt for suite in read_suites(path, harmful=False) for prompt in suite.prompts)
    if model != ORGANISM:
        return ()
    from clampdown.organism.suites import one_suite

    chosen = [one_suite(name, Split.DISCOVERY, CALIBRATION_PROMPTS) for name in CALIBRATION_SUITES]
    return tuple(prompt for suite in chosen for prompt in suite.prompts)


def check_against(plan: Plan, model: str | None, sae: str | None) -> None:
    """Raises `PlanMismatchError` and kin unless the plan was made for this model and SAE (default: those it names)."""
    lm = load_model(model or plan.model.name)
    opened = [open_sae(sae or ref.name, site=Site.parse(ref.site)) for ref in plan.saes]
    check_plan(plan, lm, {source.cfg.site.name: source for source in opened})


def show(path: Path) -> list[tuple[str, str]]:
    """A plan as (heading, text) lines, strengths in every unit that the plan knows. Raises `PlanError`."""
    return list(lines(read_plan(path)))


def lines(plan: Plan) -> Iterator[tuple[str, str]]:
    """What a plan is, for people."""
    yield "plan", f"{plan.name} (digest {plan.digest})"
    yield "model", f"{plan.model.name} at {plan.model.revision}"
    for ref in plan.saes:
        yield "SAE", f"{ref.name} at {ref.revision}, reads {ref.site}"
        yield from (("page", page) for page in pages(plan, ref))
    for edit in plan.edits:
        yield "edit", in_words(edit)
    yield "gate", "none: every conversation is steered" if plan.gate is None else _gate(plan.gate)
    if plan.otherwise:
        yield from (("otherwise", in_words(edit)) for edit in plan.otherwise.edits)
        yield "its gate", _gate(plan.otherwise.gate)
    yield from plan.provenance.items()


def pages(plan: Plan, ref: SaeRef) -> list[str]:
    """The addresses of the pages about a plan's features, for SAEs that the catalogue names."""
    try:
        address = find_release(ref.name)
    except CheckpointError:
        return []
    if address is None or address.neuronpedia_id is None:
        return []
    features = dict.fromkeys(one for edit in plan.all_edits if edit.site == ref.site for one in edit.features)
    return [f"{PAGES}/{address.neuronpedia_id}/{feature}" for feature in list(features)[:_PAGES_SHOWN]]


def _where(reader: Gate) -> str:
    read = f"{len(set(reader.features))} features" if reader.features else f"{len(set(reader.vectors))} vectors"
    return f"on {read} at {reader.site}"


def _gate(gate: Gate) -> str:
    where = f"scorer {gate.scorer}" if gate.scorer else ", ".join(map(_where, gate.readers))
    what = f"{gate.combine} of" if gate.members else gate.kind
    text = f"{what} {where}, fires above {gate.threshold:.4g}"
    if gate.full is not None:
        text += f", strength from {gate.least:.0%} there to all of it at {gate.full:.4g}"
    if gate.guarantee is None:
        return text
    promise = gate.guarantee
    return (
        f"{text}; at {promise.confidence:.0%} confidence at most {promise.bound:.2%} of benign prompts fire it "
        f"({promise.triggered} of {promise.n} did)"
    )
