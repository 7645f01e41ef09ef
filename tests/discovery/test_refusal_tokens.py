"""Refusal tokens come from the model's own refusals; the log-odds are those of their total probability."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clampdown.discovery.refusal_tokens import (
    RefusalTokens,
    derive_refusal_tokens,
    find_refusal_tokens,
    refusal_log_odds,
)
from clampdown.errors import NotEnoughDataError
from clampdown.models.chat import encode
from clampdown.models.generation import generate
from clampdown.types import Judgement, Verdict


def test_tokens_that_open_other_replies_as_often_are_left_out():
    found = derive_refusal_tokens([7] * 6 + [8] * 3 + [9], [9] * 5 + [7] + [1] * 4)
    assert found.ids == (7, 8)
    assert found.coverage == pytest.approx(0.9)
    assert found.leakage == pytest.approx(0.1)
    assert (found.n_refused, found.n_other) == (10, 10)


def test_rare_openings_are_left_out():
    assert derive_refusal_tokens([1] * 99 + [2], [], min_share=0.02).ids == (1,)


@pytest.mark.parametrize(("refused", "other"), [([], [1, 2]), ([5, 5], [5])])
def test_too_little_to_tell_is_an_error(refused, other):
    with pytest.raises(NotEnoughDataError):
        derive_refusal_tokens(refused, other)


def test_they_are_read_off_the_models_own_replies(lm, harmful):
    """Call a reply a refusal when it opens with what the first prompt's reply opens with: that token must be found."""
    replies = generate(lm, [encode(lm, prompt.messages) for prompt in harmful], max_new_tokens=6)
    opening = replies[0].ids[0]
    word = lm.tokenizer.decode([opening])

    def judge(prompt, reply):
        return Judgement(Verdict.REFUSED if reply.split()[:1] == [word] else Verdict.COMPLIED)

    found = find_refusal_tokens(lm, harmful, judge, max_new_tokens=6)
    assert found.ids == (opening,)
    assert found.coverage == 1.0
    assert found.leakage == 0.0


@given(st.integers(0, 1000), st.sets(st.integers(0, 11), min_size=1, max_size=11))
def test_log_odds_of_the_total_probability(seed, ids):
    logits = 3 * torch.randn(4, 12, generator=torch.Generator().manual_seed(seed))
    found = refusal_log_odds(logits, RefusalTokens(tuple(ids), 1.0, 0.0, 1, 1))
    p = logits.double().softmax(-1)[:, sorted(ids)].sum(-1)
    torch.testing.assert_close(found, p.log() - (1 - p).log())


def test_log_odds_stay_finite_where_probabilities_round_to_one():
    logits = torch.tensor([[100.0, 0.0, -50.0]])
    found = refusal_log_odds(logits, RefusalTokens((0,), 1.0, 0.0, 1, 1))
    assert found.item() == pytest.approx(100.0)
