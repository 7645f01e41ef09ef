"""The gate's guarantee is the exact binomial one, and it holds over repeated calibrations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.stats import binomtest, norm
from sklearn.metrics import roc_auc_score

from clampdown.errors import NotEnoughDataError
from clampdown.steering.gates import choose_threshold, fit_probe, prompts_needed, provable_budget, upper_bound


@given(n=st.integers(1, 400), share=st.floats(0, 1), confidence=st.sampled_from([0.9, 0.95, 0.99]))
def test_upper_bound_is_clopper_pearson(n: int, share: float, confidence: float) -> None:
    k = round(share * n)
    interval = binomtest(k, n, alternative="less").proportion_ci(confidence, method="exact")
    assert upper_bound(k, n, confidence) == pytest.approx(interval.high, abs=1e-9)


@given(scores=st.lists(st.integers(-20, 20), min_size=120, max_size=200), budget=st.floats(0.03, 0.3))
def test_threshold_is_the_lowest_that_the_bound_allows(scores: list[int], budget: float) -> None:
    threshold, guarantee = choose_threshold(scores, budget=budget)
    assert guarantee.triggered == sum(s > threshold for s in scores)
    assert guarantee.bound == pytest.approx(upper_bound(guarantee.triggered, len(scores), 0.95))
    assert guarantee.bound <= budget
    lower = [s for s in set(scores) if s < threshold]
    if lower:
        assert upper_bound(sum(s > max(lower) for s in scores), len(scores), 0.95) > budget


@given(n=st.integers(2, 5000), confidence=st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_what_n_prompts_can_prove_they_prove(n: int, confidence: float) -> None:
    """Rounding asked for 131 prompts where 130 were said to be enough."""
    budget = provable_budget(n, confidence)
    _, guarantee = choose_threshold(np.arange(n, dtype=float), budget=budget, confidence=confidence)
    assert guarantee.bound <= budget
    assert prompts_needed(budget * 0.999, confidence) > n


def test_too_few_prompts_name_the_number_that_would_do() -> None:
    needed = prompts_needed(0.01, 0.95)
    assert needed == 299
    with pytest.raises(NotEnoughDataError, match="298 benign") as caught:
        choose_threshold(np.arange(needed - 1), budget=0.01)
    assert caught.value.hint and "299" in caught.value.hint
    assert choose_threshold(np.arange(needed), budget=0.01)[1].triggered == 0


def test_the_guarantee_holds_over_resampled_calibration_sets() -> None:
    """Scores are standard normal, so the true trigger rate of any threshold is known."""
    rng = np.random.default_rng(0)
    budget, confidence, draws = 0.05, 0.9, 1000
    exceeded = sum(
        norm.sf(choose_threshold(rng.standard_normal(300), budget=budget, confidence=confidence)[0]) > budget
        for _ in range(draws)
    )
    assert binomtest(exceeded, draws, 1 - confidence, alternative="greater").pvalue > 1e-3
    assert exceeded > draws * (1 - confidence) * 0.3, "a bound this loose would waste the budget"


def test_probe_finds_the_features_and_poolings_that_separate() -> None:
    rng = np.random.default_rng(1)
    harmful = np.arange(400) % 2 == 0
    peak, start = rng.exponential(1.0, (2, 400, 50)) * (rng.random((2, 400, 50)) < 0.2)
    peak[harmful, 7] += 3.0
    start[~harmful, 21] += 3.0
    pooled = {"max": csr_array(peak), "assistant_start": csr_array(start)}
    probe = fit_probe(pooled, harmful, max_features=4)
    weights = dict(zip(zip(probe.poolings, probe.features, strict=True), probe.weights, strict=True))
    assert len(weights) <= 4
    assert weights["max", 7] > 0 > weights["assistant_start", 21]
    scores = probe.scores(pooled)
    by_hand = probe.bias + sum(
        w * (peak if name == "max" else start)[:, feature] for (name, feature), w in weights.items()
    )
    np.testing.assert_allclose(scores, by_hand)
    assert roc_auc_score(harmful, scores) > 0.99


def test_a_probe_needs_both_kinds() -> None:
    with pytest.raises(NotEnoughDataError, match="both"):
        fit_probe({"max": csr_array(np.ones((4, 3)))}, np.array([True] * 4))
