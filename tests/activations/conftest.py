"""A tiny model and prompts of many lengths, some with several turns, one without any content."""

from __future__ import annotations

import numpy as np
import pytest

from clampdown.models.loading import LanguageModel
from clampdown.types import Message, Prompt
from tests.steering.conftest import WORDS, tiny_llama


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    return tiny_llama()


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(1, 12))) for _ in range(23)]
    turns = (Message("system", "w1 w2"), Message("user", "w3"), Message("assistant", "w4"), Message("user", "w5 w6"))
    single = [
        Prompt(f"p{i}", (Message("user", text),), "benign" if i % 3 else "harmful") for i, text in enumerate(texts)
    ]
    return [*single, Prompt("turns", turns, "benign"), Prompt("nothing", (Message("user", ""),), "benign")]
