"""`clampdown gate calibrate`: put a plan behind a gate with a stated bound on how often benign prompts trigger it.

1. Fit on the discovery split: last turns of harmful prompts against those of harmless ones (for a second branch:
   over-refused ones against the others). Harmful prompts of held-out families are not in that split.
2. Set the threshold on conversations of the calibration split's benign prompts, which the fit never saw
   (`turn_promise.py`). A gate that turns refusals down and is asked first has its own set on the harmful ones: a
   jailbreak that it took for a borderline prompt would be helped.
3. Report how often each branch acts on the validation split, held-out families among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from clampdown.activations.collect import collect
from clampdown.activations.sinks import sinks_at
from clampdown.activations.stream import Reading, plan_pass
from clampdown.config import ORGANISM
from clampdown.errors import NotEnoughDataError, PlanError, PromptSetError
from clampdown.evaluation.intervals import wilson
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.gate_fitting import (
    FittedGate,
    Pooled,
    fit_ensemble,
    fit_gate,
    fit_probe_of,
    gate_reading,
    member_of,
)
from clampdown.steering.plan import Branch, Plan, read_plan, write_plan
from clampdown.steering.turn_promise import TURNS, Turnwise, last_turns, longest_turn
from clampdown.steering.turn_reading import read_prompts
from clampdown.store import prompts_hash
from clampdown.study.family_out import FamilyOut, Learnt, leave_families_out, promising, touched
from clampdown.study.loading import load_for
from clampdown.study.progress import Stages, Tick
from clampdown.study.prompts import StudyPrompts, embedded_prompts
from clampdown.study.wrapping import Copy, copies, earlier_turns, unreadable
from clampdown.types import ATTACKS, Interval, Prompt, PromptRole, Site, Split, Suite

UP, DOWN = "up", "down"
ENSEMBLE = "ensemble"


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for.

    `otherwise` is a plan whose edits become the second branch, for prompts like the suites `borderline`; `n` is
    how many benign calibration prompts to use at most, `limit` how many of each embedded suite to fit on and show.
    `first` is the side that is asked first; 'down' is that of `otherwise`, whose gate then spares all but `down_budget`
    of harmful prompts. `features` and `inverse_penalty` are those of probes. `turns` is how long a benign conversation
    the promise is about at most; `in_doubt` says what is done with longer ones ('read' or 'steer'). `wrapped` is how
    many copies of each discovery prompt, harmful or not, are learnt from inside random wrappers, and `unreadable` how
    many prompts in writings that a model does not read, which are to be steered whatever they ask (`wrapping.py`).
    `family_out` asks for an estimate of how many prompts in wrappers that nobody has seen would be found. An ensemble
    has `members` (KIND or KIND@SITE) whose scores `combine` makes one of. With `least` below 1 the strength of the
    edits that raise refusals grows with the gate's score, from that share of it at the threshold.
    """

    plan: Path
    kind: str
    budget: float = 0.02
    confidence: float = 0.95
    otherwise: Path | None = None
    borderline: tuple[str, ...] = ("borderline", "about_harm")
    n: int = 3200
    limit: int = 240
    site: str | None = None
    seed: int = 0
    first: str = UP
    down_budget: float = 0.0025
    features: int | None = None
    inverse_penalty: float | None = None
    turns: int = TURNS
    in_doubt: str = "read"
    wrapped: int = 0
    unreadable: int = 0
    family_out: bool = False
    data: StudyPrompts | None = None
    members: tuple[str, ...] = ()
    combine: str = "mean"
    least: float = 1.0


