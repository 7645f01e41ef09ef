"""AUROC, Mann-Whitney, d' and Benjamini-Hochberg against scipy and scikit-learn, one feature at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.stats import false_discovery_control, kstest, mannwhitneyu
from sklearn.metrics import roc_auc_score

from clampdown.activations.statistics import Moments
from clampdown.discovery.separation import d_prime, separate


def sparse_sets(seed: int, n_a: int = 17, n_b: int = 23, features: int = 12):
    """Few distinct values (many ties), many zeros, one dead and one constant feature."""
    rng = np.random.default_rng(seed)
    sets = [rng.integers(0, 5, (n, features)) * (rng.random((n, features)) < 0.6) for n in (n_a, n_b)]
    for dense in sets:
        dense[:, 0], dense[:, 1] = 0, 3
    return [dense.astype(np.float32) for dense in sets]


@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 20))
def test_auroc_and_p_are_scipys_and_sklearns(seed, n_a, n_b):
    first, second = sparse_sets(seed, n_a, n_b)
    found = separate(csr_array(first), csr_array(second))
    labels = np.r_[np.ones(n_a), np.zeros(n_b)]
    for f in range(first.shape[1]):
        values = np.r_[first[:, f], second[:, f]]
        assert found.auroc[f] == pytest.approx(roc_auc_score(labels, values))
        expected = mannwhitneyu(first[:, f], second[:, f], method="asymptotic").pvalue if np.ptp(values) else 1.0
        assert found.p_value[f] == pytest.approx(expected)


@given(st.integers(0, 10_000))
def test_q_values_are_benjamini_and_hochbergs(seed):
    first, second = sparse_sets(seed, features=40)
    found = separate(csr_array(first), csr_array(second))
    m = len(found.p_value)
    order = np.argsort(found.p_value)
    stepped = found.p_value[order] * m / np.arange(1, m + 1)
    expected = np.empty(m)
    expected[order] = np.minimum.accumulate(stepped[::-1])[::-1].clip(max=1)
    np.testing.assert_allclose(found.q_value, expected)
    np.testing.assert_allclose(found.q_value, false_discovery_control(found.p_value))


def test_p_values_are_uniform_under_shuffled_labels():
    rng = np.random.default_rng(3)
    dense = (rng.exponential(1, (400, 1500)) * (rng.random((400, 1500)) < 0.7)).astype(np.float32)
    found = separate(csr_array(dense[:200]), csr_array(dense[200:]))
    assert kstest(found.p_value, "uniform").pvalue > 0.01
    assert found.q_value.min() > 0.05


def test_dead_and_constant_features_separate_nothing():
    first, second = sparse_sets(0)
    found = separate(csr_array(first), csr_array(second))
    assert found.auroc[:2].tolist() == [0.5, 0.5]
    assert found.p_value[:2].tolist() == [1.0, 1.0]
    assert np.isnan(d_prime(Moments.of(csr_array(first)), Moments.of(csr_array(second)))[:2]).all()


def test_a_feature_that_fires_on_one_side_only_is_perfect():
    first, second = np.zeros((10, 3), np.float32), np.zeros((30, 3), np.float32)
    first[:, 0] = np.arange(1, 11)
    second[:, 1] = np.arange(1, 31)
    found = separate(csr_array(first), csr_array(second))
    assert found.auroc.tolist() == [1.0, 0.0, 0.5]


def test_nothing_fires_at_all():
    found = separate(csr_array((4, 3)), csr_array((5, 3)))
    assert found.auroc.tolist() == [0.5] * 3
    assert found.q_value.tolist() == [1.0] * 3


def test_a_stored_zero_is_a_zero():
    stored = csr_array((np.array([0.0, 2.0]), np.array([0, 0]), np.array([0, 1, 2])), shape=(2, 1))
    other = csr_array(np.array([[0.0], [1.0]]))
    assert separate(stored, other).auroc[0] == pytest.approx(roc_auc_score([1, 1, 0, 0], [0, 2, 0, 1]))


@given(st.integers(0, 10_000))
def test_d_prime_is_the_difference_in_pooled_standard_deviations(seed):
    first, second = sparse_sets(seed)
    found = d_prime(Moments.of(csr_array(first)), Moments.of(csr_array(second)))
    a, b = first.astype(np.float64), second.astype(np.float64)
    pooled = ((len(a) - 1) * a.var(0, ddof=1) + (len(b) - 1) * b.var(0, ddof=1)) / (len(a) + len(b) - 2)
    varies = pooled > 0
    np.testing.assert_allclose(found[varies], ((a.mean(0) - b.mean(0))[varies] / np.sqrt(pooled[varies])), rtol=1e-9)
