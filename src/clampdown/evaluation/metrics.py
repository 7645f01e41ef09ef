"""Numbers about records, each with its interval and sample size. Pure functions; the statistics are scipy's.

1. A rate is a proportion of the *scored* replies with a Wilson interval (Wilson 1927). Unscored replies are counted
   beside it, over all replies: guessing them either way once moved a published 66.7 % to 75.0 %.
2. Two arms are compared on the same prompts: exact McNemar for yes/no outcomes, paired bootstrap for scores.
3. With no data an estimate is `Interval(None, None, None, 0)`, never 0.0.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from clampdown.types import Interval, Record, Verdict

CONFIDENCE = 0.95
NO_DATA = Interval(None, None, None, 0)

Outcome = Callable[[Record], bool | None]


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Proportion with its Wilson score interval; no data when `n` is 0. Raises `ValueError` for impossible counts."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes out of {n}")
    if n == 0:
        return NO_DATA
    z = float(stats.norm.ppf((1 + confidence) / 2))
    rate, weight = successes / n, z * z / n
    centre = (rate + weight / 2) / (1 + weight)
    half = z * np.sqrt(rate * (1 - rate) / n + weight / (4 * n)) / (1 + weight)
    # At 0 and n the bound equals the estimate in exact arithmetic; say so in floating point too.
    low = 0.0 if successes == 0 else float(centre - half)
    high = 1.0 if successes == n else float(centre + half)
    return Interval(rate, low, high, n)


def clopper_pearson(successes: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Proportion with its exact binomial two-sided interval (conservative: coverage is at least `confidence`).

    The one-sided bound that a gate's guarantee uses is `steering.gates.upper_bound`.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes out of {n}")
    if n == 0:
        return NO_DATA
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(stats.beta.ppf(tail, successes, n - successes + 1))
    high = 1.0 if successes == n else float(stats.beta.isf(tail, successes + 1, n - successes))
    return Interval(successes / n, low, high, n)


def rates(records: Iterable[Record], confidence: float = CONFIDENCE) -> dict[Verdict, Interval]:
    """Share of each verdict among scored replies; `UNSCORED` is its share of all replies."""
    verdicts = [record.verdict for record in records]
    scored = [verdict for verdict in verdicts if verdict is not Verdict.UNSCORED]
    found = {v: wilson(scored.count(v), len(scored), confidence) for v in Verdict if v is not Verdict.UNSCORED}
    return {**found, Verdict.UNSCORED: wilson(len(verdicts) - len(scored), len(verdicts), confidence)}


def accuracy(records: Iterable[Record], confidence: float = CONFIDENCE) -> Interval:
    """Share of right answers among replies whose prompt has an expected answer."""
    answers = [record.correct for record in records if record.correct is not None]
    return wilson(sum(answers), len(answers), confidence)


def by_arm_and_suite(records: Iterable[Record]) -> dict[str, dict[str, tuple[Record, ...]]]:
    """Records grouped as arm -> suite -> records, in order of first appearance."""
    grouped: defaultdict[str, defaultdict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        grouped[record.arm][record.suite].append(record)
    return {arm: {name: tuple(rows) for name, rows in suites.items()} for arm, suites in grouped.items()}


def refused(record: Record) -> bool | None:
    """Outcome for paired comparisons: did this reply refuse? None when it could not be scored."""
    return None if record.verdict is Verdict.UNSCORED else record.verdict is Verdict.REFUSED


def correct(record: Record) -> bool | None:
    """Outcome for paired comparisons: was this reply right? None for prompts without an expected answer."""
    return record.correct


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two arms on the same prompts. `difference` is second minus first; `p_value` is exact McNemar's.

    `gained` prompts had the outcome under the second arm only, `lost` under the first only.
    """

    difference: Interval
    gained: int
    lost: int
    p_value: float | None


def compare(first: Iterable[Record], second: Iterable[Record], outcome: Outcome, *, seed: int = 0) -> Comparison:
    """Paired difference of a yes/no outcome. Prompts that only one arm answered (or scored) are left out."""
    pairs = paired(first, second, outcome)
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    return Comparison(paired_bootstrap(before, after, seed=seed), gained, lost, mcnemar(gained, lost))


def paired(first: Iterable[Record], second: Iterable[Record], outcome: Outcome) -> list[tuple[bool, bool]]:
    """Outcomes of the same prompt under two arms, for prompts on which both are known."""
    known = {(record.suite, record.prompt_id): outcome(record) for record in first}
    found = []
    for record in second:
        before, after = known.get((record.suite, record.prompt_id)), outcome(record)
        if before is not None and after is not None:
            found.append((before, after))
    return found


def mcnemar(gained: int, lost: int) -> float | None:
    """Exact two-sided McNemar p-value from the discordant counts; None when the arms never differed."""
    if gained + lost == 0:
        return None
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue)


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], *, confidence: float = CONFIDENCE, seed: int = 0
) -> Interval:
    """Mean of `second - first` with a percentile interval over resampled pairs; no bounds below two pairs.

    Raises `ValueError` when the sequences are not pairs.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} scores are not pairs")
    differences = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    if differences.size == 0:
        return NO_DATA
    mean = float(differences.mean())
    if differences.size == 1:
        return Interval(mean, None, None, 1)
    drawn = stats.bootstrap(
        (differences,), np.mean, confidence_level=confidence, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return Interval(mean, float(drawn.low), float(drawn.high), differences.size)


def mean_of(intervals: Iterable[Interval]) -> float | None:
    """Mean of the estimates, each suite weighing the same; None when any of them has no data."""
    values = [interval.value for interval in intervals]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