@dataclass(frozen=True, slots=True)
class Material:
    """The prompts of all three splits as one list, what is known of each, what was pooled of the discovery prompts'
    last turns (`readings`), and what reads the others. `copies` are discovery prompts in random wrappers and earlier
    turns of harmless ones, which are pooled behind them: their `of` counts the discovery prompts."""

    prompts: tuple[Prompt, ...]
    harmful: Bool[np.ndarray, " prompts"]
    pooled: Pooled
    readings: tuple[Reading, ...]
    turnwise: Turnwise
    copies: tuple[Copy, ...] = ()

    def of_split(self, split: Split) -> Bool[np.ndarray, " prompts"]:
        return np.array([prompt.split is split for prompt in self.prompts])

    def of_suites(self, names: Sequence[str]) -> Bool[np.ndarray, " prompts"]:
        return np.array([prompt.suite in names for prompt in self.prompts])

    def learnt(self, positive: Bool[np.ndarray, " prompts"]) -> Bool[np.ndarray, " learnt"]:
        """What holds for prompts, for what a fit learns from: discovery prompts and their copies. What cannot be read
        is positive for a gate that finds harm."""
        own, upwards = positive[self.of_split(Split.DISCOVERY)], bool(positive[self.harmful].any())
        more = [upwards if copy.unreadable else own[copy.of] for copy in self.copies]
        return np.concatenate([own, np.array(more, dtype=bool)])

    def at(self, rows: Bool[np.ndarray, " prompts"]) -> list[Prompt]:
        return [self.prompts[row] for row in np.flatnonzero(rows)]

    def fires(self, fitted: FittedGate, prompts: Sequence[Prompt]) -> Bool[np.ndarray, " some"]:
        read = read_prompts(self.turnwise.lm, fitted.gate, fitted.vectors, self.turnwise.sae, prompts)
        return np.array([reading.opens for reading in read])


@dataclass(frozen=True, slots=True)
class TriggerRate:
    """How often one suite's validation prompts go each way; `otherwise` is None for a plan with one branch. `edits`
    are those of the branch that is asked first."""

    suite: str
    harmful: bool
    edits: Interval
    otherwise: Interval | None


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The plan behind its gate, and how often it acts."""

    plan: Plan
    rates: tuple[TriggerRate, ...]
    first: str = UP
    sinks: str = ""
    family_out: FamilyOut | None = None


def calibrate(request: Request, out: Path, stages: Stages) -> Calibrated:
    """Fit, calibrate, measure, and write the plan to `out`.

    Raises `NotEnoughDataError`, naming the n that would do, when the prompts cannot prove the budget; `PlanError` and
    `PlanMismatchError` for a plan that cannot be gated as asked.
    """
    plan, other = read_plan(request.plan), request.otherwise and read_plan(request.otherwise)
    _check(request, plan, other)
    with stages.stage("Loading"):
        lm, saes = load_for([plan])
    material = material_of(request, lm, saes, plan, stages)
    with stages.stage("Fitting"):
        first, second = _fit(request, material, two_sided=other is not None)
    if other is None or second is None:
        gated = _behind(plan, first, material)
    else:
        asked = (other, plan) if request.first == DOWN else (plan, other)
        gated = _two_sided(_behind(asked[0], first, material), asked[1], second)
    write_plan(out, gated)
    where = material.readings[0].site
    sinks = sinks_at(lm, [where])[where]
    rates = trigger_rates(material, first, second)
    left_out = None
    if request.family_out and request.first == UP:
        with stages.stage("Leaving families out") as tick:
            left_out = without_families(request, material, first, tick)
    return Calibrated(gated, rates, request.first, sinks.in_words if sinks else "", left_out)


def without_families(request: Request, material: Material, fitted: FittedGate, tick: Tick) -> FamilyOut:
    """The gate fitted again without each wrapper family, its threshold set as its own was; and the truth beside it."""
    prompts = material.at(material.of_split(Split.DISCOVERY))
    wrapped = _wrapped(request)
    own = [touched(prompt, wrapped) for prompt in prompts]
    families = (*own, *(own[copy.of] | copy.families for copy in material.copies))
    asked = [bool(each) and p.suite in wrapped for each, p in zip(own, prompts, strict=True)]
    tested = np.array([*asked, *([False] * len(material.copies))])
    learnt = Learnt(material.pooled, material.learnt(material.harmful), families, tested)
    shown = last_turns(benign_of(request, material))
    benign = Pooled.of(collect(plan_pass(material.turnwise.lm, material.readings, shown)))

    def calibrated(again: FittedGate) -> FittedGate:
        return promising(again, benign, fitted.gate, request.budget, request.confidence)

    found = leave_families_out(learnt, partial(fitted_rows, request), calibrated, tick)
    return replace(found, truth=_truth(request, material, fitted))


def _wrapped(request: Request) -> tuple[str, ...]:
    data = request.data or embedded_prompts(request.seed)
    return data.roles_of(PromptRole.JAILBROKEN)


def _truth(request: Request, material: Material, fitted: FittedGate) -> Interval | None:
    """How often the gate itself fires on validation prompts of families that no decision saw."""
    data = request.data or embedded_prompts(request.seed)
    prompts = material.at(material.of_split(Split.VALIDATION) & material.of_suites(sorted(data.held_out)))
    return wilson(int(material.fires(fitted, prompts).sum()), len(prompts)) if prompts else None


def gate_for(request: Request, lm: LanguageModel, saes: Sequence[Sae], plan: Plan, stages: Stages) -> FittedGate:
    """The plan's one-sided gate on loaded things, with its promise. Raises as `calibrate`."""
    _check(request, plan, None)
    material = material_of(request, lm, saes, plan, stages)
    with stages.stage("Fitting"):
        return fit_and_calibrate(request, material, material.harmful)


