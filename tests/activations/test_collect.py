"""The streaming pass against one prompt at a time with the full encode, whatever the chunk sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from clampdown.activations.capture import forward_to
from clampdown.activations.collect import Budget, collect, content_first, pool_codes
from clampdown.activations.pooling import POOLINGS
from clampdown.activations.statistics import Moments
from clampdown.errors import PromptSetError
from clampdown.models.chat import encode, pad_left
from clampdown.saes.sae import Sae
from clampdown.types import Message, Prompt
from tests.steering.conftest import SITE, WORDS, random_sae, tiny_llama

ALL = tuple(POOLINGS)


@pytest.fixture(scope="module")
def lm():
    return tiny_llama()


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(1, 12))) for _ in range(23)]
    turns = (Message("system", "w1 w2"), Message("user", "w3"), Message("assistant", "w4"), Message("user", "w5 w6"))
    single = [Prompt(f"p{i}", (Message("user", text),), "benign") for i, text in enumerate(texts)]
    return [*single, Prompt("turns", turns, "benign")]


def naive(lm, sae, prompt, name):
    """The pooled code of one prompt, alone and unpadded."""
    ids = encode(lm, prompt.messages)
    residual = forward_to(lm, pad_left([ids], lm.pad_id), [SITE])[SITE]
    words = torch.tensor([[lm.tokenizer.convert_ids_to_tokens(i) in WORDS for i in ids]])
    return POOLINGS[name](sae.encode(residual), words)[0].numpy()


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("name", ALL)
def test_the_pass_equals_each_prompt_alone(lm, prompts, architecture, name):
    sae = random_sae(architecture=architecture, **({"k": 5} if architecture == "topk" else {}))
    found = collect(lm, sae, prompts, (name,)).matrices[name]
    assert found.prompt_ids == tuple(prompt.id for prompt in prompts)
    for row, prompt in zip(found.values.toarray(), prompts, strict=True):
        np.testing.assert_allclose(row, naive(lm, sae, prompt, name), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("budget", [Budget(1, 1), Budget(40, 64 * 3), Budget(10_000, 64 * 50)])
def test_chunk_sizes_change_nothing(lm, prompts, budget):
    sae = random_sae()
    whole, chunked = collect(lm, sae, prompts, ALL), collect(lm, sae, prompts, ALL, budget=budget)
    for name in ALL:
        expected, found = whole.matrices[name].values.toarray(), chunked.matrices[name].values.toarray()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(chunked.residual.mean, whole.residual.mean, rtol=1e-4, atol=1e-5)


@dataclass(frozen=True)
class CountingSae(Sae):
    """A real SAE that notes how many codes it was asked for at once."""

    sizes: list[int] = field(default_factory=list)

    def encode(self, x):
        codes = super().encode(x)
        self.sizes.append(codes.numel())
        return codes


def test_no_chunk_is_larger_than_its_budget():
    sae = random_sae()
    counting = CountingSae(sae.cfg, sae.tensors)
    residual, content = torch.randn(6, 40, 32), torch.rand(6, 40) < 0.9
    pool_codes(counting, residual, content, ("max", "assistant_start"), codes_per_chunk=64 * 7)
    assert max(counting.sizes) <= 64 * 7
    assert sum(counting.sizes) >= int(content.sum()) * 64


def test_assistant_start_alone_encodes_one_token_per_prompt(lm, prompts):
    sae = random_sae()
    counting = CountingSae(sae.cfg, sae.tensors)
    collect(lm, counting, prompts, ("assistant_start",))
    assert sum(counting.sizes) == len(prompts) * 64


def test_shards_merge_into_one_pass(lm, prompts):
    sae = random_sae()
    whole = collect(lm, sae, prompts, ALL)
    merged = collect(lm, sae, prompts[:9], ALL).merge(collect(lm, sae, prompts[9:], ALL))
    assert merged.residual.count == len(prompts)
    for name in ALL:
        assert merged.matrices[name].prompt_ids == whole.matrices[name].prompt_ids
        expected, found = whole.matrices[name].values.toarray(), merged.matrices[name].values.toarray()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(
            merged.matrices[name].moments().mean, Moments.of(merged.matrices[name].values).mean
        )


def test_content_comes_first_and_in_order():
    residual = torch.arange(12.0).reshape(2, 6, 1)
    content = torch.tensor([[0, 1, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    packed, mask = content_first(residual, content)
    assert packed[0, :, 0].tolist() == [1, 3, 4]
    assert packed[1][mask[1]].flatten().tolist() == [10]


def test_the_residual_is_read_at_the_last_token_of_the_generation_prompt(lm, prompts):
    found = collect(lm, random_sae(), prompts, ())
    last = [
        forward_to(lm, pad_left([encode(lm, p.messages)], lm.pad_id), [SITE])[SITE][0, -1].double() for p in prompts
    ]
    np.testing.assert_allclose(found.residual.mean, torch.stack(last).mean(0).numpy(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.residual.mean_norm, torch.stack(last).norm(dim=1).mean().item(), rtol=1e-4)


def test_progress_ends_at_the_total(lm, prompts):
    seen = []
    collect(lm, random_sae(), prompts, budget=Budget(tokens_per_batch=40), on_progress=lambda *a: seen.append(a))
    done = [d for d, _ in seen]
    assert done == sorted(done)
    assert seen[-1] == (len(prompts), len(prompts))
    assert len(seen) > 3


def test_bad_input(lm, prompts):
    with pytest.raises(PromptSetError, match="median"):
        collect(lm, random_sae(), prompts, ("median",))
    with pytest.raises(PromptSetError):
        collect(lm, random_sae(), [])
