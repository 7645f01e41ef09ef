"""The decoding batch gives every family's rows what the library's own loop gives them, however rows come and go."""

from __future__ import annotations

import asyncio
import random

import pytest

from clampdown.serving.engine import Engine
from clampdown.serving.requests import Request, Sampling
from clampdown.serving.worker import Limits
from tests.models.conftest import BOS
from tests.serving.example_plans import Answer, ask
from tests.steering.test_prompt_sharing import model_of, plain_generate, plans_at, sae_at

FAMILIES = ["llama", "gemma2", "gemma3", "mistral", "gpt2", "gpt_neox", "qwen3_moe", "olmo2"]


def crowd(seed: int, n: int) -> list[tuple[list[int], int]]:
    """Prompts of very different lengths, in an order that makes short rows wait for long ones and the reverse."""
    draw = random.Random(seed)
    lengths = [draw.choice([2, 3, 4, 9, 14, 30]) for _ in range(n)]
    return [([BOS] + [draw.randrange(3, 60) for _ in range(k)], draw.choice([1, 3, 6])) for k in lengths]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_join_and_leave_equal_the_librarys_generate(family: str) -> None:
    lm, site = model_of(family), "blocks.1.hook_resid_post"
    sae, plans = sae_at(site), plans_at(site, scale=5.0)
    asked = [(prompt, n, plans[i % len(plans)]) for i, (prompt, n) in enumerate(crowd(seed=1, n=14))]

    async def serve() -> list[Answer]:
        async with Engine(lm, (sae,), Limits(rows=4, prefill_tokens=40)) as engine:
            requests = [Request("", tuple(p), plan, Sampling(max_tokens=n)) for p, n, plan in asked]
            return await asyncio.gather(*map(lambda r: ask(engine, r), requests))

    for (prompt, n, plan), answer in zip(asked, asyncio.run(serve()), strict=True):
        assert list(answer.ids) == plain_generate(lm, sae, plan, [prompt])[0][:n]