def material_of(request: Request, lm: LanguageModel, saes: Sequence[Sae], plan: Plan, stages: Stages) -> Material:
    """What the plan's gates are made from."""
    site = _site(request, plan)
    sae = next((each for each in saes if each.cfg.site == site), None)
    with stages.stage("Reading prompts") as tick:
        return read(request, lm, site, sae, _suites(request, plan), tick)


def _check(request: Request, plan: Plan, other: Plan | None) -> None:
    if not 0 < request.budget < 1 or not 0 < request.confidence < 1:
        raise PlanError("budget and confidence are shares between 0 and 1", hint="--budget 0.02 --confidence 0.95")
    if not 0 <= request.least <= 1:
        raise PlanError("the least strength is a share of the whole, from 0 to 1", hint="--least 0.3")
    _check_sides(request)
    _check_kind(request)
    if other is not None and other.model.revision != plan.model.revision:
        raise PlanError(f"'{other.name}' was made for another model than '{plan.name}'")


def _check_sides(request: Request) -> None:
    if request.first not in (UP, DOWN) or not 0 < request.down_budget < 1:
        raise PlanError("a side is 'up' or 'down', its budget a share", hint="--first down --down-budget 0.0025")
    if request.first == DOWN and request.otherwise is None:
        raise PlanError("there is no side to steer down", hint="--otherwise FILE, a plan for over-refused prompts")


def _check_kind(request: Request) -> None:
    for member in request.members:
        member_of(member)
    if (request.kind == ENSEMBLE) != bool(request.members) or len(request.members) == 1:
        raise PlanError(
            "an ensemble has two members or more, a gate of another kind none",
            hint="--kind ensemble --members probe,dense",
        )
    sizes = (request.features, request.inverse_penalty)
    if request.kind not in ("probe", ENSEMBLE) and any(size is not None for size in sizes):
        raise PlanError(f"a gate of kind '{request.kind}' has no size or penalty of its own", hint="--kind probe")
    if any(size is not None and not size > 0 for size in sizes):
        raise PlanError("a probe's features and penalty are above 0", hint="--features 40 --inverse-penalty 10")


def _site(request: Request, plan: Plan) -> Site:
    """Where to read: as asked, else at the plan's SAE, else where the lowest edit acts."""
    lowest = min(Site.parse(edit.site) for edit in plan.edits)
    with_sae = [Site.parse(ref.site) for ref in plan.saes]
    return Site.parse(request.site) if request.site else min([*with_sae, lowest])


