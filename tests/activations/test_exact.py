"""Exact sums against fractions, in any order and any grouping."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from clampdown.activations.exact import ExactSums
from clampdown.activations.statistics import Moments

CHANNELS = 3
FLOATS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.floats(-1e100, 1e100, allow_nan=False),
)
ENTRIES = st.lists(st.tuples(st.integers(0, CHANNELS - 1), FLOATS), max_size=12)


def sums_of(entries):
    columns = np.array([column for column, _ in entries], dtype=np.int32)
    return ExactSums.of(columns, np.array([value for _, value in entries], dtype=np.float64), CHANNELS)


def as_fractions(sums):
    unit = sums.lowest_unit
    return [int(n) * Fraction(2) ** unit for n in sums.integers(unit, np.arange(CHANNELS))]


@given(ENTRIES)
def test_sums_are_those_of_fractions(entries):
    expected = [sum((Fraction(v) for c, v in entries if c == column), Fraction(0)) for column in range(CHANNELS)]
    assert as_fractions(sums_of(entries)) == expected


@given(ENTRIES, st.integers(0, 12), st.randoms(use_true_random=False))
def test_order_and_grouping_leave_no_trace(entries, cut, rng):
    shuffled = list(entries)
    rng.shuffle(shuffled)
    merged = sums_of(shuffled[cut:]).merge(sums_of(shuffled[:cut]))
    assert as_fractions(merged) == as_fractions(sums_of(entries))


def test_the_sum_that_floats_lose():
    values = np.array([2.0**60, 1.0, -(2.0**60)])
    assert as_fractions(ExactSums.of(np.zeros(3, dtype=np.int32), values, CHANNELS))[0] == 1


def test_the_variance_that_floats_lose():
    """Values that agree in all but the last bit: the sum of squares in float64 has no digit of the variance left."""
    column = np.array([[1.0], [1.0 + 2.0**-23]] * 500, dtype=np.float32) * np.float32(2.0**20)
    assert Moments.of(csr_array(column)).variance[0] == 2.0**-8
