"""The streaming pass against one prompt at a time with the full encode, whatever the chunk sizes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from clampdown.activations.capture import forward_to
from clampdown.activations.collect import collect
from clampdown.activations.pooling import POOLINGS
from clampdown.activations.stream import Budget, Reading, plan_pass, pool_features, read_layers, read_sae
from clampdown.errors import ModelError, PromptSetError, SiteError, WidthMismatchError
from clampdown.models.chat import encode, pad_left
from clampdown.saes.sae import Sae
from clampdown.types import Site
from tests.steering.conftest import SITE, WORDS, random_sae

ALL = tuple(POOLINGS)
SIGNED = tuple(name for name, pooling in POOLINGS.items() if pooling.signed)


def alone(lm, prompt, site):
    """Residual of one unpadded prompt at a site, and which of its tokens are words that somebody wrote."""
    ids = encode(lm, prompt.messages)
    residual = forward_to(lm, pad_left([ids], lm.pad_id), [site])[site]
    return residual, torch.tensor([[lm.tokenizer.convert_ids_to_tokens(i) in WORDS for i in ids]])


@pytest.mark.parametrize("architecture", ["relu", "jumprelu", "topk"])
def test_the_pass_equals_each_prompt_alone(lm, prompts, architecture):
    sae = random_sae(architecture=architecture, **({"k": 5} if architecture == "topk" else {}))
    found = collect(plan_pass(lm, [read_sae(sae, *ALL, dense=SIGNED)], prompts))
    for i, prompt in enumerate(prompts):
        residual, words = alone(lm, prompt, SITE)
        for name in ALL:
            expected = POOLINGS[name](sae.encode(residual), words)[0].numpy()
            np.testing.assert_allclose(found.matrix(name)[[i]].toarray()[0], expected, rtol=1e-3, atol=1e-4)
        for name in SIGNED:
            expected = POOLINGS[name](residual, words)[0].numpy()
            np.testing.assert_allclose(found.dense(name)[i], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("budget", [Budget(1, 1), Budget(40, 64 * 3), Budget(10_000, 64 * 50)])
def test_chunk_sizes_change_nothing(lm, prompts, budget):
    reading = read_sae(random_sae(), *ALL)
    whole = collect(plan_pass(lm, [reading], prompts))
    chunked = collect(plan_pass(lm, [reading], prompts, budget))
    for name in ALL:
        expected, found = whole.matrix(name).toarray(), chunked.matrix(name).toarray()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@dataclass(frozen=True)
class CountingSae(Sae):
    """A real SAE that notes how many codes it was asked for at once."""

    sizes: list[int] = field(default_factory=list)

    def encode(self, x):
        codes = super().encode(x)
        self.sizes.append(codes.numel())
        return codes


def counting_sae():
    sae = random_sae()
    return CountingSae(sae.cfg, sae.tensors)


def test_no_chunk_is_larger_than_its_budget_and_only_content_is_encoded():
    sae = counting_sae()
    residual, content = torch.randn(6, 40, 32), torch.rand(6, 40) < 0.6
    pool_features(sae, residual, content, ("max", "mean", "assistant_start"), codes_per_chunk=64 * 7)
    assert max(sae.sizes) <= 64 * 7
    assert sum(sae.sizes) == (int(content.sum()) + 6) * 64


def test_assistant_start_alone_encodes_one_token_per_prompt(lm, prompts):
    sae = counting_sae()
    collect(plan_pass(lm, [read_sae(sae, "assistant_start")], prompts))
    assert sum(sae.sizes) == len(prompts) * 64


def test_one_forward_reads_every_layer_and_two_saes_at_one_site(lm, prompts):
    first, second = replace(random_sae(0), name="a"), replace(random_sae(1, d_sae=96), name="b")
    job = plan_pass(lm, read_layers(lm, [first, second], "max"), prompts)  # looks for attention sinks, once
    calls = []
    handle = lm.layout.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    found = collect(job)
    handle.remove()
    assert len(calls) == len(job.batches)
    for sae in (first, second):
        expected = collect(plan_pass(lm, [read_sae(sae, "max")], prompts)).matrix("max")
        np.testing.assert_allclose(
            found.matrix("max", reading=f"{SITE.name} {sae.name}").toarray(), expected.toarray(), rtol=1e-4, atol=1e-5
        )
    for layer in range(lm.n_layers):
        expected = alone(lm, prompts[3], Site(layer))[0][0, -1]
        np.testing.assert_allclose(
            found.dense("assistant_start", reading=Site(layer).name)[3], expected, rtol=1e-3, atol=1e-4
        )


def test_progress_counts_padded_tokens_to_the_total(lm, prompts):
    seen = []
    job = plan_pass(lm, [read_sae(random_sae())], prompts, Budget(tokens_per_batch=40))
    collect(job, on_progress=lambda *a: seen.append(a))
    assert [done for done, _ in seen] == np.cumsum([job.padded_tokens(i) for i in range(len(job.batches))]).tolist()
    assert seen[-1][0] == seen[-1][1]
    assert len(seen) > 3


def test_activations_that_overflow_are_an_error(lm, prompts):
    sae = random_sae(architecture="relu")
    broken = replace(sae, tensors={**sae.tensors, "b_enc": torch.full((64,), float("inf"))})
    with pytest.raises(ModelError, match="not finite"):
        collect(plan_pass(lm, [read_sae(broken)], prompts))


def test_bad_input(lm, prompts):
    sae = random_sae()
    narrow = Sae(
        replace(sae.cfg, d_in=16),
        {**sae.tensors, "W_enc": sae.W_enc[:16], "W_dec": sae.W_dec[:, :16], "b_dec": sae.b_dec[:16]},
    )
    with pytest.raises(PromptSetError, match="median"):
        read_sae(sae, "median")
    with pytest.raises(PromptSetError, match="pooling of residuals 'max'"):
        read_sae(sae, dense=["max"])
    with pytest.raises(PromptSetError, match="no prompts"):
        plan_pass(lm, [read_sae(sae)], [])
    with pytest.raises(PromptSetError, match="same name"):
        plan_pass(lm, [read_sae(sae), read_sae(sae)], prompts)
    with pytest.raises(SiteError):
        plan_pass(lm, [Reading(Site(9), dense=("mean",))], prompts)
    with pytest.raises(WidthMismatchError):
        plan_pass(lm, [read_sae(narrow)], prompts)
