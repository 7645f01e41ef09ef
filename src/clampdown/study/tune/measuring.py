"""How `clampdown tune` measures plans: trials on a few validation prompts, finalists on the many that no trial read.

A finalist with a gate is compared on all fresh harmless prompts and generates few: its gate is read on all of them, and
only rows on which it fires (or nearly does: the reading and the steered pass may differ by rounding) are answered by
the plan and the unsteered model. The others are the unsteered model's own, whatever it answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from clampdown.errors import SteeringNotAppliedError
from clampdown.evaluation import metrics, utility
from clampdown.steering.arms import BASELINE, Arm
from clampdown.steering.plan import Plan
from clampdown.steering.turn_reading import read_prompts
from clampdown.study.budgets import (
    BROKEN_HARMFUL,
    BROKEN_SAFE,
    CAPABILITY,
    OVER_REFUSAL,
    BenignKl,
    Budgets,
    Change,
    Evidence,
    Use,
    changes,
    turned_away,
    weigh,
)
from clampdown.study.measure import generate_records
from clampdown.study.methods.gated_set import opened, steering_up
from clampdown.study.progress import Stages
from clampdown.study.sizes import Answering
from clampdown.study.study import Study
from clampdown.study.tune.prompts import PromptSets, Scale, capability, harmful, prompts_of, safe
from clampdown.study.tune.search import Score, Setting, Trial
from clampdown.study.tune.space import Candidates
from clampdown.types import OBJECTIVE, ArmKind, Interval, Prompt, Record, Suite

ROUNDING = 1e-3
"""How near its threshold, in standard deviations of its scores, a gate may go either way."""

ByArm = Mapping[str, Mapping[str, tuple[Record, ...]]]


@dataclass(frozen=True, slots=True)
class Bench:
    """Everything that measuring needs."""

    study: Study
    sets: PromptSets
    scale: Scale
    budgets: Budgets
    candidates: Candidates
    directory: Path
    stages: Stages

    def arm(self, setting: Setting, name: str) -> Arm:
        plan = self.candidates.plan(self.study, setting)
        return Arm(name, ArmKind.TUNED, plan, steering_up(plan)[0].strengths[0], group="tuned")

    def sizes(self, kl_prompts: int = 0) -> Answering:
        return replace(self.scale.test, kl_prompts=kl_prompts)


@dataclass(frozen=True, slots=True)
class Finalist:
    """A trial that was measured again on fresh prompts: refusals by harmful suite, and the budgets with bounds."""

    trial: Trial
    arm: Arm
    refusals: Mapping[str, Interval]
    uses: tuple[Use, ...]

    @property
    def refusal(self) -> float:
        """Mean over harmful suites; 0 when one could not be scored."""
        return metrics.mean_of(self.refusals.values()) or 0.0

    @property
    def over(self) -> tuple[str, ...]:
        return turned_away(self.uses)


class Trials:
    """`search.Evaluate`: batches of settings as the arms of one run, each batch in a directory of its own."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.forced: tuple[utility.Forced, ...] | None = None

    def __call__(self, first: int, settings: Sequence[Setting]) -> list[Score]:
        bench = self.bench
        arms = [bench.arm(setting, f"trial {number}") for number, setting in enumerate(settings, first)]
        directory = bench.directory / "trials" / f"{first:04d}"
        name = f"Trials {first + 1}-{first + len(arms)} of {bench.scale.trials}"
        try:
            return self._measured(arms, directory, name)
        except SteeringNotAppliedError:
            # One plan that did nothing, or turned the residual into NaN, must not cost the others.
            return [score for arm in arms for score in self._alone(arm, directory, name)]

    def _alone(self, arm: Arm, directory: Path, name: str) -> list[Score]:
        try:
            return self._measured([arm], directory / arm.name.replace(" ", "-"), name)
        except SteeringNotAppliedError as error:
            return [Score(None, {}, (), error.message)]

    def _measured(self, arms: Sequence[Arm], directory: Path, name: str) -> list[Score]:
        bench = self.bench
        study, suites = bench.study, bench.sets.trial
        records = generate_records(study, [BASELINE, *arms], suites, directory, bench.sizes(), bench.stages, name)
        if self.forced is None:
            self.forced = benign_replies(bench, bench.sets.benign_of(suites))
        costs = utility.costs(study.lm, study.saes, arms, self.forced)
        grouped = metrics.by_arm_and_suite(records)
        scores = []
        for arm in arms:
            kl = costs[arm.name].kl
            evidence = Evidence(changes_of(grouped, arm.name, suites), BenignKl(() if kl is None else (kl,)))
            refusals = refusals_of(grouped, arm.name, suites)
            by_suite = {suite: rate.value for suite, rate in refusals.items()}
            refusal = metrics.mean_of(refusals.values()) if kl is not None else None
            scores.append(
                Score(refusal, by_suite, weigh(evidence, bench.budgets), "" if kl is not None else "KL is NaN")
            )
        return scores


