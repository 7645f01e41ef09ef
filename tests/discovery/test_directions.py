"""The dense baseline is the difference of the two sets' mean residuals, whichever way it is computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clampdown.activations.capture import forward_to
from clampdown.discovery.directions import Direction, difference_of_means, direction_between
from clampdown.errors import PromptSetError
from clampdown.models.chat import encode, pad_left
from clampdown.types import Site
from tests.steering.conftest import SITE, WORDS


def mean_residual(lm, prompts, site, pick):
    rows = []
    for prompt in prompts:
        ids = encode(lm, prompt.messages)
        residual = forward_to(lm, pad_left([ids], lm.pad_id), [site])[site][0]
        words = [i for i, token in enumerate(ids) if lm.tokenizer.convert_ids_to_tokens(token) in WORDS]
        rows.append(pick(residual, words))
    return torch.stack(rows).mean(0).numpy()


PICKS = {
    "assistant_start": lambda residual, words: residual[-1],
    "last": lambda residual, words: residual[words[-1]],
    "mean": lambda residual, words: residual[words].mean(0),
}


@pytest.mark.parametrize("pooling", sorted(PICKS))
def test_it_is_the_difference_of_means(lm, harmful, harmless, pooling):
    sites = [Site(0), SITE]
    for site, direction in zip(sites, difference_of_means(lm, harmful, harmless, sites, pooling), strict=True):
        expected = [mean_residual(lm, side, site, PICKS[pooling]) for side in (harmful, harmless)]
        np.testing.assert_allclose(direction.vector, expected[0] - expected[1], rtol=1e-3, atol=1e-4)
        assert direction.site == site


def test_the_feature_pass_gives_the_same_direction(lm, harmful, harmless, contrast):
    dense = difference_of_means(lm, harmful, harmless, [SITE])[0]
    shared = direction_between(contrast.activations, contrast.harmful)
    np.testing.assert_allclose(shared.vector, dense.vector, rtol=1e-3, atol=1e-5)
    assert shared.residual_norm == pytest.approx(dense.residual_norm, rel=1e-4)


def test_unit_norm_and_cosine():
    direction = Direction(SITE, np.array([3.0, 4.0]), 1.0)
    assert direction.norm == 5
    np.testing.assert_allclose(direction.unit, [0.6, 0.8])
    cosines = direction.cosine(np.array([[6.0, 8.0], [-3.0, -4.0], [4.0, -3.0], [0.0, 0.0]]))
    np.testing.assert_allclose(cosines, [1, -1, 0, 0], atol=1e-12)


def test_equal_means_have_no_direction():
    assert not Direction(SITE, np.zeros(3), 1.0).unit.any()


@pytest.mark.parametrize("pooling", ["max", "mean_active", "median"])
def test_poolings_without_meaning_for_signed_values_are_refused(lm, harmful, harmless, pooling):
    with pytest.raises(PromptSetError, match=pooling):
        difference_of_means(lm, harmful, harmless, [SITE], pooling)
