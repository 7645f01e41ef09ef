"""The paired test against scipy, and its behaviour when nothing is there to find."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.stats import false_discovery_control, kstest, wilcoxon

from clampdown.discovery.pairs import pair_by_id, signed_rank
from clampdown.errors import PromptSetError


def sparse_pairs(seed, n=20, features=9):
    """Few distinct values, so many ties and many pairs without a difference; one feature that never fires."""
    rng = np.random.default_rng(seed)
    sides = [rng.integers(0, 6, (n, features)) * (rng.random((n, features)) < 0.6) for _ in range(2)]
    for side in sides:
        side[:, 0] = 0
    return [side.astype(np.float32) for side in sides]


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(8, 40))
def test_p_values_are_scipys(seed, n):
    plain, wrapped = sparse_pairs(seed, n)
    found = signed_rank(csr_array(plain), csr_array(wrapped))
    for f in range(1, plain.shape[1]):
        difference = (plain[:, f] - wrapped[:, f]).astype(np.float64)
        if not difference.any():
            continue
        expected = wilcoxon(difference, zero_method="wilcox", correction=False, method="asymptotic")
        assert found.p_value[f] == pytest.approx(expected.pvalue)
        assert found.mean_drop[f] == pytest.approx(difference.mean())
        reverse = wilcoxon(difference, alternative="greater", method="asymptotic").pvalue < 0.5
        assert (found.z[f] > 0) == reverse or found.z[f] == pytest.approx(0)
    np.testing.assert_allclose(found.q_value, false_discovery_control(found.p_value))
    assert (found.z[0], found.p_value[0]) == (0.0, 1.0)


def test_p_values_are_uniform_when_labels_are_shuffled():
    """Exchange the members of each pair at random: no wrapper has an effect any more."""
    rng = np.random.default_rng(1)
    sides = rng.exponential(1, (2, 300, 1500)) * (rng.random((2, 300, 1500)) < 0.8)
    sides[1] *= 0.5
    swap = rng.random((300, 1)) < 0.5
    plain, wrapped = np.where(swap, sides[1], sides[0]), np.where(swap, sides[0], sides[1])
    assert signed_rank(csr_array(sides[0]), csr_array(sides[1])).q_value.max() < 0.05
    found = signed_rank(csr_array(plain), csr_array(wrapped))
    assert kstest(found.p_value, "uniform").pvalue > 0.01
    assert found.q_value.min() > 0.05


def test_many_columns_in_chunks(monkeypatch):
    plain, wrapped = (csr_array(side) for side in sparse_pairs(3, features=50))
    whole = signed_rank(plain, wrapped)
    monkeypatch.setattr("clampdown.discovery.pairs._COLUMNS", 7)
    np.testing.assert_array_equal(signed_rank(plain, wrapped).z, whole.z)


def test_pairs_are_found_by_id(harmful):
    wrapped = [dataclasses.replace(prompt, suite="jailbroken") for prompt in harmful[4:1:-1]]
    pairs = pair_by_id(harmful, wrapped)
    assert [pair.plain for pair in pairs] == [harmful[4], harmful[3], harmful[2]]
    with pytest.raises(PromptSetError, match="no harmful prompt"):
        pair_by_id(harmful[:2], wrapped)
    with pytest.raises(ValueError, match="match"):
        signed_rank(csr_array((2, 3)), csr_array((3, 3)))
