"""Budgets: how much a plan may cost, and the upper confidence bound that has to stay within each.

1. Harm is counted against the unsteered model on the same prompts: harmless prompts newly refused, right answers lost,
   replies newly broken. A prompt gets worse, better, or stays.
2. The bound of (share worse - share better) is exact at any n: Clopper-Pearson's upper bound of the share worse minus
   its lower bound of the share better. `WORSE` of the allowed error goes to the former; with nothing better it is the
   only one that matters. Where prompts share an objective an objective counts once, worse if any of its prompts is;
   objectives of unequal size make the bound larger by (largest / mean size).
3. A gate that stayed shut leaves the row as it is, bit for bit, so such a row is a prompt that stays, and nobody has to
   generate it. That all n rows of a sample stayed shut is no proof that the next one will: the bound is then about 3/n,
   as for any event that was not seen. Reading a gate costs a prefill, so n can be large where generating would be dear.
4. Benign KL behind a gate is (how often it fires) x (KL with the gate held open), a bound of each with half the error.
   It takes the prompts that slip through for ones like the others.

A bound speaks of one plan. Who picks the best of several by the same prompts reads the test split for the rest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clampdown.errors import NotEnoughDataError, PlanError
from clampdown.evaluation.intervals import clopper_pearson, mean_interval
from clampdown.evaluation.metrics import Outcome, cluster_of
from clampdown.steering.gates import prompts_needed, upper_bound
from clampdown.types import Record

WORSE = 0.9
OVER_REFUSAL, CAPABILITY, BROKEN_HARMFUL, BROKEN_SAFE, KL = (
    "over-refusal",
    "capability loss",
    "broken, harmful",
    "broken, safe",
    "benign KL",
)


@dataclass(frozen=True, slots=True)
class Budgets:
    """Largest increases over the unsteered model, as shares of prompts, and `kl` in nats per token of benign text.

    Raises `PlanError` for what is no such share.
    """

    over_refusal: float = 0.02
    capability: float = 0.02
    broken: float = 0.015
    kl: float = 0.05
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for name in ("over_refusal", "capability", "broken", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise PlanError(
                    f"{name.replace('_', '-')} must be a share between 0 and 1, got {getattr(self, name):g}",
                    hint="no sample can prove that something never happens: 0.01 means at most one prompt in a hundred",
                )
        if not self.kl > 0:
            raise PlanError(f"the budget of benign KL must be positive, got {self.kl:g}")

    @property
    def limits(self) -> dict[str, float]:
        """By budget, in the order in which they are shown."""
        names = (OVER_REFUSAL, CAPABILITY, BROKEN_HARMFUL, BROKEN_SAFE, KL)
        return dict(zip(names, (self.over_refusal, self.capability, self.broken, self.broken, self.kl), strict=True))


@dataclass(frozen=True, slots=True)
class Change:
    """What a plan did to one prompt; `cluster` is what prompts that are not independent have in common."""

    worse: bool
    better: bool
    cluster: Hashable


@dataclass(frozen=True, slots=True)
class BenignKl:
    """KL of each benign text, nats per token. `read` is None for a plan without a gate; else the gate was held open for
    `values`, and fired on `fired` of the `read` prompts."""

    values: tuple[float, ...]
    fired: int = 0
    read: int | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a plan: by budget the prompts that it was compared on, and its KL."""

    changes: Mapping[str, Sequence[Change]]
    kl: BenignKl


@dataclass(frozen=True, slots=True)
class Use:
    """How much of one budget is used. `bound` is None where there is too little to bound it from."""

    budget: str
    limit: float
    estimate: float | None
    bound: float | None
    n: int

    @property
    def holds(self) -> bool:
        return self.bound is not None and self.bound <= self.limit

    @property
    def spent(self) -> float:
        """The estimate as a share of the limit, at least 0."""
        return max(0.0, self.estimate or 0.0) / self.limit


def changes(before: Iterable[Record], after: Iterable[Record], outcome: Outcome, *, good: bool) -> list[Change]:
    """Prompt by prompt, where both outcomes are known. `good`: the outcome is wanted (a right answer)."""
    known = {(record.suite, record.prompt_id): outcome(record) for record in before}
    found = []
    for record in after:
        old, new = known.get((record.suite, record.prompt_id)), outcome(record)
        if old is not None and new is not None:
            found.append(Change(old is good and new is not good, old is not good and new is good, cluster_of(record)))
    return found