def _suites(request: Request, plan: Plan) -> tuple[Suite, ...]:
    if request.data is None and plan.model.name != ORGANISM:
        raise PromptSetError(
            f"there are no prompts of our own for '{plan.model.name}'",
            hint="--harmful FILE and --benign FILE, or --prompts FILE with columns suite and harmful",
        )
    data = request.data or embedded_prompts(request.seed)
    calibrating = [PromptRole.BENIGN, *(ATTACKS if request.first == DOWN else ())]
    return (
        *data.suites(Split.DISCOVERY, request.limit),
        *data.suites(Split.CALIBRATION, request.n, *calibrating),
        *data.suites(Split.VALIDATION, request.limit),
    )


def read(
    request: Request, lm: LanguageModel, site: Site, sae: Sae | None, suites: Sequence[Suite], tick: Tick
) -> Material:
    """One pass over what is fitted on. Raises `PromptSetError` when a split is missing."""
    prompts = tuple(prompt for suite in suites for prompt in suite.prompts)
    for split in (Split.DISCOVERY, Split.CALIBRATION, Split.VALIDATION):
        if not any(prompt.split is split for prompt in prompts):
            raise PromptSetError(f"no prompt of the split '{split}'", hint="rows need a `split`: see docs/gates.md")
    harmful = np.array([suite.harmful for suite in suites for _ in suite.prompts])
    found = np.array([prompt.split is Split.DISCOVERY for prompt in prompts])
    whole = [prompts[row] for row in np.flatnonzero(found)]
    fitted, data = last_turns(whole), request.data or embedded_prompts(request.seed)
    wrapped = copies(fitted, data.parts, request.wrapped, request.seed)
    skipped = [bool(h) or p.suite in data.over_refused for p, h in zip(whole, harmful[found], strict=True)]
    blind = unreadable(fitted, data.parts, request.unreadable, request.seed)
    more = (*wrapped, *earlier_turns(whole, skipped), *blind)
    shown = [*fitted, *(copy.prompt for copy in more)]
    elsewhere = {named for member in request.members if (named := member_of(member)[1])} - {site.name}
    readings = (gate_reading(site, sae), *(gate_reading(Site.parse(name), None) for name in sorted(elsewhere)))
    store = collect(plan_pass(lm, readings, shown), tick)
    window = longest_turn(lm, [*prompts, *(copy.prompt for copy in more if not copy.unreadable)])
    turnwise = Turnwise(lm, sae, window, request.confidence, request.turns)
    return Material(prompts, harmful, Pooled.of(store), readings, turnwise, more)


def _fit(request: Request, material: Material, *, two_sided: bool) -> tuple[FittedGate, FittedGate | None]:
    """The gate that is asked first, and that of the second branch."""
    up = fit_and_calibrate(request, material, material.harmful)
    if not two_sided:
        return up, None
    borderline = material.of_suites(request.borderline)
    if request.first == DOWN:
        return fit_and_spare(request, material, borderline), up.renamed("otherwise")
    down = material.turnwise.at_last(
        fitted_on(request, material, borderline), benign_of(request, material), request.budget, on="benign"
    )
    return up, down.renamed("otherwise")


def fitted_on(request: Request, material: Material, positive: Bool[np.ndarray, " prompts"]) -> FittedGate:
    """A gate for the positive prompts among the discovery prompts, its threshold still open."""
    wanted = material.learnt(positive)
    return fitted_rows(request, material.pooled, wanted)


def fitted_rows(request: Request, pooled: Pooled, wanted: Bool[np.ndarray, " learnt"]) -> FittedGate:
    """A gate of the kind and size asked for, its threshold still open."""
    own = {"max_features": request.features, "inverse_penalty": request.inverse_penalty}
    sizes: dict[str, Any] = {name: size for name, size in own.items() if size is not None}

    def fit(kind: str, here: Pooled, positive: Bool[np.ndarray, " learnt"]) -> FittedGate:
        if sizes and kind == "probe":
            return fit_probe_of(here, positive, seed=request.seed, **sizes)
        return fit_gate(kind, here, positive, seed=request.seed)

    if request.kind == ENSEMBLE:
        return fit_ensemble(request.members, pooled, wanted, combine=request.combine, seed=request.seed, fit=fit)
    return fit(request.kind, pooled, wanted)