def benign_replies(bench: Bench, prompts: Sequence[Prompt]) -> tuple[utility.Forced, ...]:
    return utility.base_replies(bench.study.lm, prompts, max_new_tokens=bench.scale.test.max_new_tokens)


def refusals_of(grouped: ByArm, arm: str, suites: Sequence[Suite]) -> dict[str, Interval]:
    """By harmful suite, the share refused."""
    return {s.name: metrics.share(grouped[arm].get(s.name, ()), metrics.refused) for s in harmful(suites)}


def changes_of(grouped: ByArm, arm: str, suites: Sequence[Suite]) -> dict[str, list[Change]]:
    """What an arm did to each prompt, by budget."""

    def of(some: Sequence[Suite], outcome: metrics.Outcome, *, good: bool = False) -> list[Change]:
        return [
            change
            for suite in some
            for change in changes(
                grouped.get(BASELINE.name, {}).get(suite.name, ()), grouped.get(arm, {}).get(suite.name, ()), outcome,
                good=good,
            )
        ]  # fmt: skip

    return {
        OVER_REFUSAL: of(safe(suites), metrics.refused),
        CAPABILITY: of(capability(suites), metrics.correct, good=True),
        BROKEN_HARMFUL: of(harmful(suites), metrics.degenerate),
        BROKEN_SAFE: of(safe(suites), metrics.degenerate),
    }


@dataclass(frozen=True, slots=True)
class Confirmed:
    """The finalists, and the unsteered model's refusals of the same harmful prompts."""

    finalists: tuple[Finalist, ...]
    unsteered: Mapping[str, Interval]


def confirm(bench: Bench, chosen: Sequence[Trial]) -> Confirmed:
    """Measure the finalists on fresh prompts."""
    scale, fresh = bench.scale, bench.sets.fresh
    arms = [bench.arm(trial.setting, f"trial {trial.number}") for trial in chosen]
    shown = tuple(suite if suite in harmful(fresh) else suite.take(scale.generated) for suite in fresh)
    records = list(_generated(bench, arms, shown, "finalists", "Confirming finalists"))
    beyond = _beyond(fresh, scale.generated)
    triggers = _Triggers.read(bench, arms, fresh)
    gated = [arm for arm in arms if arm.plan and arm.plan.gate]
    asked = tuple(replace(s, prompts=tuple(p for p in s.prompts if triggers.any_fires(gated, p))) for s in beyond)
    if gated and (asked := tuple(suite for suite in asked if suite.prompts)):
        records += _generated(bench, gated, asked, "fired", "Answering where gates fire")
    grouped = metrics.by_arm_and_suite(records)
    skipped = tuple(
        replace(suite, prompts=tuple(p for p in suite.prompts if not triggers.any_fires(gated, p))) for suite in beyond
    )
    kl = _benign_kl(bench, arms, triggers)
    found = []
    for trial, arm in zip(chosen, arms, strict=True):
        unread = skipped if arm in gated else ()
        evidence = Evidence(_with_unchanged(changes_of(grouped, arm.name, fresh), unread), kl[arm.name])
        found.append(Finalist(trial, arm, refusals_of(grouped, arm.name, shown), weigh(evidence, bench.budgets)))
    return Confirmed(tuple(found), refusals_of(grouped, BASELINE.name, shown))


