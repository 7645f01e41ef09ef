"""The contrast composite against a plain re-implementation of the paper's formula on dense arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from clampdown.activations.statistics import Moments
from clampdown.discovery.contrast import (
    ContrastSettings,
    collect_contrast,
    composite_scores,
    contrast_scores,
    eligible_features,
    find_by_contrast,
)
from clampdown.discovery.directions import difference_of_means
from clampdown.discovery.separation import d_prime
from clampdown.errors import PromptSetError
from clampdown.store import read_feature_set, write_feature_set
from tests.steering.conftest import SITE


def published(harmful, harmless, w_diff=0.5, w_var=0.5):
    """score = w1 |diff / max |diff|| + w2 (1 - var / max var), rescaled to a best of 1 (2511.00029)."""
    scores = []
    everything = [*harmful.tolist(), *harmless.tolist()]
    columns = range(harmful.shape[1])

    def mean(rows, f):
        return sum(row[f] for row in rows) / len(rows)

    diff = [mean(harmful.tolist(), f) - mean(harmless.tolist(), f) for f in columns]
    centre = [mean(everything, f) for f in columns]
    var = [sum((row[f] - centre[f]) ** 2 for row in everything) / len(everything) for f in columns]
    for f in columns:
        norm_diff = diff[f] / (max(map(abs, diff)) or 1)
        norm_var = var[f] / (max(var) or 1)
        scores.append(w_diff * abs(norm_diff) + w_var * (1 - norm_var))
    return np.array(scores) / max(scores), np.array(diff)


def dense_sets(seed):
    rng = np.random.default_rng(seed)
    return [rng.exponential(rng.random(8) * 5, (n, 8)) * (rng.random((n, 8)) < 0.5) for n in (7, 9)]


@given(st.integers(0, 10_000), st.sampled_from([(0.5, 0.5), (0.9, 0.1), (0.2, 0.8)]))
def test_the_composite_is_the_published_formula(seed, weights):
    harmful, harmless = dense_sets(seed)
    settings = ContrastSettings(w_diff=weights[0], w_var=weights[1])
    found = composite_scores(Moments.of(csr_array(harmful)), Moments.of(csr_array(harmless)), settings)
    expected, diff = published(harmful, harmless, *weights)
    np.testing.assert_allclose(found["composite"], expected, rtol=1e-9)
    np.testing.assert_allclose(found["diff_mean"], diff, rtol=1e-9)
    assert found["composite"].max() == pytest.approx(1.0)
    np.testing.assert_array_equal(found["strategy"], np.where(diff > 0, -1, np.where(diff < 0, 1, 0)))


@pytest.mark.parametrize("pooling", ["assistant_start", "max", "mean", "last"])
def test_the_finder_scores_the_model_by_that_formula(lm, sae, contrast, pooling):
    settings = ContrastSettings(pooling=pooling, literal=True, top=64)
    found = find_by_contrast(lm, sae, contrast, settings)
    harmful, harmless = (side.toarray().astype(np.float64) for side in contrast.sides(pooling))
    expected, _ = published(harmful, harmless)
    assert found.ranking[0] == int(np.argmax(expected))
    for score in found.features:
        assert score.scores["composite"] == pytest.approx(expected[score.feature], rel=1e-6)
        assert score.scores["firing_rate_harmful"] == pytest.approx((harmful[:, score.feature] > 0).mean())
    ranked = [score.scores["composite"] for score in found.features]
    assert ranked == sorted(ranked, reverse=True)


def test_dead_features_win_as_published_and_are_never_ranked_by_default(lm, sae, contrast):
    rates = np.maximum(*(side.firing_rate for side in contrast.moments("assistant_start")))
    dead = set(np.flatnonzero(rates == 0).tolist())
    assert dead >= {60, 61, 62, 63}
    default = find_by_contrast(lm, sae, contrast, ContrastSettings(ranked_by="composite"))
    literal = find_by_contrast(lm, sae, contrast, ContrastSettings(literal=True))
    assert not dead & set(default.ranking)
    assert dead <= set(literal.ranking)
    assert all(max(f.scores["firing_rate_harmful"], f.scores["firing_rate_harmless"]) >= 0.05 for f in default.features)
    assert default.features[0].scores["composite"] == pytest.approx(1.0)
    assert literal.finder == "contrast-literal"
    assert literal.ranked_by == "composite"


def test_d_prime_ranks_by_default(lm, sae, contrast):
    found = find_by_contrast(lm, sae, contrast)
    d_primes = [score.scores["d_prime"] for score in found.features]
    assert found.ranked_by == "d_prime"
    assert d_primes == sorted(d_primes, reverse=True)


def test_the_composite_prefers_a_weak_feature_to_a_perfect_one():
    """Why it is not the default: the perfect separator has the largest variance, because it separates."""
    rng = np.random.default_rng(0)
    harmful, harmless = rng.normal(10, 1, (50, 2)), rng.normal(0, 1, (50, 2)).clip(min=0)
    harmful[:, 1] = harmless[:, 1] + 1.2
    moments = [Moments.of(csr_array(side)) for side in (harmful, harmless)]
    composite = composite_scores(*moments, ContrastSettings())["composite"]
    assert composite[1] > composite[0]
    assert d_prime(*moments)[0] > d_prime(*moments)[1]


def test_alignment_is_with_the_dense_direction(lm, sae, contrast, harmful, harmless):
    scores = contrast_scores(sae, contrast, ContrastSettings())
    direction = difference_of_means(lm, harmful, harmless, [SITE])[0]
    rows = sae.W_dec.double().numpy()
    expected = rows @ direction.vector / np.linalg.norm(rows, axis=1) / np.linalg.norm(direction.vector)
    np.testing.assert_allclose(scores["alignment"], expected, atol=1e-5)


def test_any_score_can_rank(lm, sae, contrast):
    found = find_by_contrast(lm, sae, contrast, ContrastSettings(ranked_by="auroc", top=7))
    auroc = [score.scores["auroc"] for score in found.features]
    assert len(auroc) == 7
    assert auroc == sorted(auroc, reverse=True)
    assert found.ranked_by == "auroc"


def test_a_feature_without_the_ranking_score_comes_last(lm, sae, contrast):
    settings = ContrastSettings(ranked_by="d_prime", literal=True)
    found = find_by_contrast(lm, sae, contrast, settings)
    known = ["d_prime" in score.scores for score in found.features]
    assert known == sorted(known, reverse=True)
    assert not all(known)


def test_what_a_person_sees_of_a_feature(lm, sae, contrast):
    found = find_by_contrast(lm, sae, contrast)
    peaks = np.maximum.reduce([contrast.activations.matrix(name).toarray() for name in contrast.activations.poolings])
    texts = [prompt.text for prompt in contrast.prompts]
    for score in found.features[:10]:
        column = peaks[:, score.feature]
        assert score.scores["max_activation"] == pytest.approx(column.max())
        assert score.scores["p99_activation"] == pytest.approx(np.percentile(column[column > 0], 99))
        best = [column[texts.index(text)] for text in score.top_prompts]
        np.testing.assert_allclose(best, np.sort(column)[::-1][: len(best)])
        assert len(score.promoted_tokens) == len(score.demoted_tokens) == 8


def test_the_file_reads_back(lm, sae, contrast, tmp_path):
    found = find_by_contrast(lm, sae, contrast, seed=7)
    write_feature_set(tmp_path / "contrast.json", found)
    assert read_feature_set(tmp_path / "contrast.json") == found
    assert found.provenance.seed == 7
    assert found.site == SITE.name


def test_bad_input(lm, sae, contrast, harmful):
    with pytest.raises(PromptSetError, match="both kinds"):
        collect_contrast(lm, sae, harmful, [])
    with pytest.raises(PromptSetError, match="median"):
        eligible_features(contrast, ContrastSettings(pooling="median"))
    with pytest.raises(PromptSetError, match="charm"):
        find_by_contrast(lm, sae, contrast, ContrastSettings(ranked_by="charm"))
    with pytest.raises(PromptSetError, match="fires often enough"):
        find_by_contrast(lm, sae, contrast, ContrastSettings(min_firing_rate=1.1))


def test_progress_counts_both_sets(lm, sae, harmful, harmless):
    seen = []
    collect_contrast(lm, sae, harmful, harmless, on_progress=lambda *a: seen.append(a))
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
