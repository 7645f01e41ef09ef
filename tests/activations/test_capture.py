"""The truncated forward computes what the whole model computes at a site, and nothing above it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from clampdown.activations.capture import capture, forward_to, length_buckets
from clampdown.errors import PromptSetError, SiteError
from clampdown.models.chat import encode, pad_left
from clampdown.models.layout import find_layout
from clampdown.models.loading import LanguageModel
from clampdown.types import Message, Point, Site
from tests.steering.conftest import tiny_llama, tiny_tokenizer

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11", "w12 w13", "w3 w3 w3 w3", "w20 w21 w22"]


@pytest.fixture(scope="module")
def lm():
    return tiny_llama()


@pytest.fixture(scope="module")
def prompts(lm):
    return [encode(lm, [Message("user", text)]) for text in TEXTS]


def calls_of_blocks(lm, run):
    called = []
    handles = [
        block.register_forward_pre_hook(lambda *_, i=i: called.append(i)) for i, block in enumerate(lm.layout.blocks)
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return called


@pytest.mark.parametrize(
    ("site", "blocks"),
    [
        (Site(0), [0]),
        (Site(1), [0, 1]),
        (Site(1, Point.RESID_PRE), [0, 1]),
        (Site(1, Point.ATTN_OUT), [0, 1]),
        (Site(2), [0, 1, 2]),
    ],
)
def test_blocks_above_the_site_are_never_called(lm, prompts, site, blocks):
    called = calls_of_blocks(lm, lambda: forward_to(lm, pad_left(prompts, lm.pad_id), [site]))
    assert called == blocks


def test_the_norm_and_the_unembedding_are_never_called(lm, prompts):
    called = []
    handles = [
        module.register_forward_pre_hook(lambda *_: called.append(True))
        for module in (lm.model.model.norm, lm.model.lm_head)
    ]
    forward_to(lm, pad_left(prompts, lm.pad_id), [Site(2)])
    for handle in handles:
        handle.remove()
    assert called == []


def test_the_output_of_block_l_is_hidden_state_l_plus_1(lm, prompts):
    ids = torch.tensor([prompts[0]])
    hidden = lm.model(ids, output_hidden_states=True).hidden_states
    found = forward_to(lm, pad_left([prompts[0]], lm.pad_id), [Site(0), Site(1), Site(1, Point.RESID_PRE)])
    assert torch.equal(found[Site(0)], hidden[1])
    assert torch.equal(found[Site(1)], hidden[2])
    assert torch.equal(found[Site(1, Point.RESID_PRE)], hidden[1])


def test_a_padded_batch_reads_each_prompt_as_if_alone(lm, prompts):
    site = Site(1)
    seen = set()
    for captured in capture(lm, prompts, site, tokens_per_batch=30):
        for row, index in enumerate(captured.rows):
            seen.add(index)
            alone = forward_to(lm, pad_left([prompts[index]], lm.pad_id), [site])[site][0]
            residual = captured.residuals[site][row, -len(alone) :]
            torch.testing.assert_close(residual, alone, rtol=1e-4, atol=1e-5)
    assert seen == set(range(len(prompts)))


def test_padding_does_not_shift_absolute_positions():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=46, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    gpt2 = LanguageModel(model, tiny_tokenizer(), find_layout(model), "gpt2", "r0")
    short, long = [6, 7, 8], [9, 10, 11, 12, 13, 14]
    together = forward_to(gpt2, pad_left([short, long], gpt2.pad_id), [Site(0)])[Site(0)]
    alone = forward_to(gpt2, pad_left([short], gpt2.pad_id), [Site(0)])[Site(0)]
    torch.testing.assert_close(together[0, -3:], alone[0], rtol=1e-4, atol=1e-5)


def test_content_is_the_message_and_nothing_of_the_template(lm, prompts):
    for captured in capture(lm, prompts, Site(0)):
        for row, index in enumerate(captured.rows):
            kept = captured.batch.input_ids[row][captured.content[row]].tolist()
            assert lm.tokenizer.decode(kept).split() == TEXTS[index].split()


def test_hooks_are_gone_afterwards_even_after_an_error(lm, prompts):
    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules()]

    before = hooks()
    forward_to(lm, pad_left(prompts, lm.pad_id), [Site(1)])
    with pytest.raises(SiteError):
        forward_to(lm, pad_left(prompts, lm.pad_id), [Site(0), Site(7)])
    with pytest.raises(IndexError):
        forward_to(lm, pad_left([[10_000]], lm.pad_id), [Site(1)])
    assert hooks() == before


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_buckets_hold_every_prompt_once_within_the_budget(lengths, tokens):
    buckets = length_buckets(lengths, tokens)
    assert sorted(i for bucket in buckets for i in bucket) == list(range(len(lengths)))
    for bucket in buckets:
        assert len(bucket) == 1 or len(bucket) * max(lengths[i] for i in bucket) <= tokens
    longest = [max(lengths[i] for i in bucket) for bucket in buckets]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("prompts", [[], [[1, 2], []]])
def test_nothing_to_read_is_an_error(lm, prompts):
    with pytest.raises(PromptSetError):
        next(capture(lm, prompts, Site(0)))
