"""Intervals and tests against enumeration, simulation, published examples and scipy where it has the function."""

from __future__ import annotations

from itertools import product
from math import comb, factorial, hypot, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, false_discovery_control, norm, ttest_1samp

from clampdown.evaluation import intervals
from clampdown.types import Interval

Z = float(norm.ppf(0.975))
p_values = st.lists(st.none() | st.floats(0, 1, allow_subnormal=False), max_size=12)


@given(p_values)
def test_q_values_by_their_definition(ps: list[float | None]) -> None:
    """q of a test: the smallest p_(j) m / j over all tests at least as far down the ranking."""
    known = sorted(p for p in ps if p is not None)
    for p, q in zip(ps, intervals.benjamini_hochberg(ps), strict=True):
        if p is None:
            assert q is None
        else:
            assert q == pytest.approx(min(1.0, *(len(known) * x / j for j, x in enumerate(known, 1) if x >= p), 1.0))
    assert [q for q in intervals.benjamini_hochberg(known)] == pytest.approx(
        false_discovery_control(known).tolist() if known else []
    )


@given(st.integers(0, 8), st.integers(0, 8))
def test_mcnemar_by_counting_all_outcomes(gained: int, lost: int) -> None:
    """Under the null each discordant pair falls either way: count the outcomes that are no likelier than this one."""
    n = gained + lost
    if n == 0:
        assert intervals.mcnemar(0, 0) is None
        return
    extreme = sum(comb(n, sum(way)) <= comb(n, gained) for way in product((0, 1), repeat=n))
    assert intervals.mcnemar(gained, lost) == pytest.approx(extreme / 2**n)


def paired_coverage(p_up: float, p_down: float, n: int) -> float:
    """Exact: every possible (gained, lost) with its trinomial probability."""
    covered = 0.0
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            rest = n - gained - lost
            ways = factorial(n) / (factorial(gained) * factorial(lost) * factorial(rest))
            found = intervals.paired_difference(gained, lost, n)
            if (found.low or 0) <= p_up - p_down <= (found.high or 0):
                covered += ways * p_up**gained * p_down**lost * (1 - p_up - p_down) ** rest
    return covered


@pytest.mark.parametrize(("p_up", "p_down"), [(0.3, 0.1), (0.05, 0.05), (0.5, 0.01), (0.0, 0.0), (0.15, 0.0)])
def test_the_paired_interval_covers_as_often_as_stated(p_up: float, p_down: float) -> None:
    assert 0.935 <= paired_coverage(p_up, p_down, 20) <= 1.0


def test_the_paired_interval_turns_round_with_the_arms_and_has_a_width_when_nothing_differs() -> None:
    one, other = intervals.paired_difference(7, 2, 30), intervals.paired_difference(2, 7, 30)
    assert (one.low, one.high) == pytest.approx((-(other.high or 0), -(other.low or 0)))
    up, down = 8 / 32, 3 / 32
    half = Z * sqrt((up + down - (up - down) ** 2) / 32)
    assert (one.value, one.low, one.high) == pytest.approx((5 / 30, up - down - half, up - down + half))
    same = intervals.paired_difference(0, 0, 20)
    assert same.value == 0.0
    assert -0.15 < (same.low or 0) < 0 < (same.high or 0) < 0.15
    with pytest.raises(ValueError, match="out of 3"):
        intervals.paired_difference(2, 2, 3)


def test_the_unpaired_difference_is_newcombes_published_example() -> None:
    """56/70 against 48/80: 0.0524 to 0.3339 (Newcombe 1998, table II, method 10)."""
    found = intervals.unpaired_difference(intervals.wilson(56, 70), intervals.wilson(48, 80))
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    a, b = intervals.wilson(56, 70), intervals.wilson(48, 80)
    assert found.low == pytest.approx(0.2 - hypot(0.8 - (a.low or 0), (b.high or 0) - 0.6))
    assert intervals.unpaired_difference(intervals.NO_DATA, a) == Interval(None, None, None, 0)