def fit_and_spare(request: Request, material: Material, positive: Bool[np.ndarray, " prompts"]) -> FittedGate:
    """A gate that turns refusals down: its threshold is set on the harmful calibration prompts, which it must spare."""
    fitted = fitted_on(request, material, positive)
    harmful = material.of_split(Split.CALIBRATION) & material.harmful
    if not harmful.any():
        raise NotEnoughDataError("there are no harmful prompts in the calibration split", hint="--first up needs none")
    return material.turnwise.at_last(fitted, material.at(harmful), request.down_budget, on="harmful")


def fit_and_calibrate(request: Request, material: Material, positive: Bool[np.ndarray, " prompts"]) -> FittedGate:
    """A gate for the positive prompts: fitted on discovery prompts, its threshold set on conversations of benign
    calibration ones."""
    fitted = material.turnwise.within(
        fitted_on(request, material, positive), benign_of(request, material), request.budget
    )
    return growing(request, material, positive, fitted).changed(when_in_doubt=request.in_doubt)


def growing(
    request: Request, material: Material, positive: Bool[np.ndarray, " prompts"], fitted: FittedGate
) -> FittedGate:
    """With strength that grows with the score, if that is asked for: up to the median of the positive discovery prompts
    on which the gate fires."""
    if request.least == 1:
        return fitted
    prompts = material.at(material.of_split(Split.DISCOVERY) & positive)
    read = read_prompts(material.turnwise.lm, fitted.gate, fitted.vectors, material.turnwise.sae, prompts)
    return fitted.growing(np.array([reading.score for reading in read], dtype=float), request.least)


def benign_of(request: Request, material: Material) -> list[Prompt]:
    """The prompts that a threshold is set on. Raises `NotEnoughDataError` without any."""
    benign = material.at(material.of_split(Split.CALIBRATION) & ~material.harmful)[: request.n]
    if not benign:
        raise NotEnoughDataError("there are no harmless prompts in the calibration split")
    return benign


def _behind(plan: Plan, fitted: FittedGate, material: Material) -> Plan:
    made_from = {**plan.provenance, "gate_prompts": prompts_hash(material.prompts)}
    return Plan.model_validate(
        {
            **dict(plan),
            "name": f"{plan.name} gated",
            "gate": fitted.gate,
            "vectors": plan.vectors | dict(fitted.vectors),
            "provenance": made_from,
        }
    )


def _two_sided(plan: Plan, other: Plan, fitted: FittedGate) -> Plan:
    """With another plan's edits as what is done otherwise. Vectors of the same name must be the same."""
    for name in plan.vectors.keys() & other.vectors.keys():
        if plan.vectors[name] != other.vectors[name]:
            raise PlanError(f"both plans have a vector '{name}', with different values", hint="rename one of them")
    saes = {ref.site: ref for ref in (*other.saes, *plan.saes)}
    return Plan.model_validate(
        {
            **dict(plan),
            "name": f"{plan.name}, otherwise {other.name}",
            "saes": tuple(saes.values()),
            "otherwise": Branch(gate=fitted.gate, edits=other.edits),
            "vectors": other.vectors | plan.vectors | dict(fitted.vectors),
        }
    )


def trigger_rates(material: Material, first: FittedGate, second: FittedGate | None) -> tuple[TriggerRate, ...]:
    """By suite of the validation split, how often each branch acts."""
    shown = material.of_split(Split.VALIDATION)
    rates = []
    for name in dict.fromkeys(prompt.suite for prompt in material.prompts):
        rows = shown & material.of_suites([name])
        if rows.any():
            prompts = material.at(rows)
            fires = material.fires(first, prompts)
            falls = ~fires & material.fires(second, prompts) if second else None
            down = None if falls is None else wilson(int(falls.sum()), len(prompts))
            harmful = bool(material.harmful[rows].all())
            rates.append(TriggerRate(name, harmful, wilson(int(fires.sum()), len(prompts)), down))
    return tuple(rates)
