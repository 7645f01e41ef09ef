"""The two published pipelines, up to the arms that the test prompts will see.

    single-prompt-clamp (2411.11296)           contrast-refine (2511.00029)
    1. one refusal gives the candidates        1. contrast score of every feature
    2. clamp each; refusal log-odds            2. add the best at every multiple; refusal log-odds and benign KL
    3. finalists answer validation prompts     3. refine: drop, join, rescore
    4. the test: the best at every clamp       4. factors of the set answer validation prompts
                                               5. the test: the choice, its signs turned, the best-scored feature

A method that gains nothing is not an error: its strongest arm of the least broken is measured, and a note says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clampdown.discovery import causal
from clampdown.discovery.contrast import ContrastSettings, find_by_contrast
from clampdown.discovery.finders import Material
from clampdown.discovery.refine import Clamps, Limits, Outcome, refine
from clampdown.discovery.screening import BenignKl, PrefillRefusal
from clampdown.discovery.single_prompt import SinglePromptSettings, find_from_first_refusal
from clampdown.errors import NotEnoughDataError
from clampdown.evaluation.controls import with_strengths
from clampdown.steering.arms import BASELINE, Arm
from clampdown.steering.plan import Edit, ModelRef, Plan, SaeRef
from clampdown.steering.units import Strength, Unit
from clampdown.study import experiment
from clampdown.study.experiment import Sizes, Subject
from clampdown.study.progress import Stages
from clampdown.study.recipes.schema import ContrastRefine, Recipe, SinglePromptClamp
from clampdown.study.strengths import Rule, candidates
from clampdown.study.strengths import choose as pick_by_rule
from clampdown.types import ArmKind, FeatureScore, FeatureSet, Prompt, ScoreSource, Split

HARMFUL, BENIGN = "harmful", "benign"
NO_GAIN = "no strength gained refusals on validation prompts; the strongest of the least broken is shown"
_UNITS = {Unit.RAW: None, Unit.MAX: "max_activation", Unit.P99: "p99_activation"}


@dataclass(frozen=True, slots=True)
class Bench:
    """What a pipeline works with. `directory` keeps the validation run."""

    recipe: Recipe
    subject: Subject
    given: Material
    directory: Path
    stages: Stages

    @property
    def sizes(self) -> Sizes:
        measure = self.recipe.measure
        return Sizes(
            per_suite=10**6,
            kl_prompts=measure.kl_prompts,
            batch_rows=measure.batch_rows,
            max_new_tokens=measure.max_new_tokens,
            likelihood=measure.likelihood,
        )

    def validation(self, name: str) -> list[Prompt]:
        return self.subject.prompts(Split.VALIDATION, 10**6, name)


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a pipeline came to: the chosen arm, further arms for the test, what was found, and facts for the summary."""

    chosen: Arm
    arms: tuple[Arm, ...]
    found: FeatureSet
    facts: dict[str, Any]


def propose(bench: Bench) -> Proposal:
    """Run the recipe's pipeline on discovery and validation prompts."""
    method = bench.recipe.method
    if isinstance(method, SinglePromptClamp):
        return single_prompt_clamp(bench, method)
    return contrast_refine(bench, method)


# --- O'Brien et al., 2411.11296 -----------------------------------------------------------------------------------


def single_prompt_clamp(bench: Bench, method: SinglePromptClamp) -> Proposal:
    found = _ranked_candidates(bench, method)
    finalists = found.features[: method.finalists]
    plan_of = _clamper(bench, method)
    arms = [_arm(plan_of(score, method.value), f"clamp {score.feature}") for score in finalists]
    chosen, note = choose(bench, arms, Rule(share=1.0))
    best = next(score for score in finalists if score.feature == _plan(chosen).edits[0].features[0])
    curve = [_arm(plan_of(best, text), f"clamp {best.feature} at {text}", "clamp") for text in method.clamps]
    own = curve[method.clamps.index(method.value)]
    facts = {"candidates": len(found.features), "finalists": [score.feature for score in finalists], "note": note}
    return Proposal(own, tuple(curve), found, facts | {"reply": found.settings.get("reply", "")})


