"""A tiny random Llama with a real tokenizer and chat template, and a random JumpReLU SAE on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clampdown.models.layout import find_layout
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae, SaeConfig
from clampdown.steering.plan import Edit, ModelRef, Plan, SaeRef
from clampdown.types import Site

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["<pad>", "<bos>", "<user>", "<assistant>", "<system>", "<end>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SITE = Site.parse("blocks.1.hook_resid_post")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(SPECIAL + WORDS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>", "<system>"],
        chat_template=TEMPLATE,
    )


def tiny_llama(seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=5,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return LanguageModel(model=model, tokenizer=tokenizer, layout=find_layout(model), name="tiny", revision="r0")


def random_sae(seed: int = 0, d_sae: int = 64, architecture: str = "jumprelu", **config: object) -> Sae:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    w_dec = torch.nn.functional.normalize(rand(d_sae, 32), dim=-1)
    weights = {
        "W_enc": w_dec.T.clone() + 0.1 * rand(32, d_sae),
        "W_dec": w_dec,
        "b_enc": 0.1 * rand(d_sae),
        "b_dec": 0.1 * rand(32),
    }
    if architecture == "jumprelu":
        weights["threshold"] = rand(d_sae).abs() * 0.2
    cfg = SaeConfig(architecture=architecture, d_in=32, d_sae=d_sae, site=SITE, **config)  # type: ignore[arg-type]
    return Sae(cfg, weights, name="random", revision="s0")


def make_plan(*edits: Edit, **fields: object) -> Plan:
    reads_sae = any(edit.features for edit in edits) or "gate" in fields
    return Plan(
        name="test",
        model=ModelRef(name="tiny", revision="r0"),
        saes=(SaeRef(site=SITE.name, name="random", revision="s0"),) if reads_sae else (),
        edits=edits,
        **fields,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    return tiny_llama()


@pytest.fixture(scope="session")
def sae() -> Sae:
    return random_sae()


@pytest.fixture(scope="session")
def site() -> str:
    return SITE.name


@pytest.fixture(scope="session")
def plan_of() -> Callable[..., Plan]:
    return make_plan


@pytest.fixture(scope="session")
def sae_of() -> Callable[..., Sae]:
    return random_sae
