"""Estimates against counters that know nothing of them: torch's own FLOP counter, and every tensor that lives."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from clampdown.activations.collect import collect, collect_to
from clampdown.activations.estimate import Speed, count_work, estimate_pass, probe
from clampdown.activations.stream import Budget, Reading, plan_pass, read_batch, read_sae
from clampdown.models.layout import find_layout
from clampdown.saes.sae import Sae, SaeConfig
from clampdown.types import Message, Point, Prompt, Site
from tests.steering.conftest import random_sae, tiny_llama, tiny_tokenizer

KNOWN = Speed(1e9, 1e9, 50.0, "given")


def tiny_moe():
    config = Qwen3MoeConfig(
        vocab_size=len(tiny_tokenizer()), hidden_size=32, intermediate_size=48, moe_intermediate_size=24,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4,
        num_experts_per_tok=2, decoder_sparse_step=1, pad_token_id=0,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
    return replace(tiny_llama(), model=model, layout=find_layout(model))


def flops_of(job):
    job.lm.model.set_attn_implementation("eager")  # the counter knows plain products, not fused kernels
    job.lm.model.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        for number in range(len(job.batches)):
            read_batch(job, number)
    return counter.get_total_flops()


@pytest.mark.parametrize("model", [tiny_llama, tiny_moe])
@pytest.mark.parametrize("site", [Site(1), Site(2, Point.RESID_PRE)])
def test_operations_are_those_that_torch_counts(model, site, prompts):
    lm, sae = model(), random_sae()
    sae = replace(sae, cfg=replace(sae.cfg, site=site))
    job = plan_pass(lm, [read_sae(sae, "assistant_start", "max")], prompts)
    work = count_work(job)
    assert work.forward_flops + work.encode_flops == pytest.approx(flops_of(job), rel=0.02)
    assert work.blocks_run == 2
    assert work.prompts == len(prompts)


class PeakBytes(TorchDispatchMode):
    """Bytes of all storages that were alive at once, at most: a storage lives as long as any tensor that shares it."""

    def __init__(self):
        super().__init__()
        self.sharers = {}
        self.now = self.peak = 0

    def release(self, key, size):
        self.sharers[key] -= 1
        self.now -= 0 if self.sharers[key] else size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
                self.now += 0 if self.sharers.get(key) else size
                self.sharers[key] = self.sharers.get(key, 0) + 1
                weakref.finalize(tensor, self.release, key, size)
        self.peak = max(self.peak, self.now)
        return result


def peak_of(job, directory):
    with PeakBytes() as watch:
        collect_to(job, directory)
    return watch.peak


def many(n):
    return [Prompt(f"p{i}", (Message("user", " ".join(["w1"] * (3 + i % 9))),), "benign") for i in range(n)]


def test_memory_is_one_batch_and_one_chunk_however_many_prompts(lm, tmp_path):
    """The shape of 10,000 prompts x 65,536 features, scaled down: codes of all tokens would be 100 times the chunk."""
    dense = random_sae(d_sae=8192)
    sae = replace(dense, tensors={**dense.tensors, "threshold": torch.full((8192,), 6.0)})
    budget = Budget(tokens_per_batch=64, codes_per_chunk=2 * 8192)
    peaks = []
    for n in (40, 160):
        job = plan_pass(lm, [read_sae(sae, "max", "mean", dense=["mean"])], many(n), budget)
        peaks.append(peak_of(job, tmp_path / str(n)))
        every_code = count_work(job).encoded_tokens * 8192 * 4
        assert peaks[-1] < min(estimate_pass(job).memory_bytes, every_code / 4)
    assert peaks[1] <= 1.2 * peaks[0]


def test_the_probe_counts_what_prompts_leave(lm, tmp_path):
    job = plan_pass(lm, [read_sae(random_sae(), "max", dense=["mean"])], many(60))
    found = estimate_pass(job, probe(job))
    store = collect(job)
    real = store.matrix("max").nnz * 8 + store.dense("mean").nbytes
    assert found.disk_bytes == pytest.approx(real, rel=0.2)
    assert "measured on" in found.speed.source


def test_a_long_prompt_is_probed_by_its_end_only(lm, monkeypatch):
    monkeypatch.setattr("clampdown.activations.estimate.PROBE_FLOPS", 1.0)
    job = plan_pass(lm, [read_sae(random_sae())], [Prompt("long", (Message("user", "w1 " * 90),), "benign")])
    assert probe(job).source == "measured on 8 tokens"


def llama_3_8b():
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, dtype=torch.bfloat16, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return replace(tiny_llama(), model=model.eval(), layout=find_layout(model), name="shape")


def meta_sae(d_in=4096, d_sae=65_536):
    cfg = SaeConfig("relu", d_in, d_sae, Site(25))
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    return Sae(cfg, {name: torch.empty(*shape, device="meta") for name, shape in shapes.items()})


def test_llama_3_8b_is_estimated_without_its_weights():
    job = plan_pass(llama_3_8b(), [read_sae(meta_sae(), "assistant_start", "max")], many(200))
    work = count_work(job)
    attention, mlp = 4096 * 4096 * 2 + 4096 * 1024 * 2, 3 * 4096 * 14336
    plain = 2 * 26 * (attention + mlp) * work.padded_tokens
    assert plain < work.forward_flops < 1.01 * plain
    assert work.encode_flops == 2 * 4096 * 65_536 * work.encoded_tokens
    found = estimate_pass(job)
    assert found.seconds == pytest.approx((work.forward_flops + work.encode_flops) / found.speed.forward)
    assert found.speed.source.startswith("assumed")
    assert 1e8 < found.memory_bytes < 2e9
    assert found.disk_bytes <= 200 * 8 * (64 + 64 * 30)


def test_residuals_alone_need_no_encoder(lm, prompts):
    found = estimate_pass(plan_pass(lm, [Reading(Site(0), dense=("mean",))], prompts), KNOWN)
    assert found.work.encode_flops == 0
    assert found.work.blocks_run == 1
    assert found.seconds == found.work.forward_flops / 1e9
