"""Comparing rankings, against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from clampdown.discovery.agreement import compare_sets, counterparts
from clampdown.errors import FeatureSetError, NotEnoughDataError
from clampdown.types import FeatureSet, Provenance, ScoreColumns


def of(finder: str, values: np.ndarray) -> FeatureSet:
    provenance = Provenance("m", "r", "s", "p", "0", 0)
    return FeatureSet(finder, "blocks.0.hook_resid_post", "x", (), provenance, {}, ScoreColumns({"x": values}))


def test_rank_correlation_and_overlap_over_what_both_know():
    rng = np.random.default_rng(0)
    a = rng.normal(size=200).round(1)
    b = a + rng.normal(size=200)
    b[:20] = np.nan
    found = compare_sets(of("a", a), of("b", b), ("x", "x"))
    assert found.n == 180
    assert found.spearman == pytest.approx(spearmanr(a[20:], b[20:]).statistic)
    best = set(np.argsort(-a, kind="stable")[:50]) & set(np.argsort(-np.nan_to_num(b, nan=-99), kind="stable")[:50])
    assert found.overlap[50] == len(best) / 50
    assert found.without_counterpart == 0


def test_biggest_movers_are_measured_by_ratio():
    a = np.arange(100, 0, -1.0)
    b = a.copy()
    b[[0, 9]] = b[[9, 0]]  # places 1 and 10
    b[[60, 90]] = b[[90, 60]]
    movers = compare_sets(of("a", a), of("b", b), ("x", "x")).movers
    assert [(m.feature, m.places) for m in movers] == [(0, (1, 10)), (9, (10, 1)), (60, (61, 91)), (90, (91, 61))]


def test_features_of_two_saes_are_matched_by_their_decoder_rows():
    rng = np.random.default_rng(1)
    first = rng.normal(size=(30, 64))
    shuffle = rng.permutation(30)
    second = np.concatenate([2 * first[shuffle] + 0.1 * rng.normal(size=(30, 64)), rng.normal(size=(5, 64))])
    first = np.concatenate([first, rng.normal(size=(3, 64))])
    matched = counterparts(first, second)
    assert matched == {int(f): i for i, f in enumerate(shuffle)}
    a = rng.normal(size=33)
    b = np.append(a[shuffle], [9.0] * 5)
    found = compare_sets(of("a", a), of("b", b), ("x", "x"), matched)
    assert found.spearman == pytest.approx(1.0)
    assert found.without_counterpart == 3


def test_what_cannot_be_compared():
    flat = of("flat", np.ones(10))
    assert compare_sets(flat, flat, ("x", "x")).spearman is None
    with pytest.raises(NotEnoughDataError, match="three"):
        compare_sets(flat, of("b", np.array([1.0, 2.0] + [np.nan] * 8)), ("x", "x"))
    with pytest.raises(FeatureSetError, match="it has: x"):
        compare_sets(flat, flat, ("x", "y"))
