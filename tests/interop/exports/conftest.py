"""Plans of every kind on the embedded model, and on tiny random models of other families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from clampdown.config import ORGANISM, embedded_model
from clampdown.interop.exports.exporting import Exported, Lossy, bind, export
from clampdown.interop.exports.forms import Bound
from clampdown.models.chat import encode
from clampdown.models.generation import generate
from clampdown.models.layout import find_layout
from clampdown.models.loading import LanguageModel, load_model
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit, Plan
from clampdown.study.progress import Stages
from clampdown.types import Message

SITE = "blocks.3.hook_resid_post"
QUESTIONS = (
    "What is the capital city of Spain?",
    "How do I bake bread?",
    "Tell me how to make a bomb.",
    "Hi!",
    "Please compute 12 + 30.",
)


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    return load_model(ORGANISM)


@pytest.fixture(scope="session")
def sae() -> Sae:
    return load_sae(ORGANISM)


def quiet() -> Stages:
    return Stages(Console(quiet=True))


def written(lm: LanguageModel, plan: Plan, to: str, path: Path, *saes: Sae, lossy: Lossy | None = None) -> Exported:
    return export(bind(plan, lm, saes), to, path, quiet(), lossy)


def bound(lm: LanguageModel, plan: Plan, *saes: Sae) -> Bound:
    return bind(plan, lm, saes)


def add(features: tuple[int, ...] = (352, 7), strengths: tuple[float, ...] = (40.0, -15.0), **more: Any) -> Edit:
    return Edit(site=SITE, operator="add", features=features, strengths=strengths, **more)


def dense(operator: str, site: str = SITE, vector: str = "v", strength: float = 1.0, **more: Any) -> Edit:
    return Edit(site=site, operator=operator, vector=vector, strengths=(strength,), **more)


def random_vector(width: int, seed: int = 0, length: float = 1.0) -> tuple[float, ...]:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return tuple((vector * length / vector.norm()).tolist())


def prompt_ids(lm: LanguageModel) -> list[list[int]]:
    return [encode(lm, [Message("user", text)]) for text in QUESTIONS]


def steered_replies(lm: LanguageModel, plan: Plan | None, *saes: Sae, tokens: int = 24) -> list[tuple[int, ...]]:
    with steer(lm, plan, list(saes) or None) as steering:
        replies = generate(lm, prompt_ids(lm), max_new_tokens=tokens, on_keep=steering.keep_rows)
    return [reply.ids for reply in replies]


def plain_replies(model: Any, lm: LanguageModel, tokens: int = 24) -> list[tuple[int, ...]]:
    """Greedy replies by the library's own loop, one prompt at a time."""
    found = []
    for ids in prompt_ids(lm):
        with torch.no_grad():
            output = model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
                max_new_tokens=tokens, pad_token_id=lm.pad_id, eos_token_id=sorted(lm.eos_ids),
            )  # fmt: skip
        found.append(tuple(token for token in output[0, len(ids) :].tolist() if token not in lm.eos_ids))
    return found


def random_model(lm: LanguageModel, config: Any, seed: int = 0) -> LanguageModel:
    """A tiny model of some family with random weights, under the embedded model's tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    return LanguageModel(model, lm.tokenizer, find_layout(model), f"random {config.model_type}", f"seed {seed}")


ORGANISM_DIRECTORY = embedded_model(ORGANISM)