@given(st.lists(st.booleans(), min_size=5, max_size=40), st.integers(2, 6))
def test_a_cluster_of_copies_says_no_more_than_one_of_them(flags: list[bool], copies: int) -> None:
    """Ten paraphrases that always fare alike are one observation: the interval may not shrink with them."""
    clusters = list(range(len(flags)))
    alone = intervals.clustered(flags, clusters)
    assert alone == intervals.wilson(sum(flags), len(flags))
    twice = intervals.clustered(flags * 2, clusters * 2)
    often = intervals.clustered(flags * copies, clusters * copies)
    assert (often.low, often.high) == pytest.approx((twice.low, twice.high))
    assert (often.low or 0) <= (alone.low or 0) + 1e-12 and (often.high or 1) >= (alone.high or 1) - 1e-12
    assert often.n == copies * len(flags)


def test_the_clustered_interval_covers_where_the_plain_one_does_not() -> None:
    """Beta-binomial clusters: 30 objectives of 8 attempts that share their luck."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(30), 8).tolist()
    hits = {"clustered": 0, "plain": 0}
    for _ in range(300):
        flags = (rng.random(240) < np.repeat(rng.beta(1.2, 2.8, 30), 8)).tolist()
        found = {"clustered": intervals.clustered(flags, clusters), "plain": intervals.wilson(sum(flags), 240)}
        for name, interval in found.items():
            hits[name] += (interval.low or 0) <= 0.3 <= (interval.high or 1)
    assert 0.92 <= hits["clustered"] / 300 <= 0.98
    assert hits["plain"] / 300 < 0.8


@pytest.mark.parametrize("ones", [3, 12, 27])
def test_the_bootstrap_of_zeros_and_ones_is_the_binomial_distribution(ones: int) -> None:
    """All n^n samples at once: the mean of a resample of `ones` ones among 30 is binomial."""
    found = intervals.paired_bootstrap([0.0] * 30, [1.0] * ones + [0.0] * (30 - ones))
    exact = binom.ppf([0.025, 0.975], 30, ones / 30) / 30
    assert (found.low, found.high) == pytest.approx(exact.tolist(), abs=1 / 30 + 1e-9)


def test_pairs_of_one_cluster_are_drawn_together() -> None:
    """Four copies of each pair, clustered, are the bootstrap of the single pairs."""
    scores = np.random.default_rng(2).normal(size=25).tolist()
    alone = intervals.paired_bootstrap([0.0] * 25, scores)
    copied = intervals.paired_bootstrap([0.0] * 100, scores * 4, clusters=[*range(25)] * 4)
    apart = intervals.paired_bootstrap([0.0] * 100, scores * 4)
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))
    assert (apart.high or 0) - (apart.low or 0) < 0.6 * ((alone.high or 0) - (alone.low or 0))


def test_twins_are_drawn_together() -> None:
    """One harmful and one benign prompt per objective: the difference of rates is the mean of paired differences."""
    rng = np.random.default_rng(3)
    harmful, benign = (rng.random(40) < 0.9).tolist(), (rng.random(40) < 0.2).tolist()
    twins = intervals.clustered_bootstrap(harmful + benign, [True] * 40 + [False] * 40, [*range(40)] * 2)
    pairs = intervals.paired_bootstrap([float(b) for b in benign], [float(h) for h in harmful])
    assert (twins.value, twins.low, twins.high) == pytest.approx((pairs.value, pairs.low, pairs.high))
    assert twins.n == 40


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30).filter(lambda v: np.std(v) > 1e-6))
def test_the_interval_of_a_mean_is_scipys(values: list[float]) -> None:
    found = intervals.mean_interval(values)
    expected = ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-6, abs=1e-6)


def test_too_little_data_has_no_bounds_and_none_at_all_no_value() -> None:
    nothing = Interval(None, None, None, 0)
    assert intervals.clustered([], []) == intervals.paired_difference(0, 0, 0) == intervals.mean_interval([]) == nothing
    assert intervals.clustered_bootstrap([True], [True], [0]) == nothing
    assert intervals.benjamini_hochberg([None, None]) == (None, None)
    assert intervals.mean_interval([3.0]) == Interval(3.0, None, None, 1)
    few = intervals.clustered([True] * 8, [0, 0, 1, 1, 2, 2, 3, 3])
    assert (few.value, few.low, few.high, few.n) == (1.0, None, None, 8)
    nine = intervals.paired_bootstrap([0.0] * 9, [1.0] * 9)
    assert (nine.value, nine.low, nine.high) == (1.0, None, None)
    assert intervals.paired_bootstrap([0.0] * 10, [1.0] * 10).low == 1.0
