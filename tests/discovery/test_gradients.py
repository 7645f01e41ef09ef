"""One backward pass against small interventions through the whole model, and against completeness."""

from __future__ import annotations

import numpy as np
import pytest

from clampdown.discovery.gradients import attribute
from clampdown.discovery.refusal_tokens import RefusalTokens
from clampdown.discovery.screening import PrefillRefusal
from clampdown.errors import PromptSetError, SiteError
from clampdown.steering.plan import Edit
from clampdown.types import Site
from tests.steering.conftest import make_plan, random_sae

TOKENS = RefusalTokens((10, 11), 1.0, 0.0, 1, 1)
FEATURES = (1, 3, 7, 20, 33)


@pytest.fixture(scope="module", params=["none", "layer_norm", "constant_norm_rescale"])
def normed(request):
    return random_sae(normalize_activations=request.param)


@pytest.fixture(scope="module")
def found(lm, normed, harmful):
    return attribute(lm, normed, harmful[:6], TOKENS, tokens_per_batch=40)


def slope(lm, sae, prompts, plan_at, centre, step):
    """Central difference of the mean log-odds in a plan's strength."""
    measure = PrefillRefusal(lm, sae, prompts, TOKENS)
    high, low = measure([plan_at(centre + step), plan_at(centre - step)])
    return (high - low) / (2 * step)


def test_gradient_x_activation_is_the_slope_of_scaling(lm, normed, harmful, found):
    """d log-odds / d g of `scale(g)` at g = 1: every activation of the feature grows in proportion."""
    for f in FEATURES:
        expected = slope(lm, normed, harmful[:6], lambda g, f=f: plan(f, "scale", g), 1.0, 0.02)
        assert found.gradient_x_activation[f] == pytest.approx(expected, rel=2e-2, abs=2e-4)


def test_the_steering_gradient_is_the_slope_of_adding(lm, normed, harmful, found):
    """d log-odds / d s of `add(s)` at s = 0, for a row of length 1."""
    for f in FEATURES:
        expected = slope(lm, normed, harmful[:6], lambda s, f=f: plan(f, "add", s), 0.0, 0.02)
        assert found.steering_gradient[f] == pytest.approx(expected, rel=2e-2, abs=2e-4)


def plan(feature, operator, strength):
    site = Site.parse("blocks.1.hook_resid_post").name
    return make_plan(Edit(site=site, operator=operator, features=(feature,), strengths=(strength,)))


def test_integrated_gradients_add_up_to_the_whole_effect(lm, sae, harmful):
    """Completeness (Sundararajan et al., 1703.01365); the more steps, the closer."""
    gaps = []
    for steps in (10, 120):
        found = attribute(lm, sae, harmful[:4], TOKENS, steps=steps)
        gaps.append(abs(found.integrated_gradients.sum() - found.removed))
    assert gaps[1] < 0.01 * abs(found.removed)
    assert gaps[1] < gaps[0] < 0.2 * abs(found.removed)
    assert abs(found.gradient_x_activation.sum() - found.removed) > 5 * gaps[1]


def test_batches_do_not_matter_and_dead_features_get_nothing(lm, sae, harmful):
    one, many = (attribute(lm, sae, harmful, TOKENS, steps=2, tokens_per_batch=n) for n in (1, 10_000))
    for name in ("gradient_x_activation", "integrated_gradients", "steering_gradient"):
        np.testing.assert_allclose(getattr(one, name), getattr(many, name), rtol=1e-3, atol=1e-5)
    assert not one.gradient_x_activation[-4:].any()
    assert not one.integrated_gradients[-4:].any()


def test_bad_input(lm, sae, harmful):
    with pytest.raises(PromptSetError):
        attribute(lm, sae, [], TOKENS)
    elsewhere = random_sae()
    cfg = type(elsewhere.cfg)(
        **{f: getattr(elsewhere.cfg, f) for f in elsewhere.cfg.__slots__ if f != "site"},
        site=Site.parse("blocks.1.hook_mlp_out"),
    )
    with pytest.raises(SiteError):
        attribute(lm, type(elsewhere)(cfg, elsewhere.tensors), harmful, TOKENS)
