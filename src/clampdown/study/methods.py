"""The methods that `compare-methods` compares: each proposes arms at several strengths, validation prompts choose one.

    clamp (2411.11296)         the feature of one refusal that raises refusal most, clamped at every token
    score + refine (2511.00029)  contrast score, added in units of the feature's own largest activation, both signs,
                               refined over rounds into a set of at most two
    difference of means        the dense direction added at every token (2406.11717)
    CAST-style                 the same behind a gate on a dense condition vector (2409.05907)
    tuned                      sets of features clamped behind calibrated gates of one or two sides (`tuned.py`)

The first four are chosen as published: by refusals that they gain, with no regard to what safe prompts and capability
pay. The tuned plan must also refuse no more safe validation prompts than the unsteered model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from clampdown.discovery import causal
from clampdown.discovery.directions import difference_of_means
from clampdown.discovery.finders import Material, run_finder
from clampdown.discovery.refine import Clamps, Limits, Measure, Outcome, refine
from clampdown.discovery.screening import BenignKl, PrefillRefusal
from clampdown.errors import NotEnoughDataError
from clampdown.evaluation.condition import Condition, condition
from clampdown.steering.arms import Arm
from clampdown.steering.plan import Edit, ModelRef, Plan, SaeRef
from clampdown.study import demo, tuned
from clampdown.study.experiment import Subject
from clampdown.study.progress import Stages
from clampdown.study.strengths import Candidate, Rule, choose, sweep_arms
from clampdown.types import ArmKind, Point, Prompt, Site, Split

FIRST, SECOND, DENSE, CAST, TUNED = (
    "clamp (2411.11296)",
    "score + refine (2511.00029)",
    "difference of means",
    "CAST-style",
    tuned.NAME,
)
REFINED_FEATURES = 2
SCORED = 4


@dataclass(frozen=True, slots=True)
class Picked:
    """A method's own best arm, and what is to be said about it."""

    arm: Arm
    note: str = ""

    def as_column(self, method: Method) -> Picked:
        """The same under the method's name."""
        return replace(self, arm=replace(self.arm, name=method.name, kind=method.kind, group=method.name))


@dataclass(frozen=True, slots=True)
class Method:
    """A method's arms at several strengths, and how validation prompts choose one (None: none gained a refusal)."""

    name: str
    kind: ArmKind
    arms: tuple[Arm, ...]
    pick: Callable[[Sequence[Candidate], Candidate], Arm | None]

    def chosen(self, found: Sequence[Candidate], unsteered: Candidate) -> Picked:
        """The arm that is picked. When none gains a refusal, the arm that is broken least, the strongest of those:
        a method that fails here belongs in the table. Raises `NotEnoughDataError` without arms."""
        picked = self.pick(found, unsteered)
        if picked is not None:
            return Picked(picked)
        if not found:
            raise NotEnoughDataError(f"{self.name}: no arm to choose from")
        least = min(found, key=lambda c: (c.axes.degenerate or 0.0, -abs(c.arm.strength or 0.0)))
        return Picked(least.arm, "no strength gained refusals on validation prompts; the strongest of the least broken")


def by_refusals(found: Sequence[Candidate], unsteered: Candidate) -> Arm | None:
    """As published: by the refusals that are gained, whatever safe prompts and capability pay."""
    picked = choose(found, Rule(), baseline=unsteered.axes.refusal or 0.0).chosen
    return picked.arm if picked else None


@dataclass(frozen=True, slots=True)
class Bench:
    """What methods are built from."""

    subject: Subject
    scale: demo.Scale
    given: Material
    dense: tuple[float, ...]
    condition: Condition

    @property
    def model(self) -> ModelRef:
        return ModelRef(name=self.subject.lm.name, revision=self.subject.lm.revision)

    @property
    def site(self) -> str:
        return self.subject.sae.cfg.site.name

    @property
    def ref(self) -> SaeRef:
        return SaeRef(site=self.site, name=self.subject.sae.name, revision=self.subject.sae.revision)

    @property
    def tempting(self) -> list[Prompt]:
        return self.subject.prompts(Split.VALIDATION, self.scale.causal_prompts, *demo.HARMFUL)

    @property
    def benign(self) -> list[Prompt]:
        return self.subject.prompts(Split.VALIDATION, 2 * self.scale.causal_prompts, "benign")


def make_bench(subject: Subject, scale: demo.Scale) -> Bench:
    """Activations of discovery prompts, the dense direction and CAST's condition."""
    given = demo.finder_material(subject, scale)
    site = subject.sae.cfg.site
    (direction,) = difference_of_means(subject.lm, given.harmful, given.harmless, [site])
    before = Site(site.layer, Point.RESID_PRE)
    (vector,) = difference_of_means(subject.lm, given.harmful, given.harmless, [before], "mean")
    gate = condition(subject.lm, before, vector.vector.tolist(), given.harmful, given.harmless)
    return Bench(subject, scale, given, tuple(direction.vector.tolist()), gate)


def all_methods(bench: Bench, stages: Stages) -> tuple[Method, ...]:
    """Every method with its candidate arms."""
    with stages.stage("Clamping the features of one refusal"):
        first = first_paper(bench)
    with stages.stage("Scoring and refining"):
        second = second_paper(bench)
    dense = added_direction(bench)
    with stages.stage("Calibrating gates"):
        tuned = tuned_plans(bench)
    return (first, second, dense, cast(bench, dense), tuned)


