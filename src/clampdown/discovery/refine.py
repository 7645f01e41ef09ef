"""From a ranking to a set of clamps: iterative refinement (2511.00029) and greedy forward selection.

    score      a pool of candidates, each with a strength to start from
    evaluate   every candidate joined to the set so far
    optimise   the joined set's strengths, as multiples, for the largest gain within the cost that is allowed
    drop       features whose removal loses nothing
    rescore    a new pool around what is left
    repeat     until a round gains less than `min_gain` on validation prompts

What a clamp gains and costs is the caller's to measure (`Measure`): refusal log-odds and benign KL, judged replies, or
anything else. All sets of a step have their gain measured; cost only those that gain, the largest gain first, until one
is within the budget: the same set is found as if all had been measured. Gains of sets do not add up; `interactions`
says by how much each pair misses its sum.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from clampdown.errors import NotEnoughDataError

COSTED = 4
"""Sets whose cost is measured at once: they share a batch."""


@dataclass(frozen=True, slots=True)
class Clamps:
    """Features and the activations that they are clamped to, in raw units."""

    features: tuple[int, ...] = ()
    strengths: tuple[float, ...] = ()

    def scaled(self, factor: float) -> Clamps:
        return replace(self, strengths=tuple(factor * strength for strength in self.strengths))

    def joined(self, other: Clamps) -> Clamps:
        return Clamps(self.features + other.features, self.strengths + other.strengths)

    def only(self, features: Sequence[int]) -> Clamps:
        """The clamps of some of the features."""
        kept = [(f, s) for f, s in zip(self.features, self.strengths, strict=True) if f in features]
        return Clamps(tuple(f for f, _ in kept), tuple(s for _, s in kept))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What clamping gained and cost, in the units of the measure. Larger gains are better, smaller costs."""

    gain: float
    cost: float


@dataclass(frozen=True, slots=True)
class Tried:
    """Clamps and what they did."""

    clamps: Clamps
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Interaction:
    """A pair's gain minus the sum of its members' gains, all at the strengths of the set."""

    first: int
    second: int
    pair: float
    sum_of_parts: float

    @property
    def excess(self) -> float:
        return self.pair - self.sum_of_parts


@dataclass(frozen=True, slots=True)
class Round:
    """One round: what was in the pool, what was added and dropped, and the set after it."""

    pool: tuple[int, ...]
    added: tuple[int, ...]
    dropped: tuple[int, ...]
    best: Tried


@dataclass(frozen=True, slots=True)
class Limits:
    """`budget`: the cost that is allowed. `min_gain`: less is no gain. `multiples`: strengths that are tried. `sets`:
    how many sets the measure may have measured in all (None: any number); the pool's last are left out. `shares`: at
    which shares of their own strengths a set and a newcomer are joined."""

    budget: float
    min_gain: float
    max_size: int = 1
    max_rounds: int = 4
    multiples: tuple[float, ...] = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
    sets: int | None = None
    shares: tuple[tuple[float, float], ...] = ((0.9, 0.4), (0.7, 0.7))

    def left(self, measured: int) -> int | None:
        """How many more sets may be measured after so many."""
        return None if self.sets is None else max(0, self.sets - measured)


@dataclass(frozen=True, slots=True)
class Refined:
    """The set that is left, how it came about, and how its members act on each other."""

    best: Tried
    rounds: tuple[Round, ...]
    interactions: tuple[Interaction, ...]


Many = Callable[[Sequence[Clamps]], Sequence[float]]


@dataclass(slots=True)
class Measure:
    """What many sets gain, and what they cost, set by set. Larger gains are better, smaller costs. `measured` counts
    the sets whose gain was asked for."""

    gains: Many
    costs: Many
    measured: int = 0

    def gain(self, sets: Sequence[Clamps]) -> list[float]:
        self.measured += len(sets)
        return list(self.gains(sets))

    def cost(self, sets: Sequence[Clamps]) -> list[float]:
        return list(self.costs(sets))


Pool = Sequence[Clamps]
Rescore = Callable[[Clamps], Pool]
"""A new pool around what helps: single clamps, best first; features of the set may be among them."""


