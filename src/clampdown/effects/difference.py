"""From answers to rows: every measure of every aspect, steered beside unsteered on the same items."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from clampdown.effects.aspect import Aspect, Item, Measure, Reading, Way, cluster_of
from clampdown.evaluation import metrics
from clampdown.evaluation.intervals import clustered, holm, statistic_bootstrap, statistic_of, swap_test
from clampdown.results.side_effects import Effect, NotMeasured, Unit, marked
from clampdown.types import Interval, OptionChoice, Prompt, Record

Key = tuple[str, str, str]
NO_ITEM = "there is no item of which both arms' answers can be read so"


@dataclass(frozen=True, slots=True)
class Answers:
    """What all arms answered, by arm, suite and prompt, and which arm is unsteered."""

    records: Mapping[Key, Record]
    choices: Mapping[Key, OptionChoice]
    baseline: str

    def item(self, aspect: Aspect, prompts: Mapping[str, Prompt], arm: str) -> Item:
        """One item of an aspect, as an arm answered it."""
        if aspect.way is Way.LIKELIHOOD:
            return Item(prompts, choices={role: self.choices[arm, p.suite, p.id] for role, p in prompts.items()})
        records = {role: self.records[arm, p.suite, p.id] for role, p in prompts.items()}
        unsteered = {role: self.records[self.baseline, p.suite, p.id] for role, p in prompts.items()}
        return Item(prompts, records=records, unsteered=unsteered)


@dataclass(frozen=True, slots=True)
class Both:
    """One item read under both arms."""

    before: bool | float | tuple[float, ...]
    after: bool | float | tuple[float, ...]
    cluster: Hashable


def effects_of(
    arm: str, aspects: Sequence[Aspect], answers: Answers, margin: float, seed: int = 0
) -> tuple[list[Effect], list[NotMeasured]]:
    """All measures of one plan, p-values adjusted over them; and those of which no item could be read."""
    rows = [
        effect_of(arm, aspect, measure, read_both(aspect, measure, answers, arm), seed)
        for aspect in aspects
        for measure in aspect.measures
    ]
    empty = [
        NotMeasured(row.kind, f"{row.aspect}: {row.measure}", NO_ITEM, arm) for row in rows if not row.difference.n
    ]
    rows = [row for row in rows if row.difference.n]
    adjusted = holm([row.p_value for row in rows])
    return [
        replace(row, p_holm=p, mark=marked(row.unit, row.baseline, row.difference, p, margin))
        for row, p in zip(rows, adjusted, strict=True)
    ], empty


def read_both(aspect: Aspect, measure: Measure, answers: Answers, arm: str) -> list[Both]:
    """The items of which the measure reads something under both arms."""
    found = []
    for prompts in aspect.items():
        before: Reading = measure.read(answers.item(aspect, prompts, answers.baseline))
        after: Reading = measure.read(answers.item(aspect, prompts, arm))
        if before is not None and after is not None:
            found.append(Both(before, after, cluster_of(prompts)))
    return found


def effect_of(arm: str, aspect: Aspect, measure: Measure, both: Sequence[Both], seed: int = 0) -> Effect:
    """One row, its p-value not adjusted yet."""
    compared = _shares(both, seed) if measure.unit is Unit.SHARE else _scores(measure, both, seed)
    baseline, steered, difference, p_value = compared
    mark = marked(measure.unit, baseline, difference, p_value, 0.0)
    return Effect(arm, aspect.kind.value, aspect.label, measure.name, measure.unit, measure.worse,
                  baseline, steered, difference, p_value, p_value, mark)  # fmt: skip


Compared = tuple[Interval, Interval, Interval, float | None]


def _shares(both: Sequence[Both], seed: int) -> Compared:
    """Yes or no: Wilson's intervals, Bonett & Price's, exact McNemar; over clusters where items share one."""
    clusters = [("cluster", repr(one.cluster)) for one in both]
    pairs = [metrics.Pair(bool(one.before), bool(one.after), name) for one, name in zip(both, clusters, strict=True)]
    found = metrics.compare_pairs(pairs, seed=seed)
    difference = found.difference
    if found.p_value is None and len(set(clusters)) < len(pairs):  # as for scores: bootstrapped zeros promise too much
        difference = Interval(difference.value, None, None, difference.n)
    before = clustered([pair.before for pair in pairs], clusters)
    after = clustered([pair.after for pair in pairs], clusters)
    return before, after, difference, found.p_value


def _scores(measure: Measure, both: Sequence[Both], seed: int) -> Compared:
    """Numbers: bootstrap over items or clusters, and the test that swaps the arms within them."""
    n, clusters = len(both), [one.cluster for one in both]
    if not both:
        nothing = Interval(None, None, None, 0)
        return nothing, nothing, nothing, None
    first, second = (np.array([_numbers(value) for value in side], dtype=float)
                     for side in ([one.before for one in both], [one.after for one in both]))  # fmt: skip
    values = [Interval(statistic_of(side, measure.statistic), None, None, n) for side in (first, second)]
    p_value = swap_test(first, second, measure.statistic, clusters=clusters, seed=seed)
    difference = statistic_bootstrap(first, second, measure.statistic, clusters=clusters, seed=seed)
    if p_value is None:  # no item differed, and a bootstrap of zeros would promise that none ever does
        difference = Interval(0.0, None, None, n)
    return values[0], values[1], difference, p_value


def _numbers(value: bool | float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (float(value),)