def _generated(bench: Bench, arms: Sequence[Arm], suites: Sequence[Suite], part: str, name: str) -> tuple[Record, ...]:
    return generate_records(
        bench.study, [BASELINE, *arms], suites, bench.directory / part, bench.sizes(), bench.stages, name
    )


def _beyond(suites: Sequence[Suite], n: int) -> tuple[Suite, ...]:
    """Harmless prompts beyond the first n of each suite."""
    harmless = (*safe(suites), *capability(suites))
    return tuple(replace(suite, prompts=suite.prompts[n:]) for suite in harmless if suite.prompts[n:])


def _with_unchanged(found: dict[str, list[Change]], unread: Sequence[Suite]) -> dict[str, list[Change]]:
    """The changes, and a prompt that stays for every harmless one on which no gate fired."""
    safe_ones, others = prompts_of(safe(unread)), prompts_of(capability(unread))
    more = {OVER_REFUSAL: safe_ones, BROKEN_SAFE: safe_ones, CAPABILITY: others}
    return {name: [*rows, *map(_unchanged, more.get(name, ()))] for name, rows in found.items()}


def _unchanged(prompt: Prompt) -> Change:
    objective = prompt.meta.get(OBJECTIVE)
    cluster = (prompt.suite, prompt.id) if objective is None else ("objective", objective)
    return Change(worse=False, better=False, cluster=cluster)


@dataclass(frozen=True, slots=True)
class _Triggers:
    """By arm, the prompts on which one of its gates fires, or may by rounding; arms without a gate have none."""

    of: Mapping[str, frozenset[tuple[str, str]]]

    @classmethod
    def read(cls, bench: Bench, arms: Sequence[Arm], suites: Sequence[Suite]) -> _Triggers:
        plans = {arm.name: arm.plan for arm in arms if arm.plan and arm.plan.gate}
        if not plans:
            return cls({})
        prompts = prompts_of((*safe(suites), *capability(suites)))
        with bench.stages.stage("Reading gates"):
            return cls({name: _firing(bench.study, plan, prompts) for name, plan in plans.items()})

    def fires(self, arm: str, prompt: Prompt) -> bool:
        return (prompt.suite, prompt.id) in self.of.get(arm, frozenset())

    def any_fires(self, arms: Sequence[Arm], prompt: Prompt) -> bool:
        return any(self.fires(arm.name, prompt) for arm in arms)


def _firing(study: Study, plan: Plan, prompts: Sequence[Prompt]) -> frozenset[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for gate in plan.gates:
        read = read_prompts(study.lm, gate, plan.vectors, study.sae, prompts)
        scores = np.array([reading.score for reading in read])
        least = gate.threshold - ROUNDING * max(float(scores.std()), 1e-6)
        found |= {(p.suite, p.id) for p, score in zip(prompts, scores, strict=True) if score > least}
    return frozenset(found)


def _benign_kl(bench: Bench, arms: Sequence[Arm], triggers: _Triggers) -> dict[str, BenignKl]:
    """Text by text, gates held open, of two sides the dearer one; and how often each gate fires on benign prompts."""
    study, benign = bench.study, bench.sets.benign_of(bench.sets.fresh)
    always = [replace(arm, plan=opened(arm.plan)) for arm in arms if arm.plan]
    down = [
        replace(arm, plan=arm.plan.changed(gate=None, otherwise=None))
        for arm in arms
        if arm.plan and arm.plan.otherwise
    ]
    forced = benign_replies(bench, benign[: bench.scale.generated])
    values: dict[str, list[float]] = {arm.name: [] for arm in arms}
    with bench.stages.stage("Cost on benign text") as tick:
        for done, text in enumerate(forced, 1):
            sides = [utility.costs(study.lm, study.saes, each, [text]) for each in (always, down) if each]
            for name in values.keys() & sides[0].keys() if sides else ():
                read = [side[name].kl for side in sides if name in side]
                values[name].append(max(float("inf") if kl is None else kl for kl in read))
            tick(done, len(forced))
    found = {}
    for arm in arms:
        gated = arm.plan is not None and arm.plan.gate is not None
        fired = sum(triggers.fires(arm.name, prompt) for prompt in benign)
        found[arm.name] = BenignKl(tuple(values[arm.name]), fired, len(benign) if gated else None)
    return found