def refine(pool: Pool, measure: Measure, rescore: Rescore, limits: Limits) -> Refined:
    """Grow, prune and rescore until no round gains.

    Raises `NotEnoughDataError` when no candidate of the first pool gains anything within the budget.
    """
    best: Tried | None = None
    rounds: list[Round] = []
    for _ in range(limits.max_rounds):
        grown = grow(best, pool, measure, limits)
        if grown is None:
            break
        pruned = prune(grown, measure, limits)
        before = best.clamps.features if best else ()
        rounds.append(_round(pool, before, grown.clamps.features, pruned))
        gained = best is None or pruned.outcome.gain >= best.outcome.gain + limits.min_gain
        if not gained:
            break
        best = pruned
        pool = rescore(best.clamps)
    if best is None:
        raise NotEnoughDataError(
            "no candidate gains anything within the allowed cost", hint="allow a larger cost, or give other candidates"
        )
    return Refined(best, tuple(rounds), interactions(best.clamps, measure))


def _round(pool: Pool, before: tuple[int, ...], grown: tuple[int, ...], pruned: Tried) -> Round:
    left = pruned.clamps.features
    return Round(
        pool=tuple(candidate.features[0] for candidate in pool),
        added=tuple(f for f in grown if f not in before and f in left),
        dropped=tuple(f for f in grown if f not in left),
        best=pruned,
    )


def grow(start: Tried | None, pool: Pool, measure: Measure, limits: Limits) -> Tried | None:
    """Greedy forward selection: join the candidate that gains most, until the set is full or nothing gains.

    With a full set a candidate may take the place of a member. None when there was nothing and nothing gains.
    """
    best = start
    while True:
        joined = _joined(best.clamps if best else Clamps(), pool, limits)
        found = optimise(joined, measure, limits)
        needed = limits.min_gain + (best.outcome.gain if best else 0.0)
        if found is None or found.outcome.gain < needed:
            return best
        best = found


def _joined(current: Clamps, pool: Pool, limits: Limits) -> list[Clamps]:
    """Every candidate joined to the set, at each share; in a full set, in place of each member."""
    fresh = [candidate for candidate in pool if candidate.features[0] not in current.features]
    if not current.features:
        return fresh
    if len(current.features) < limits.max_size:
        return [current.scaled(a).joined(c.scaled(b)) for c in fresh for a, b in limits.shares]
    stays = [current.only([f for f in current.features if f != gone]) for gone in current.features]
    return [rest.joined(candidate) for candidate in fresh for rest in stays]


def optimise(sets: Sequence[Clamps], measure: Measure, limits: Limits) -> Tried | None:
    """The set and multiple of its strengths with the largest gain within the budget; None when none gains."""
    tried = [clamps.scaled(multiple) for clamps in sets for multiple in limits.multiples]
    best = _best(tried[: limits.left(measure.measured)], measure, limits.budget)
    if best is None:
        return None
    closer = _best([best.clamps.scaled(multiple) for multiple in (0.93, 1.07)], measure, limits.budget)
    return closer if closer and closer.outcome.gain > best.outcome.gain else best


def _best(sets: Sequence[Clamps], measure: Measure, budget: float) -> Tried | None:
    """The set with the largest positive gain whose cost is within the budget."""
    if not sets:
        return None
    gains = measure.gain(sets)
    order = sorted((i for i, gain in enumerate(gains) if gain > 0), key=lambda i: -gains[i])
    for start in range(0, len(order), COSTED):
        some = order[start : start + COSTED]
        for i, cost in zip(some, measure.cost([sets[i] for i in some]), strict=True):
            if cost <= budget:
                return Tried(sets[i], Outcome(gains[i], cost))
    return None


def prune(current: Tried, measure: Measure, limits: Limits) -> Tried:
    """Drop, one at a time, the feature whose removal (strengths found anew) loses less than `min_gain`."""
    best = current
    while len(best.clamps.features) > 1:
        features = best.clamps.features
        fewer = [best.clamps.only([f for f in features if f != gone]) for gone in features]
        found = optimise(fewer, measure, limits)
        if found is None or found.outcome.gain <= best.outcome.gain - limits.min_gain:
            return best
        best = found
    return best


def interactions(clamps: Clamps, measure: Measure) -> tuple[Interaction, ...]:
    """Every pair against the sum of its parts."""
    pairs = list(itertools.combinations(clamps.features, 2))
    if not pairs:
        return ()
    sets = [clamps.only([f]) for f in clamps.features] + [clamps.only(pair) for pair in pairs]
    gains = measure.gain(sets)
    alone = dict(zip(clamps.features, gains, strict=False))
    together = gains[len(clamps.features) :]
    return tuple(Interaction(a, b, gain, alone[a] + alone[b]) for (a, b), gain in zip(pairs, together, strict=True))
