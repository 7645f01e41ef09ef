"""A conversation with two sides, and both sides' answers as they come.

Each side keeps its own history: after a refusal the two may go different ways. Both requests go to the engine at once
and share its batch; whatever ends the exchange early gives both places back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace

from clampdown.serving.requests import Done, Piece, Request, Serves
from clampdown.types import Message, Receipt

BASELINE, STEERED = "baseline", "steered"
SIDES = (BASELINE, STEERED)


@dataclass(frozen=True, slots=True)
class Answer:
    """One side's answer, maybe not whole yet. `plan` names what steered it."""

    text: str = ""
    done: bool = False
    cut: bool = False
    plan: str = ""
    receipt: Receipt | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """What the user said, and both answers."""

    said: str
    answers: dict[str, Answer] = field(default_factory=lambda: {side: Answer() for side in SIDES})

    def with_answer(self, side: str, answer: Answer) -> Turn:
        return replace(self, answers={**self.answers, side: answer})


@dataclass(frozen=True, slots=True)
class Conversation:
    """All turns, and the system prompt that both sides have."""

    turns: tuple[Turn, ...] = ()
    system: str = ""

    def messages(self, side: str) -> tuple[Message, ...]:
        """The conversation as one side's model reads it; a last turn that has no answer yet ends with the user."""
        found = [Message("system", self.system)] if self.system else []
        for turn in self.turns:
            found.append(Message("user", turn.said))
            if turn.answers[side].done:
                found.append(Message("assistant", turn.answers[side].text))
        return tuple(found)

    def with_last(self, turn: Turn) -> Conversation:
        return replace(self, turns=(*self.turns[:-1], turn))


async def ask_both(engine: Serves, requests: dict[str, Request], turn: Turn) -> AsyncIterator[Turn]:
    """The turn, again and again, as its answers grow; the last one is whole. An error of either side is raised."""
    queue: asyncio.Queue[tuple[str, Piece | Done | BaseException]] = asyncio.Queue()
    tasks = [asyncio.create_task(_feed(engine, side, request, queue)) for side, request in requests.items()]
    waiting = len(tasks)
    try:
        while waiting:
            side, event = await queue.get()
            if isinstance(event, BaseException):
                raise event
            turn = turn.with_answer(side, _grown(turn.answers[side], event))
            waiting -= isinstance(event, Done)
            yield turn
    finally:
        await _cancelled(tasks)


async def _feed(
    engine: Serves, side: str, request: Request, queue: asyncio.Queue[tuple[str, Piece | Done | BaseException]]
) -> None:
    try:
        async with aclosing(engine.submit(request)) as stream:
            async for event in stream:
                queue.put_nowait((side, event))
    except Exception as error:
        queue.put_nowait((side, error))


async def _cancelled(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _grown(answer: Answer, event: Piece | Done) -> Answer:
    if isinstance(event, Piece):
        return replace(answer, text=answer.text + event.text)
    return replace(answer, done=True, cut=event.reason != "stop", receipt=event.receipt)