def _ranked_candidates(bench: Bench, method: SinglePromptClamp) -> FeatureSet:
    """The features of one refusal by the refusal log-odds that their clamps bring on validation prompts."""
    lm, sae, given = bench.subject.lm, bench.subject.sae, bench.given
    settings = SinglePromptSettings(min_tokens=method.min_tokens, top=method.candidates)
    prompts = (given.only,) if given.only else given.harmful
    with bench.stages.stage("Reading one refusal"):
        found = find_from_first_refusal(lm, sae, prompts, judge=given.judge, settings=settings)
    shown = bench.validation(HARMFUL)
    source = ScoreSource("clamp", sae.cfg.site.name, bench.subject.provenance(shown), n=len(shown))
    plan_of = _clamper(bench, method)
    with bench.stages.stage("Clamping the candidates") as tick:
        measure = PrefillRefusal(lm, sae, shown, given.tokens, on_progress=tick)
        return causal.rank_by_effect(found, lambda score: plan_of(score, method.value), measure, source=source)


def _clamper(bench: Bench, method: SinglePromptClamp) -> Callable[[FeatureScore, str], Plan]:
    """Plans that clamp a candidate at a strength, in units of what its finder saw."""
    lm, sae = bench.subject.lm, bench.subject.sae

    def plan_of(score: FeatureScore, text: str) -> Plan:
        strength = Strength.parse(text)
        unit = _UNITS[strength.unit]
        value = strength.value * (1.0 if unit is None else score.scores[unit])
        plan = causal.clamp_plan(lm, sae, score.feature, value, method.scope)
        asked = {"operator": method.operator, "error_term": method.error_term}
        edits = tuple(Edit.model_validate({**dict(edit), **asked}) for edit in plan.edits)
        return plan.model_copy(update={"edits": edits})

    return plan_of


# --- Bhargav & Zhu, 2511.00029 ------------------------------------------------------------------------------------


def contrast_refine(bench: Bench, method: ContrastRefine) -> Proposal:
    found = _scored(bench, method)
    units = {score.feature: score.scores["max_activation"] for score in found.features}
    pool = _both_signs(found.ranking[: method.features], units)
    if not pool:
        raise NotEnoughDataError(
            f"none of the {method.features} best-scored features ever fired, so none has a strength to start from",
            hint="the score as published gives dead features full marks: set method.literal = false",
        )
    table: list[dict[str, Any]] = []
    with bench.stages.stage("Adding, and refining"):
        refined = _refined(bench, method, found, units, table)
    clamps = refined.clamps if refined else pool[0].scaled(method.sizes[0])
    arms = [_added(bench, method, clamps.scaled(factor), f"refined x{factor:g}") for factor in method.factors]
    chosen, note = choose(bench, arms, Rule())
    chosen = replace(chosen, name="refined", group="refined", plan=_plan(chosen).model_copy(update={"name": "refined"}))
    if refined is None:
        note = "no feature at any multiple gained within the KL budget; the best-scored one is shown"
    facts = {"note": note, "refined": refined, "tried": table}
    return Proposal(chosen, (chosen, _turned(chosen), *_curve(bench, method, pool[0])), found, facts)


def _scored(bench: Bench, method: ContrastRefine) -> FeatureSet:
    """Every feature by the composite score, and the best of them kept."""
    settings = ContrastSettings(
        pooling=method.pooling,
        w_diff=method.w_diff,
        w_var=method.w_var,
        min_firing_rate=method.min_firing_rate,
        literal=method.literal,
        ranked_by="composite",
        top=max(64, 2 * method.features),
    )
    with bench.stages.stage("Scoring the contrast"):
        given = bench.given
        return find_by_contrast(given.lm, given.sae, given.contrast, settings, seed=given.seed)


def _both_signs(features: Sequence[int], units: dict[int, float]) -> list[Clamps]:
    """Each feature at plus and minus its own largest activation; one that never fired has none."""
    alive = [feature for feature in dict.fromkeys(features) if units.get(feature, 0.0) > 0]
    return [Clamps((feature,), (sign * units[feature],)) for feature in alive for sign in (1.0, -1.0)]


