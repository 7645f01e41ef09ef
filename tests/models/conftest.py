"""Tiny random models of every supported architecture: the real classes, a few thousand weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from clampdown.models.layout import find_layout
from clampdown.models.loading import LanguageModel

VOCAB, WIDTH, BLOCKS = 64, 32, 3
PAD, BOS, EOS = 0, 1, 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}

# name -> (config class, arguments beyond the common ones)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "phi3": ("Phi3Config", {}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}),
    "gemma3_multimodal": ("Gemma3Config", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "qwen2_moe": ("Qwen2MoeConfig", {**_MOE, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_MOE, "head_dim": 8}),
    "mistral": ("MistralConfig", {"sliding_window": 4}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_neox": ("GPTNeoXConfig", {"num_key_value_heads": 4, "use_parallel_residual": True}),
    "gpt_neox_sequential": ("GPTNeoXConfig", {"num_key_value_heads": 4, "use_parallel_residual": False}),
    "gpt2": ("GPT2Config", {"num_key_value_heads": 4, "n_inner": 48}),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {}),
}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model; weights are scaled up so that greedy replies vary from prompt to prompt."""
    config_class, extra = ARCHITECTURES[name]
    if name == "gemma3_multimodal":
        config = _multimodal_config()
    else:
        config = getattr(transformers, config_class)(**{**_COMMON, **extra})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(6)
    return model


def _multimodal_config() -> transformers.PretrainedConfig:
    text = {**_COMMON, **_GEMMA, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    tokens = {"boi_token_index": 60, "eoi_token_index": 61, "image_token_index": 62, "eos_token_id": EOS}
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)


class IdTokenizer(SimpleNamespace):
    """Text is the ids themselves: all that generation asks of a tokenizer."""

    pad_token_id = PAD
    eos_token_id = EOS
    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [max(PAD, EOS) + 1 + len(word) % 8 for word in text.split()]}

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], LanguageModel]:
    """`tiny("gemma2")` is a random model of that architecture, built once."""
    built: dict[str, LanguageModel] = {}

    def get(name: str) -> LanguageModel:
        if name not in built:
            model = build(name)
            built[name] = LanguageModel(model, IdTokenizer(), find_layout(model), name, "random")
        return built[name]

    return get


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Prompts of many lengths."""
    draw = random.Random(0)
    return [[BOS] + [draw.randrange(3, 60) for _ in range(draw.randint(2, 12))] for _ in range(24)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", ARCHITECTURES)
