"""Refinement on worlds whose best set is known: gains that add, saturate and fight each other, and costs that bind."""

from __future__ import annotations

import itertools

import pytest

from clampdown.discovery.refine import Clamps, Limits, Measure, Outcome, grow, interactions, optimise, prune, refine
from clampdown.errors import NotEnoughDataError

WEIGHTS = {1: 2.0, 2: 1.5, 3: 0.1, 4: -1.0, 5: 3.0}


def world(clamps):
    """Each strength gains its weight with a peak at 1; 1 and 2 hold 1.0 in common; cost is the squared length."""
    gain = sum(WEIGHTS.get(f, 0) * s * (2 - s) for f, s in zip(clamps.features, clamps.strengths, strict=True))
    if {1, 2} <= set(clamps.features):
        gain -= 1.0
    return Outcome(gain, sum(s * s for s in clamps.strengths))


measure = Measure(
    lambda sets: [world(clamps).gain for clamps in sets], lambda sets: [world(clamps).cost for clamps in sets]
)


def single(*features):
    return [Clamps((f,), (1.0,)) for f in features]


def no_more(_clamps):
    return []


def test_the_strength_that_gains_most_is_found_and_the_budget_is_kept():
    free = refine(single(1), measure, no_more, Limits(budget=9.0, min_gain=0.01))
    assert free.best.clamps.strengths[0] == pytest.approx(1.0, abs=0.08)
    tight = refine(single(1), measure, no_more, Limits(budget=0.3, min_gain=0.01))
    assert tight.best.outcome.cost <= 0.3
    assert 0.4 < tight.best.clamps.strengths[0] < 0.55


def test_the_best_single_is_the_best_of_all():
    found = refine(single(1, 2, 3, 4), measure, no_more, Limits(budget=9.0, min_gain=0.01))
    assert found.best.clamps.features == (1,)
    assert found.interactions == ()


def test_a_set_grows_while_it_gains_and_not_by_what_does_not_help():
    found = refine(single(4, 3, 2, 1), measure, no_more, Limits(budget=9.0, min_gain=0.2, max_size=3))
    assert set(found.best.clamps.features) == {1, 2}
    alone = max(world(c).gain for c in single(1, 2, 3, 4))
    assert found.best.outcome.gain > alone + 0.2


@pytest.mark.parametrize("budget", [0.05, 0.3, 1.0, 3.0])
def test_what_cannot_be_chosen_is_not_costed_and_the_choice_is_that_of_measuring_all(budget):
    """Among sets of every sign of gain, at budgets that turn away some or most."""
    costed = []

    def cost(sets):
        costed.extend(sets)
        return [world(clamps).cost for clamps in sets]

    limits = Limits(budget, min_gain=0.01, multiples=(0.2, 0.5, 1.0, 1.7, 2.5))
    found = optimise(single(1, 2, 3, 4, 5), Measure(measure.gain, cost), limits)
    every = [c.scaled(m) for c in single(1, 2, 3, 4, 5) for m in limits.multiples]
    first = max((c for c in every if world(c).cost <= budget), key=lambda c: world(c).gain)
    best = max((c for c in (first, first.scaled(0.93), first.scaled(1.07)) if world(c).cost <= budget),
               key=lambda c: world(c).gain)  # fmt: skip
    assert found.clamps == best
    assert found.outcome == world(best)
    assert all(world(clamps).gain > 0 for clamps in costed)
    assert len(costed) < len(every)


@pytest.mark.parametrize("sets", [0, 1, 5, 23, 100, 10**6])
def test_a_search_measures_no_more_sets_than_it_may(sets):
    seen = []

    def gain(some):
        seen.extend(some)
        return measure.gain(some)

    def search():
        limits = Limits(9.0, min_gain=0.01, max_size=2, sets=sets)
        return refine(single(3, 2, 1), Measure(gain, measure.cost), lambda _: single(3, 2, 1, 5), limits)

    if sets == 0:
        with pytest.raises(NotEnoughDataError):
            search()
        return
    found = search()
    closer_and_pairs = 2 * (2 + 3)
    assert len(seen) <= sets + closer_and_pairs
    if sets == 10**6:
        unlimited = refine(single(3, 2, 1), measure, lambda _: single(3, 2, 1, 5), Limits(9.0, 0.01, max_size=2))
        assert found == unlimited


@pytest.mark.parametrize("sets", [0, 1, 2, 4])
def test_the_limit_holds_for_a_step_by_itself(sets):
    """Not for `refine` alone: whoever calls `optimise` with a limit gets it, whatever measured before."""
    limits = Limits(9.0, min_gain=0.01, multiples=(0.5, 1.0), sets=sets)
    mine = Measure(measure.gains, measure.costs)
    found = optimise(single(4, 1), mine, limits)
    assert (found is not None) == (sets == 4), "only 1, which comes second, gains"
    assert mine.measured == sets + (2 if found else 0), "two more, closer to the best, are always tried"
    assert optimise(single(1), mine, limits) is None, "the count goes on"


def test_interactions_are_the_pair_minus_its_parts():
    clamps = Clamps((1, 2, 5), (1.0, 0.8, 0.5))
    found = {(i.first, i.second): i for i in interactions(clamps, measure)}
    for pair in itertools.combinations((1, 2, 5), 2):
        parts = sum(world(clamps.only([f])).gain for f in pair)
        assert found[pair].excess == pytest.approx(world(clamps.only(pair)).gain - parts)
    assert found[1, 2].excess == pytest.approx(-1.0)
    assert found[1, 5].excess == pytest.approx(0.0)


def test_rescoring_brings_in_what_the_first_pool_lacked():
    """Feature 5 is found only by looking around feature 1."""
    asked = []

    def around(clamps):
        asked.append(clamps.features)
        return single(5) if 1 in clamps.features else []

    found = refine(single(1, 3), measure, around, Limits(budget=9.0, min_gain=0.1))
    assert found.best.clamps.features == (5,)
    assert asked[0] == (1,)
    assert [r.added for r in found.rounds[:2]] == [(1,), (5,)]
    gains = [r.best.outcome.gain for r in found.rounds]
    assert gains == sorted(gains)


def test_what_does_not_help_is_dropped():
    limits = Limits(budget=9.0, min_gain=0.15, max_size=3)
    start = Clamps((1, 3, 2), (1.0, 1.0, 1.0))
    pruned = prune(_tried(start), measure, limits)
    assert set(pruned.clamps.features) == {1, 2}


def test_rounds_end_when_validation_gains_nothing():
    """Noise that grows by less than `min_gain` each round must not go on for ever."""
    found = refine(single(1), measure, lambda c: single(1, 3), Limits(budget=9.0, min_gain=0.2, max_rounds=50))
    assert len(found.rounds) <= 2


def test_nothing_gains():
    limits = Limits(budget=9.0, min_gain=0.1)
    assert grow(None, single(4), measure, limits) is None
    with pytest.raises(NotEnoughDataError):
        refine(single(4), measure, no_more, limits)
    with pytest.raises(NotEnoughDataError):
        refine(single(1), measure, no_more, Limits(budget=1e-6, min_gain=0.1))


def _tried(clamps):
    from clampdown.discovery.refine import Tried

    return Tried(clamps, world(clamps))