def _refined(
    bench: Bench, method: ContrastRefine, found: FeatureSet, units: dict[int, float], table: list[dict[str, Any]]
) -> Any:
    """The refined set with its outcome; None when nothing gains within the budget. `table` gets all that was tried."""
    lm, sae, given = bench.subject.lm, bench.subject.sae, bench.given
    refusal = PrefillRefusal(lm, sae, bench.validation(HARMFUL), given.tokens)
    kl = BenignKl(lm, sae, bench.validation(BENIGN))

    def measure(sets: Sequence[Clamps]) -> list[Outcome]:
        plans = [additive(bench, clamps, method.scope, "add") for clamps in sets]
        outcomes = [Outcome(gain, cost) for gain, cost in zip(refusal(plans), kl(plans), strict=True)]
        table.extend({"clamps": clamps, "outcome": outcome} for clamps, outcome in zip(sets, outcomes, strict=True))
        return outcomes

    def rescore(kept: Clamps) -> list[Clamps]:
        return _both_signs([*kept.features, *found.ranking[: 2 * method.features]], units)

    limits = Limits(method.kl_budget, method.min_gain, method.set_size, method.rounds, multiples=method.sizes)
    try:
        return refine(_both_signs(found.ranking[: method.features], units), measure, rescore, limits).best
    except NotEnoughDataError:
        return None


def additive(bench: Bench, clamps: Clamps, scope: str, name: str) -> Plan:
    """strength * W_dec[feature] added, whatever the activation."""
    lm, sae, site = bench.subject.lm, bench.subject.sae, bench.subject.sae.cfg.site.name
    edit = Edit(site=site, operator="add", features=clamps.features, strengths=clamps.strengths, scope=scope)
    ref = SaeRef(site=site, name=sae.name, revision=sae.revision)
    return Plan(name=name, model=ModelRef(name=lm.name, revision=lm.revision), saes=(ref,), edits=(edit,))


def _added(bench: Bench, method: ContrastRefine, clamps: Clamps, name: str, group: str = "refined") -> Arm:
    return _arm(additive(bench, clamps, method.scope, name), name, group)


def _curve(bench: Bench, method: ContrastRefine, first: Clamps) -> list[Arm]:
    """The best-scored feature at every multiple: the paper's figure."""
    name = f"best-scored {first.features[0]}"
    unit = Clamps(first.features, tuple(map(abs, first.strengths)))
    return [_added(bench, method, unit.scaled(m), f"{name} x{m:g}", name) for m in sorted(method.multiples)]


def _turned(arm: Arm) -> Arm:
    """The same edit in the other direction."""
    name = f"{arm.name}, signs turned"
    plan = with_strengths(_plan(arm), [-s for edit in _plan(arm).edits for s in edit.strengths], name)
    return replace(arm, name=name, plan=plan, strength=plan.edits[0].strengths[0])


# --- both ---------------------------------------------------------------------------------------------------------


def choose(bench: Bench, arms: Sequence[Arm], rule: Rule) -> tuple[Arm, str]:
    """The arm that validation prompts choose by generated, judged replies, and what is to be said about it. When none
    gains a refusal: the arm that is broken least, the strongest of those."""
    suites = [s for s in bench.subject.suites(Split.VALIDATION, None) if s.name == HARMFUL]
    every = [BASELINE, *arms]
    records = experiment.generate_records(
        bench.subject, every, suites, bench.directory, bench.sizes, bench.stages, "Choosing on validation"
    )
    (unsteered,) = candidates([BASELINE], records, suites)
    found = candidates(arms, records, suites)
    picked = pick_by_rule(found, rule, baseline=unsteered.axes.refusal or 0.0).chosen
    if picked is not None:
        return picked.arm, ""
    least = min(found, key=lambda c: (c.axes.degenerate or 0.0, -abs(c.arm.strength or 0.0)))
    return least.arm, NO_GAIN


def _arm(plan: Plan, name: str, group: str = "") -> Arm:
    named = plan.model_copy(update={"name": name})
    return Arm(name, ArmKind.FEATURE, named, named.edits[0].strengths[0], group=group or name)


def _plan(arm: Arm) -> Plan:
    if arm.plan is None:
        raise NotEnoughDataError(f"'{arm.name}' does not steer")
    return arm.plan
