"""What the engine answers to many requests together is what each gets alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TypeVar

import pytest

from clampdown.serving.engine import Engine
from clampdown.serving.worker import Limits
from clampdown.types import Receipt
from tests.serving.example_plans import alone, ask, model, plans, requests, saes

T = TypeVar("T")


def run(work: Callable[[Engine], Awaitable[T]], limits: Limits | None = None) -> T:
    """With an engine that is started and stopped around the work."""

    async def main() -> T:
        async with Engine(model(), saes(), limits) as engine:
            return await work(engine)

    return asyncio.run(main())


def assert_same(found: Receipt | None, expected: Receipt | None) -> None:
    if expected is None or found is None:
        assert found is expected
        return
    figures = {"edit_norm", "gate_score", "otherwise_score"}
    for name, value in asdict(expected).items():
        close = pytest.approx(value, rel=1e-3) if name in figures and value is not None else value
        assert getattr(found, name) == close, name


@pytest.mark.parametrize("limits", [Limits(), Limits(rows=5, prefill_tokens=40)], ids=["wide", "narrow"])
def test_every_reply_of_a_mixed_crowd_is_that_of_its_request_alone(limits: Limits) -> None:
    """Ten kinds of plan in one batch, requests that come while others decode, more of them than rows."""
    asked = requests()

    async def crowd(engine: Engine) -> list:
        return await asyncio.gather(*(ask(engine, r, delay=0.02 * (i % 7)) for i, r in enumerate(asked)))

    answers = run(crowd, limits)
    changed = set()
    for i, (request, answer) in enumerate(zip(asked, answers, strict=True)):
        text, receipt = alone(request.prompt, i % len(plans()), 16)
        assert answer.text == text, request.plan and request.plan.name
        assert_same(answer.done.receipt, receipt)
        if request.plan is not None and text != alone(request.prompt, 0, 16)[0]:
            changed.add(request.plan.name)
    assert len(changed) >= len(plans()) - 3, "most plans change something, or the comparison says nothing"
