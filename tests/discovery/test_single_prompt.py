"""Candidates are exactly the features active on enough tokens of the model's own reply."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clampdown.activations.capture import forward_to
from clampdown.discovery.single_prompt import SinglePromptSettings, find_from_one_prompt
from clampdown.errors import PromptSetError
from clampdown.models.chat import encode, pad_left
from clampdown.models.generation import generate
from clampdown.types import Judgement, Message, Prompt, Verdict
from tests.steering.conftest import SITE

PROMPT = Prompt("one", (Message("user", "w1 w2 w3 w4"),), "harmful")


@pytest.fixture(scope="module")
def codes(lm, sae):
    """Codes at each reply token, by extending the prompt token by token."""
    ids = encode(lm, PROMPT.messages)
    rows = []
    for token in generate(lm, [ids], max_new_tokens=24)[0].ids:
        ids = [*ids, token]
        if token not in lm.chat.special_ids:
            residual = forward_to(lm, pad_left([ids], lm.pad_id), [SITE])[SITE][0, -1:]
            rows.append(sae.encode(residual)[0])
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("min_tokens", [1, 2, 5])
def test_candidates_are_active_on_enough_reply_tokens(lm, sae, codes, min_tokens):
    settings = SinglePromptSettings(min_tokens=min_tokens, max_new_tokens=24)
    found = find_from_one_prompt(lm, sae, PROMPT, settings=settings)
    n_active = (codes > 0).sum(0)
    assert set(found.ranking) == set(np.flatnonzero(n_active >= min_tokens).tolist())
    for score in found.features:
        assert score.scores["reply_tokens_active"] == n_active[score.feature]
        assert score.scores["reply_mean_activation"] == pytest.approx(codes[:, score.feature].mean(), rel=1e-3)
        assert score.scores["max_activation"] == pytest.approx(codes[:, score.feature].max(), rel=1e-3)
    ranked = [(f.scores["reply_tokens_active"], f.scores["reply_mean_activation"]) for f in found.features]
    assert ranked == sorted(ranked, reverse=True)
    assert found.features[0].top_prompts == (PROMPT.text,)


def test_a_reply_that_is_no_refusal_is_an_error(lm, sae):
    def complied(prompt: Prompt, reply: str) -> Judgement:
        return Judgement(Verdict.COMPLIED)

    with pytest.raises(PromptSetError, match="did not refuse"):
        find_from_one_prompt(lm, sae, PROMPT, judge=complied)


def test_a_judged_refusal_is_accepted_and_kept(lm, sae):
    def refused(prompt: Prompt, reply: str) -> Judgement:
        return Judgement(Verdict.REFUSED)

    found = find_from_one_prompt(lm, sae, PROMPT, judge=refused)
    assert found.settings["reply"]
    assert found.finder == "single-prompt"


def test_a_reply_too_short_to_read_is_an_error(lm, sae):
    with pytest.raises(PromptSetError, match="fewer than 2"):
        find_from_one_prompt(lm, sae, PROMPT, settings=SinglePromptSettings(max_new_tokens=1))
