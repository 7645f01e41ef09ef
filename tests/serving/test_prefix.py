"""A prompt's beginning is computed once per plan; replies and receipts are as if it were computed every time."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import torch

from clampdown.models.chat import ChatFormat
from clampdown.models.loading import LanguageModel
from clampdown.serving.engine import Engine
from clampdown.serving.prefix import LEAST, Prefix, PrefixCache, reusable
from clampdown.serving.requests import Request, Sampling
from clampdown.serving.worker import Limits
from clampdown.steering.plan import Edit, Gate, ModelRef, Plan, SaeRef
from tests.models.conftest import BOS, build
from tests.serving.example_plans import Answer, ask
from tests.steering.test_prompt_sharing import IdTokenizer, find_layout, sae_at

SITE = "blocks.1.hook_resid_post"
SYSTEM = (BOS, *(3 + 7 * i % 50 for i in range(30)))
FAMILIES = ["llama", "gemma2"]
PROMPTS = 3


class Formatted(LanguageModel):
    """A model whose tokenizer has no template, with the format that it cannot say."""

    @property
    def chat(self) -> ChatFormat:
        return ChatFormat((BOS,), (), frozenset({0, BOS}))


def model_of(family: str) -> LanguageModel:
    model = build(family)
    return Formatted(model, IdTokenizer(), find_layout(model), "m", "r")


def plan(*scopes: str, strength: float = 20.0, **more: object) -> Plan:
    edits = [
        Edit(site=SITE, operator="clamp", features=(3 + i,), strengths=(strength,), scope=scope)
        for i, scope in enumerate(scopes)
    ]
    refs = (SaeRef(site=SITE, name="random", revision="s0"),)
    return Plan(name="p", model=ModelRef(name="m", revision="r"), saes=refs, edits=tuple(edits), **more)  # type: ignore[arg-type]


GATE = Gate(site=SITE, features=(3,), weights=(1.0,), threshold=0.0, poolings=("max",))
ACROSS = {
    "none": None,
    "all": plan("all"),
    "prompt and generated": plan("prompt", "generated"),
    "generated": plan("generated", strength=30.0),
    "all, stronger": plan("all", strength=25.0),
    "gated": plan("all", gate=GATE),
}


def requests(given: int = 0) -> list[Request]:
    """Prompts that share a beginning, of several lengths, under every plan in turn, and each twice."""
    endings = [tuple(40 + (i * j) % 19 for j in range(1, 2 + i % 5)) for i in range(PROMPTS)]
    asked = [(SYSTEM + ending, plan) for ending in endings for plan in ACROSS.values()]
    return [Request("", p, plan, Sampling(max_tokens=4), given=given) for p, plan in [*asked, *asked[::3]]]


def served(lm: LanguageModel, asked: list[Request], limits: Limits, *, together: bool = False) -> list[Answer]:
    async def main() -> list[Answer]:
        async with Engine(lm, (sae_at(SITE),), limits) as engine:
            if together:
                return await asyncio.gather(*(ask(engine, request) for request in asked))
            return [await ask(engine, request) for request in asked]

    return asyncio.run(main())


def assert_same(found: Answer, expected: Answer) -> None:
    assert found.ids == expected.ids
    assert (found.done.receipt is None) == (expected.done.receipt is None)
    if found.done.receipt and expected.done.receipt:
        assert found.done.receipt.tokens_touched == expected.done.receipt.tokens_touched
        assert found.done.receipt.edit_norm == pytest.approx(expected.done.receipt.edit_norm, rel=1e-3)


@pytest.mark.parametrize(("family", "given"), [*((name, 0) for name in FAMILIES), ("llama", 1)])
def test_what_is_reused_changes_no_reply_and_no_receipt(family: str, given: int) -> None:
    lm, asked = model_of(family), requests(given)
    plain = served(lm, asked, Limits(prefix_bytes=0))
    one_by_one = served(lm, asked, Limits())
    crowd = served(lm, asked, Limits(rows=5), together=True)
    for request, expected, *found in zip(asked, plain, one_by_one, crowd, strict=True):
        for answer in found:
            assert_same(answer, expected)
            gated = request.plan is not None and request.plan.gate is not None
            assert not (gated and answer.done.n_reused)
        assert expected.done.n_reused == 0
    after_first = [a.done.n_reused for a, r in zip(one_by_one, asked, strict=True) if not (r.plan and r.plan.gate)][5:]
    assert min(after_first) >= len(SYSTEM) - 6, "every plan's second prompt finds the first one's beginning"
    by_plan = {tuple(answer.ids for answer in plain[i : 6 * PROMPTS : 6]) for i in range(6)}
    assert len(by_plan) >= 3, "the plans differ, or mixing them up would not show"


def test_long_prompts_come_in_pieces_that_change_nothing() -> None:
    lm = model_of("llama")
    asked = [replace(r, prompt=r.prompt + SYSTEM[1:20]) for r in requests()[:6]]
    whole = served(lm, asked, Limits(prefix_bytes=0))
    pieces = served(lm, asked, Limits(prefix_bytes=0, prefill_tokens=16), together=True)
    for found, expected in zip(pieces, whole, strict=True):
        assert_same(found, expected)
        assert found.done.n_reused == 0, "a prompt's own pieces were not found in the cache"


def test_only_what_holds_for_every_ending_is_reused() -> None:
    def count(plan: Plan | None) -> int:
        return reusable(Request("", (1,) * 10, plan, Sampling(1), given=4))

    assert count(None) == count(plan("all")) == 10
    assert count(plan("prompt")) == count(plan("all", "generated")) == 6
    assert count(plan("assistant")) == count(plan("all", "last_user")) == count(plan("all", gate=GATE)) == 0


def entry(tokens: range) -> Prefix:
    states = ((torch.zeros(1, len(tokens), 4), torch.zeros(1, len(tokens), 4)),)
    return Prefix(tuple(tokens), states, np.zeros(len(tokens)), np.zeros(len(tokens)))


def test_the_cache_keeps_plans_apart_and_its_size_bounded() -> None:
    size = entry(range(LEAST)).nbytes
    cache = PrefixCache(3 * size)
    cache.keep("a", entry(range(LEAST)))
    assert cache.find("b", range(LEAST)) == cache.find("a", range(1, 50)) and len(cache) == 1
    assert cache.find("a", range(50))[1] == LEAST
    cache.keep("b", entry(range(LEAST)))
    cache.keep("c", entry(range(LEAST)))
    cache.find("a", range(LEAST))
    cache.keep("d", entry(range(LEAST)))
    assert [key for key in "abcd" if cache.find(key, range(LEAST))[1]] == ["a", "c", "d"], "the least used one went"
    cache.keep("a", entry(range(2 * LEAST)))
    assert len(cache) <= 2 and cache.find("a", range(LEAST))[1] == LEAST, "a longer entry serves for a shorter one"
    cache.keep("e", entry(range(4 * LEAST)))
    assert not cache.find("e", range(4 * LEAST))[1], "what is larger than the cache does not empty it"