def first_paper(bench: Bench) -> Method:
    """Candidates from one refusal; the one whose clamp raises refusal most on validation prompts, at every token."""
    lm, sae = bench.subject.lm, bench.subject.sae
    found = run_finder("single-prompt", bench.given)
    measure = PrefillRefusal(lm, sae, bench.tempting, bench.given.tokens)
    best = causal.rank_by_effect(found, causal.clamp_at_multiple(lm, sae, 1.0), measure).features[0]
    unit = best.scores["max_activation"]
    plan = _named(causal.clamp_plan(lm, sae, best.feature, unit), FIRST)
    return Method(FIRST, ArmKind.FEATURE, sweep_arms(plan, [unit], (1.0, 1.5, 2.0, 2.5, 3.0)), by_refusals)


def second_paper(bench: Bench) -> Method:
    """Contrast score, then strengths of both signs by refusal log-odds, then refinement; the size is chosen after."""
    found = run_finder("contrast", bench.given)
    units = {score.feature: score.scores["max_activation"] for score in found.features}
    pool = _both_signs(found.ranking[:SCORED], units)

    def rescore(kept: Clamps) -> list[Clamps]:
        return _both_signs([*kept.features, *found.ranking[: 2 * SCORED]], units)

    limits = Limits(bench.given.effort.kl, 0.1, REFINED_FEATURES, max_rounds=2, multiples=(0.5, 1.0, 2.0))
    refined = refine(pool, _adding(bench), rescore, limits).best.clamps
    arms = tuple(_times(bench, refined, factor) for factor in (0.5, 0.75, 1.0, 1.25, 1.5))
    return Method(SECOND, ArmKind.FEATURE, arms, by_refusals)


def _both_signs(features: Sequence[int], units: dict[int, float]) -> list[Clamps]:
    known = [f for f in dict.fromkeys(features) if units.get(f, 0.0) > 0]
    return [Clamps((f,), (sign * units[f],)) for f in known for sign in (1.0, -1.0)]


def _adding(bench: Bench) -> Measure:
    """Gain in refusal log-odds and cost in benign KL of adding features, on validation prompts."""
    lm, sae = bench.subject.lm, bench.subject.sae
    refusal, kl = PrefillRefusal(lm, sae, bench.tempting, bench.given.tokens), BenignKl(lm, sae, bench.benign)

    def measure(sets: Sequence[Clamps]) -> list[Outcome]:
        plans = [additive(bench, clamps, "add") for clamps in sets]
        return [Outcome(gain, cost) for gain, cost in zip(refusal(plans), kl(plans), strict=True)]

    return measure


def additive(bench: Bench, clamps: Clamps, name: str) -> Plan:
    """Features added at constant amounts, at every token."""
    edit = Edit(site=bench.site, operator="add", features=clamps.features, strengths=clamps.strengths, scope="all")
    return Plan(name=name, model=bench.model, saes=(bench.ref,), edits=(edit,))


def _times(bench: Bench, clamps: Clamps, factor: float) -> Arm:
    scaled = clamps.scaled(factor)
    name = f"{SECOND} x{factor:g}"
    return Arm(name, ArmKind.FEATURE, additive(bench, scaled, name), scaled.strengths[0], group=SECOND)


def added_direction(bench: Bench) -> Method:
    """The difference of means added at every token."""
    edit = Edit(site=bench.site, operator="add_direction", strengths=(1.0,), vector="direction", scope="all")
    plan = Plan(name=DENSE, model=bench.model, edits=(edit,), vectors={"direction": bench.dense})
    return Method(DENSE, ArmKind.DIRECTION, sweep_arms(plan, [1.0], (0.1, 0.2, 0.3, 0.4, 0.5)), by_refusals)


def ablated_direction(bench: Bench) -> Arm:
    """The difference of means projected out at every token: has no strength to choose."""
    edit = Edit(site=bench.site, operator="ablate_direction", strengths=(1.0,), vector="direction", scope="all")
    plan = Plan(name="ablated direction", model=bench.model, edits=(edit,), vectors={"direction": bench.dense})
    return Arm("ablated direction", ArmKind.DIRECTION, plan, 1.0, group="dense")


def cast(bench: Bench, dense: Method) -> Method:
    """The added direction behind the condition's gate."""
    arms = tuple(gated_arm(arm, arm.name.replace(DENSE, CAST), bench.condition) for arm in dense.arms)
    return Method(CAST, ArmKind.DIRECTION, arms, by_refusals)


def gated_arm(arm: Arm, name: str, found: Condition) -> Arm:
    """The arm behind the condition's gate."""
    assert arm.plan is not None, "only steered arms are gated"
    plan = Plan.model_validate({**dict(arm.plan), "name": name, "gate": found.gate, "saes": (found.ref,)})
    return replace(arm, name=name, plan=plan, group=CAST)


def tuned_plans(bench: Bench) -> Method:
    """A set of features around the clamp finder's first, behind gates of one and of two sides (`tuned.py`)."""
    best = run_finder("clamp", bench.given).features[0]
    arms = tuned.search(bench.subject, bench.scale, best.feature, best.scores["max_activation"], bench.given.tokens)
    return Method(TUNED, ArmKind.TUNED, arms, tuned.choose)


def _named(plan: Plan, name: str) -> Plan:
    return plan.model_copy(update={"name": name})
