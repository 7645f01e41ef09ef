"""A tiny model, random SAEs, and two prompt sets that differ in their words."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from clampdown.activations.pooling import POOLINGS
from clampdown.discovery.contrast import Contrast, collect_contrast
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.types import Message, Prompt
from tests.steering.conftest import WORDS, random_sae, tiny_llama


def random_prompts(n: int, words: list[str], name: str) -> tuple[Prompt, ...]:
    rng = np.random.default_rng(len(name))
    texts = [" ".join(rng.choice(words, size=rng.integers(2, 9))) for _ in range(n)]
    return tuple(Prompt(f"{name}-{i}", (Message("user", text),), name) for i, text in enumerate(texts))


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    return tiny_llama()


@pytest.fixture(scope="session")
def sae() -> Sae:
    """Random, but for its last four features, which never fire."""
    alive = random_sae()
    bias = alive.tensors["b_enc"].clone()
    bias[-4:] = -1e4
    return dataclasses.replace(alive, tensors={**alive.tensors, "b_enc": bias})


@pytest.fixture(scope="session")
def harmful() -> tuple[Prompt, ...]:
    return random_prompts(18, WORDS[:25], "harmful")


@pytest.fixture(scope="session")
def harmless() -> tuple[Prompt, ...]:
    return random_prompts(24, WORDS[15:], "benign")


@pytest.fixture(scope="session")
def contrast(lm: LanguageModel, sae: Sae, harmful: tuple[Prompt, ...], harmless: tuple[Prompt, ...]) -> Contrast:
    return collect_contrast(lm, sae, harmful, harmless, tuple(POOLINGS))
