"""The causal check: batches of mixed plans measure what one plan at a time measures, and the planted cause wins."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from clampdown.discovery.causal import (
    REFUSAL_GAIN,
    REFUSAL_LOG_ODDS,
    clamp_at_multiple,
    clamp_at_norm,
    clamp_plan,
    rank_by_effect,
)
from clampdown.discovery.contrast import ContrastSettings, find_by_contrast
from clampdown.discovery.ranking import token_effects
from clampdown.discovery.refusal_tokens import RefusalTokens, refusal_log_odds
from clampdown.discovery.screening import PrefillRefusal
from clampdown.errors import NotEnoughDataError, PromptSetError
from clampdown.models.chat import encode
from clampdown.models.generation import next_token_logits
from clampdown.steering.hooks import steer
from clampdown.types import ScoreSource

TOKENS = RefusalTokens((10, 11), 1.0, 0.0, 1, 1)


@pytest.fixture(scope="module")
def found(lm, sae, contrast):
    return find_by_contrast(lm, sae, contrast, ContrastSettings(literal=True))


def one_by_one(lm, sae, prompts, plan):
    """The definition: each prompt alone, steered and not."""
    effects = []
    for prompt in prompts:
        ids = [encode(lm, prompt.messages)]
        plain = refusal_log_odds(next_token_logits(lm, ids), TOKENS)
        with steer(lm, plan, sae):
            steered = refusal_log_odds(next_token_logits(lm, ids), TOKENS)
        effects.append((steered - plain).item())
    return float(np.mean(effects))


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 100_000])
def test_a_batch_of_many_plans_measures_what_each_measures_alone(lm, sae, harmful, tokens_per_batch):
    plans = [
        clamp_plan(lm, sae, f, value, scope)
        for f, value, scope in [(3, 4.0, "all"), (7, -2.0, "prompt"), (3, 9.0, "assistant")]
    ]
    measure = PrefillRefusal(lm, sae, harmful[:6], TOKENS, tokens_per_batch=tokens_per_batch)
    expected = [one_by_one(lm, sae, harmful[:6], plan) for plan in plans]
    np.testing.assert_allclose(measure(plans), expected, rtol=1e-2, atol=1e-3)


def test_the_feature_that_writes_the_refusal_token_ranks_first(lm, sae, harmful, found):
    """Plant a cause: one feature's decoder row becomes the direction that promotes the refusal tokens."""
    wanted = torch.full((lm.model.config.vocab_size,), -1.0 / (lm.model.config.vocab_size - 2))
    wanted[list(TOKENS.ids)] = 0.5
    planted = torch.linalg.lstsq(lm.model.lm_head.weight.detach(), wanted[:, None]).solution.T
    rows = sae.W_dec.clone()
    rows[20] = planted / planted.norm()
    causal = dataclasses.replace(sae, tensors={**sae.tensors, "W_dec": rows})
    measure = PrefillRefusal(lm, causal, harmful, TOKENS)
    ranked = rank_by_effect(found, clamp_at_norm(lm, causal, length=30.0), measure)
    effects = [score.scores[REFUSAL_LOG_ODDS] for score in ranked.features]
    assert token_effects(lm, rows[20:21])[0].topk(2).indices.sort().values.tolist() == [10, 11]
    assert ranked.ranking.index(20) == 0
    assert effects == sorted(effects, reverse=True)
    assert ranked.ranked_by == REFUSAL_LOG_ODDS


def test_finalists_are_tested_and_the_rest_keep_their_order(found, lm, sae):
    asked = []

    def measure(plans):
        asked.extend(plan.edits[0].features[0] for plan in plans)
        return [float(i) for i in range(len(plans))]

    source = ScoreSource("clamp", found.site, dataclasses.replace(found.provenance, prompts_hash="others"), n=3)
    plans = clamp_at_multiple(lm, sae, 1.5)
    ranked = rank_by_effect(found, plans, measure, score=REFUSAL_GAIN, top=4, source=source)
    assert ranked.source(REFUSAL_GAIN) == source and ranked.source("composite").finder == found.finder
    assert tuple(asked) == found.ranking[:4]
    assert ranked.ranking == (*reversed(found.ranking[:4]), *found.ranking[4:])
    assert REFUSAL_GAIN not in ranked.features[4].scores
    kept = {score.feature: score for score in found.features}
    assert ranked.features[0].scores["composite"] == kept[ranked.ranking[0]].scores["composite"]


def test_plans_clamp_where_they_say(found, lm, sae):
    best = found.features[0]
    multiple = clamp_at_multiple(lm, sae, 1.5, scope="assistant")(best)
    assert multiple.edits[0].strengths == (1.5 * best.scores["max_activation"],)
    assert multiple.edits[0].scope == "assistant"
    by_norm = clamp_at_norm(lm, sae, 6.0)(best)
    assert by_norm.edits[0].strengths[0] * sae.W_dec[best.feature].norm().item() == pytest.approx(6.0)


def test_progress_and_nothing_to_do(lm, sae, harmful, found):
    seen = []
    measure = PrefillRefusal(
        lm, sae, harmful, TOKENS, tokens_per_batch=60, on_progress=lambda done, total: seen.append((done, total))
    )
    assert measure([]) == []
    assert seen == []
    measure([clamp_plan(lm, sae, 1, 3.0), clamp_plan(lm, sae, 2, 3.0)])
    assert seen[-1] == (2 * len(harmful), 2 * len(harmful))
    with pytest.raises(PromptSetError):
        PrefillRefusal(lm, sae, [], TOKENS)
    with pytest.raises(NotEnoughDataError):
        rank_by_effect(dataclasses.replace(found, features=()), clamp_at_multiple(lm, sae, 1.0), measure)
