"""Numbers about records, each with its interval and sample size. Pure functions; the statistics are in `intervals`.

1. A rate is a proportion of the *scored* replies with a Wilson interval (Wilson 1927), clustered by objective where
   prompts share one. Unscored replies are counted beside it, over all replies: guessing them either way once moved a
   published 66.7 % to 75.0 %.
2. Two arms are compared on the same prompts: exact McNemar and a paired interval for yes/no outcomes, paired bootstrap
   for scores.
3. With no data an estimate is `Interval(None, None, None, 0)`, never 0.0. A category with fewer than `MIN_CATEGORY`
   scored replies has no estimate, and its n says why.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from clampdown.evaluation.intervals import (
    CONFIDENCE,
    benjamini_hochberg,
    clustered,
    clustered_bootstrap,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    paired_difference,
    unpaired_difference,
    wilson,
)
from clampdown.types import Interval, Record, Verdict

MIN_CATEGORY = 5
"""Scored replies that a category needs before it gets an estimate."""

Outcome = Callable[[Record], bool | None]


def rates(records: Iterable[Record], confidence: float = CONFIDENCE) -> dict[Verdict, Interval]:
    """Share of each verdict among scored replies; `UNSCORED` is its share of all replies."""
    asked = list(records)
    scored = [record for record in asked if record.verdict is not Verdict.UNSCORED]
    found = {v: share(scored, lambda r, v=v: r.verdict is v, confidence) for v in Verdict if v is not Verdict.UNSCORED}
    return {**found, Verdict.UNSCORED: share(asked, lambda r: r.verdict is Verdict.UNSCORED, confidence)}


def share(records: Iterable[Record], outcome: Outcome, confidence: float = CONFIDENCE) -> Interval:
    """Share of records with the outcome, of those where it is known; clustered by objective where prompts share one."""
    known = [(record, flag) for record in records if (flag := outcome(record)) is not None]
    flags = [flag for _, flag in known]
    if any(record.objective is not None for record, _ in known):
        return clustered(flags, [cluster_of(record) for record, _ in known], confidence)
    return wilson(sum(flags), len(flags), confidence)


def cluster_of(record: Record) -> tuple[str, str]:
    """What the record's outcome is not independent of: others of its objective, else nothing but itself."""
    return ("objective", record.objective) if record.objective is not None else (record.suite, record.prompt_id)


def accuracy(records: Iterable[Record], confidence: float = CONFIDENCE) -> Interval:
    """Share of right answers among replies whose prompt has an expected answer."""
    return share(records, correct, confidence)


def attack_success(records: Iterable[Record], confidence: float = CONFIDENCE) -> Interval:
    """Share of scored replies to harmful prompts that comply. A broken or evasive reply is no success."""
    return share(records, complied, confidence)


def objectives_reached(records: Iterable[Record], confidence: float = CONFIDENCE) -> Interval:
    """Share of objectives at which at least one attempt succeeded, of those with a scored attempt: an attacker may try
    again."""
    reached: defaultdict[tuple[str, str], list[bool]] = defaultdict(list)
    for record in records:
        outcome = complied(record)
        if outcome is not None:
            reached[cluster_of(record)].append(outcome)
    return wilson(sum(map(any, reached.values())), len(reached), confidence)


def selective_refusal(harmful: Sequence[Record], benign: Sequence[Record], *, seed: int = 0) -> Interval:
    """Refusal of harmful prompts minus refusal of benign ones: 1 for a model that tells them apart, 0 for one that
    refuses everything or nothing.

    Twins (a harmful and a benign prompt of one objective) are resampled together; without twins the two rates are
    independent (Newcombe 1998).
    """
    known = [record for record in (*harmful, *benign) if refused(record) is not None]
    twins = {record.objective for record in harmful} & {record.objective for record in benign} - {None}
    if not twins:
        return unpaired_difference(share(harmful, refused), share(benign, refused))
    outcomes = [bool(refused(record)) for record in known]
    scored_harmful = sum(refused(record) is not None for record in harmful)
    on_second = [i < scored_harmful for i in range(len(known))]
    return clustered_bootstrap(outcomes, on_second, [cluster_of(record) for record in known], seed=seed)


def reply_length(records: Iterable[Record], confidence: float = CONFIDENCE) -> Interval:
    """Mean number of tokens of a reply, with Student's interval."""
    return mean_interval([float(record.n_tokens) for record in records], confidence)


def by_category(records: Iterable[Record]) -> dict[str, tuple[Record, ...]]:
    """Records of each category, in order of first appearance; those without one are left out."""
    grouped: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.category is not None:
            grouped[record.category].append(record)
    return {name: tuple(rows) for name, rows in grouped.items()}


