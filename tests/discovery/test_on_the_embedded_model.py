"""On the embedded model: what the finders propose first really causes refusal when it is clamped."""

from __future__ import annotations

import numpy as np
import pytest

from clampdown.config import ORGANISM_WEIGHTS
from clampdown.discovery.causal import (
    REFUSAL_LOG_ODDS,
    clamp_at_norm,
    rank_by_effect,
)
from clampdown.discovery.contrast import ContrastSettings, collect_contrast, find_by_contrast
from clampdown.discovery.directions import direction_between
from clampdown.discovery.refusal_tokens import find_refusal_tokens
from clampdown.discovery.screening import PrefillRefusal
from clampdown.discovery.single_prompt import find_from_one_prompt
from clampdown.models.chat import encode
from clampdown.models.generation import generate
from clampdown.models.loading import load_model
from clampdown.organism.judge import judge
from clampdown.organism.suites import suites
from clampdown.saes.checkpoints import load_sae
from clampdown.steering.hooks import steer
from clampdown.types import Split, Verdict

pytestmark = pytest.mark.skipif(not (ORGANISM_WEIGHTS / "model").is_dir(), reason="the weights are not built")


@pytest.fixture(scope="module")
def lm():
    return load_model("organism")


@pytest.fixture(scope="module")
def sae():
    return load_sae("organism")


@pytest.fixture(scope="module")
def found_on():
    return {suite.name: suite.prompts for suite in suites(Split.DISCOVERY, 60)}


@pytest.fixture(scope="module")
def jailbreaks():
    return next(suite.prompts for suite in suites(Split.VALIDATION, 16) if suite.name == "jailbroken_seen")


@pytest.fixture(scope="module")
def contrast(lm, sae, found_on):
    return collect_contrast(lm, sae, found_on["harmful"], found_on["benign"])


@pytest.fixture(scope="module")
def make_plan(lm, sae, contrast):
    length = direction_between(contrast.activations, contrast.harmful).residual_norm
    return clamp_at_norm(lm, sae, length, scope="prompt")


@pytest.fixture(scope="module")
def measure(lm, sae, found_on, jailbreaks):
    tokens = find_refusal_tokens(lm, [*found_on["harmful"][:24], *found_on["benign"][:24]], judge)
    return PrefillRefusal(lm, sae, jailbreaks, tokens)


def refusals(lm, sae, prompts, plan):
    ids = [encode(lm, prompt.messages) for prompt in prompts]
    with steer(lm, plan, sae, require_reach=False) as steering:
        replies = generate(lm, ids, max_new_tokens=32, on_keep=steering.keep_rows)
    return sum(judge(p, r.text).verdict is Verdict.REFUSED for p, r in zip(prompts, replies, strict=True))


def test_refusal_tokens_separate_refused_from_answered_prompts(lm, sae, found_on):
    tokens = find_refusal_tokens(lm, [*found_on["harmful"][:24], *found_on["benign"][:24]], judge)
    assert tokens.coverage > 2 * tokens.leakage
    harmful, benign = (
        PrefillRefusal(lm, None, found_on[name][24:48], tokens).baseline.mean() for name in ("harmful", "benign")
    )
    assert harmful > benign + 2


def test_contrast_proposes_a_feature_that_really_refuses(lm, sae, contrast, make_plan, measure, jailbreaks):
    """Among its first five, one that turns more jailbreaks into refusals than it found."""
    found = find_by_contrast(lm, sae, contrast, ContrastSettings(top=5))
    ranked = rank_by_effect(found, make_plan, measure)
    best = ranked.features[0]
    assert best.scores[REFUSAL_LOG_ODDS] > 1
    assert refusals(lm, sae, jailbreaks, make_plan(best)) >= refusals(lm, sae, jailbreaks, None) + 3


def test_its_first_choices_beat_features_taken_at_random(lm, sae, contrast, make_plan, measure):
    everything = find_by_contrast(lm, sae, contrast, ContrastSettings(top=sae.cfg.d_sae))
    rest = everything.features[5:]
    chosen = np.random.default_rng(0).choice(len(rest), size=min(12, len(rest)), replace=False)
    effects = measure([make_plan(score) for score in (*everything.features[:5], *(rest[i] for i in chosen))])
    assert max(effects[:5]) >= max(effects[5:])


def test_dead_features_are_never_proposed(lm, sae, contrast):
    for ranked_by in ("d_prime", "composite", "auroc"):
        found = find_by_contrast(lm, sae, contrast, ContrastSettings(ranked_by=ranked_by, top=20))
        assert all(score.scores["max_activation"] > 0 for score in found.features)


def test_one_refusal_holds_a_feature_that_refuses(lm, sae, found_on, make_plan, measure):
    found = find_from_one_prompt(lm, sae, found_on["harmful"][0], judge=judge)
    assert 0 < len(found.features) < 100
    ranked = rank_by_effect(found, make_plan, measure)
    assert ranked.features[0].scores[REFUSAL_LOG_ODDS] > 1


def test_the_prefill_measure_agrees_with_generated_replies(lm, sae, contrast, make_plan, measure, jailbreaks):
    """Over features of all effects, a higher log-odds goes with more refusals."""
    everything = find_by_contrast(lm, sae, contrast, ContrastSettings(top=sae.cfg.d_sae))
    ranked = rank_by_effect(everything, make_plan, measure, top=24)
    tested = ranked.features[:24]
    counts = [refusals(lm, sae, jailbreaks[:8], make_plan(score)) for score in (*tested[:4], *tested[-4:])]
    assert sum(counts[:4]) > sum(counts[4:])
