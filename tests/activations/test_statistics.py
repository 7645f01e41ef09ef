"""Mergeable moments: any split of the prompts, merged in any order, is one pass."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.sparse import csr_array

from clampdown.activations.statistics import Moments, ResidualMean

FEATURES = 6
ACTIVATIONS = st.one_of(st.just(0.0), st.floats(2**-10, 1024, width=32))
matrices = st.integers(1, 25).flatmap(lambda n: arrays(np.float32, (n, FEATURES), elements=ACTIVATIONS))


def assert_same(found: Moments, expected: Moments) -> None:
    """To the last bit."""
    assert found.count == expected.count
    np.testing.assert_array_equal(found.max, expected.max)
    np.testing.assert_array_equal(found.n_active, expected.n_active)
    np.testing.assert_array_equal(found.mean, expected.mean)
    np.testing.assert_array_equal(found.m2, expected.m2)


@given(matrices)
def test_moments_are_numpys(dense):
    moments = Moments.of(csr_array(dense))
    exact = dense.astype(np.float64)
    np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, exact.var(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(moments.max, exact.max(0))
    np.testing.assert_allclose(moments.firing_rate, (exact > 0).mean(0))


@given(matrices, st.lists(st.integers(0, 25), max_size=4), st.randoms(use_true_random=False))
def test_merging_shards_is_one_pass(dense, cuts, rng):
    shards = np.split(dense, sorted(min(cut, len(dense)) for cut in cuts))
    rng.shuffle(shards)
    merged = Moments.empty(FEATURES)
    for shard in shards:
        merged = merged.merge(Moments.of(csr_array(shard)))
    assert_same(merged, Moments.of(csr_array(dense)))


@given(matrices)
def test_merging_with_nothing_changes_nothing(dense):
    moments = Moments.of(csr_array(dense))
    assert_same(moments.merge(Moments.empty(FEATURES)), moments)
    assert_same(Moments.empty(FEATURES).merge(moments), moments)


def test_no_observations_have_no_spread_and_never_fire():
    empty = Moments.of(csr_array((0, FEATURES)))
    assert empty.count == 0
    assert not empty.variance.any()
    assert not empty.firing_rate.any()


def test_a_stored_zero_is_not_active():
    stored = csr_array((np.array([0.0, 2.0]), np.array([0, 0]), np.array([0, 1, 2])), shape=(2, 1))
    moments = Moments.of(stored)
    assert moments.n_active.tolist() == [1]
    assert moments.variance.tolist() == [1.0]


@given(arrays(np.float32, (9, 4), elements=st.floats(-100, 100, width=32)), st.integers(0, 9))
def test_residual_means_merge(residual, cut):
    parts = [part for part in (residual[:cut], residual[cut:]) if len(part)]
    merged = ResidualMean.empty(4)
    for part in parts:
        merged = merged.merge(ResidualMean.of(part))
    assert merged.count == 9
    np.testing.assert_allclose(merged.mean, residual.astype(np.float64).mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(merged.mean_norm, np.linalg.norm(residual.astype(np.float64), axis=1).mean())