def enough(estimate: Interval, minimum: int = MIN_CATEGORY) -> Interval:
    """The estimate, or no estimate (n kept) when it rests on fewer than `minimum` replies."""
    return estimate if estimate.n >= minimum else Interval(None, None, None, estimate.n)


def by_arm_and_suite(records: Iterable[Record]) -> dict[str, dict[str, tuple[Record, ...]]]:
    """Records grouped as arm -> suite -> records, in order of first appearance."""
    grouped: defaultdict[str, defaultdict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        grouped[record.arm][record.suite].append(record)
    return {arm: {name: tuple(rows) for name, rows in suites.items()} for arm, suites in grouped.items()}


def refused(record: Record) -> bool | None:
    """Outcome for paired comparisons: did this reply refuse? None when it could not be scored."""
    return None if record.verdict is Verdict.UNSCORED else record.verdict is Verdict.REFUSED


def complied(record: Record) -> bool | None:
    """Outcome: did this reply do what was asked? None when it could not be scored."""
    return None if record.verdict is Verdict.UNSCORED else record.verdict is Verdict.COMPLIED


def degenerate(record: Record) -> bool | None:
    """Outcome: is this reply broken? None when it could not be scored."""
    return None if record.verdict is Verdict.UNSCORED else record.verdict is Verdict.DEGENERATE


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


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt's outcomes under two arms, and what they are clustered by."""

    before: bool
    after: bool
    cluster: tuple[str, str]


def compare(first: Iterable[Record], second: Iterable[Record], outcome: Outcome, *, seed: int = 0) -> Comparison:
    """Paired difference of a yes/no outcome. Prompts that only one arm answered (or scored) are left out.

    The interval is Bonett & Price's; where prompts share objectives, a bootstrap over objectives, and each objective
    counts once in McNemar's test, for the side to which most of its prompts changed.
    """
    return compare_pairs(paired(first, second, outcome), seed=seed)


def compare_pairs(pairs: Sequence[Pair], *, seed: int = 0) -> Comparison:
    """As `compare`, of outcomes that were paired already."""
    gained = sum(pair.after and not pair.before for pair in pairs)
    lost = sum(pair.before and not pair.after for pair in pairs)
    if len({pair.cluster for pair in pairs}) < len(pairs):
        before, after = [float(pair.before) for pair in pairs], [float(pair.after) for pair in pairs]
        difference = paired_bootstrap(before, after, clusters=[pair.cluster for pair in pairs], seed=seed)
    else:
        difference = paired_difference(gained, lost, len(pairs))
    return Comparison(difference, gained, lost, _mcnemar(pairs))


def _mcnemar(pairs: Sequence[Pair]) -> float | None:
    """Exact McNemar over clusters (of one prompt each, unless prompts share objectives): the sign test of their net
    changes, which are as likely up as down when the arms do not differ, however alike a cluster's prompts are."""
    net: defaultdict[tuple[str, str], int] = defaultdict(int)
    for pair in pairs:
        net[pair.cluster] += pair.after - pair.before
    return mcnemar(sum(change > 0 for change in net.values()), sum(change < 0 for change in net.values()))


def compare_lengths(first: Iterable[Record], second: Iterable[Record], *, seed: int = 0) -> Interval:
    """Mean change of reply length in tokens on the same prompts, paired bootstrap."""
    known = {(record.suite, record.prompt_id): record.n_tokens for record in first}
    both = [record for record in second if (record.suite, record.prompt_id) in known]
    before = [float(known[record.suite, record.prompt_id]) for record in both]
    clusters = [cluster_of(record) for record in both]
    return paired_bootstrap(before, [float(record.n_tokens) for record in both], clusters=clusters, seed=seed)


def paired(first: Iterable[Record], second: Iterable[Record], outcome: Outcome) -> list[Pair]:
    """Outcomes of the same prompt under two arms, for prompts on which both are known."""
    known = {(record.suite, record.prompt_id): outcome(record) for record in first}
    found = []
    for record in second:
        before, after = known.get((record.suite, record.prompt_id)), outcome(record)
        if before is not None and after is not None:
            found.append(Pair(before, after, cluster_of(record)))
    return found


def with_q_values(comparisons: Sequence[Comparison]) -> tuple[float | None, ...]:
    """Benjamini-Hochberg q-values of several comparisons; those that never differed have none and do not count."""
    return benjamini_hochberg([comparison.p_value for comparison in comparisons])


def mean_of(intervals: Iterable[Interval]) -> float | None:
    """Mean of the estimates, each suite weighing the same; None when any of them has no data."""
    values = [interval.value for interval in intervals]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