def weigh(evidence: Evidence, budgets: Budgets) -> tuple[Use, ...]:
    """The use of every budget for which there are prompts."""
    limits = budgets.limits
    shares = tuple(
        _share(name, limits[name], evidence.changes[name], budgets.confidence)
        for name in limits
        if evidence.changes.get(name)
    )
    return (*shares, _kl(evidence.kl, limits[KL], budgets.confidence))


def _share(name: str, limit: float, found: Sequence[Change], confidence: float) -> Use:
    estimate = (sum(change.worse for change in found) - sum(change.better for change in found)) / len(found)
    worse, better, n = _independent(found)
    bound = min(1.0, net_bound(worse, better, n, confidence) * _crowding(found))
    return Use(name, limit, estimate, bound, len(found))


def _crowding(found: Sequence[Change]) -> float:
    """Prompts in the largest cluster over those in a mean one. The budget counts prompts: a share of clusters that get
    worse holds at most this many times that share of prompts."""
    sizes = Counter(change.cluster for change in found)
    return max(sizes.values()) * len(sizes) / len(found)


def _independent(found: Sequence[Change]) -> tuple[int, int, int]:
    """Worse, better and all, of independent units. A cluster that holds both is worse, and none counts as better: how
    much better it is depends on its size."""
    by_cluster: dict[Hashable, bool] = {}
    for change in found:
        by_cluster[change.cluster] = by_cluster.get(change.cluster, False) or change.worse
    if len(by_cluster) == len(found):
        return sum(c.worse for c in found), sum(c.better for c in found), len(found)
    return sum(by_cluster.values()), 0, len(by_cluster)


def net_bound(worse: int, better: int, n: int, confidence: float) -> float:
    """Upper bound of (share worse - share better); 1.0 without data."""
    if n == 0:
        return 1.0
    error = 1 - confidence
    high = upper_bound(worse, n, 1 - WORSE * error)
    low = clopper_pearson(better, n, 1 - 2 * (1 - WORSE) * error).low
    return high - (low or 0.0)


def _kl(found: BenignKl, limit: float, confidence: float) -> Use:
    if not found.values:
        return Use(KL, limit, None, None, 0)
    mean = sum(found.values) / len(found.values)
    if not math.isfinite(mean):
        return Use(KL, limit, None, None, len(found.values))
    if found.read is None:
        return Use(KL, limit, mean, _mean_bound(found.values, confidence), len(found.values))
    half = 1 - (1 - confidence) / 2
    high, fires = _mean_bound(found.values, half), upper_bound(found.fired, max(found.read, 1), half)
    bound = None if high is None else high * fires
    return Use(KL, limit, mean * found.fired / max(found.read, 1), bound, found.read)


def _mean_bound(values: Sequence[float], confidence: float) -> float | None:
    """Student's one-sided upper bound; none where a KL is infinite (the model was broken)."""
    if not all(map(math.isfinite, values)):
        return None
    return mean_interval(values, 2 * confidence - 1).high


def turned_away(uses: Sequence[Use]) -> tuple[str, ...]:
    """The budgets that do not hold."""
    return tuple(use.budget for use in uses if not use.holds)


def check_provable(available: Mapping[str, int], budgets: Budgets) -> None:
    """Before hours are spent: could a plan that harms nothing prove the budgets on this many prompts each?

    Raises `NotEnoughDataError`, naming the n that would do.
    """
    certain = 1 - WORSE * (1 - budgets.confidence)
    for name, n in available.items():
        limit = budgets.limits[name]
        if n and upper_bound(0, n, certain) > limit:
            raise NotEnoughDataError(
                f"{n} validation prompts cannot show a budget of {limit:g} ({name}) at {budgets.confidence:.0%} "
                "confidence, even if nothing goes wrong on any of them",
                hint=f"use at least {prompts_needed(limit, certain)} prompts that no trial reads, or a larger budget",
            )


def facts(use: Use) -> dict[str, Any]:
    """Plain values for a run directory."""
    return {
        "budget": use.budget,
        "limit": use.limit,
        "estimate": use.estimate,
        "bound": use.bound,
        "n": use.n,
        "holds": use.holds,
    }
