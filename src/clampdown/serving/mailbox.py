"""What the worker thread hands to the event loop: one wake-up of the loop for all rows of a step.

A reader that is slower than the model does not hold up the others: text that it has not fetched is joined into one
piece, which is bounded by the request's own `max_tokens`.
"""

from __future__ import annotations

import asyncio
import threading

from clampdown.serving.requests import Done, Piece

Item = Piece | Done | Exception


class Mailbox:
    """Answers to one request that wait for their reader. Used by the event loop only."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._last: Done | Exception | None = None
        self._ready = asyncio.Event()

    def put(self, item: Item) -> None:
        if isinstance(item, Piece):
            self._pieces.append(item)
        elif self._last is None:
            self._last = item
        self._ready.set()

    async def take(self) -> Item:
        """All text that has come since the last call as one piece, else how it ended."""
        await self._ready.wait()
        if self._pieces:
            joined = _joined(self._pieces)
            self._pieces = []
            if self._last is None:
                self._ready.clear()
            return joined
        assert self._last is not None, "something is ready"
        return self._last


def _joined(pieces: list[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    return Piece("".join(p.text for p in pieces), tuple(token for p in pieces for token in p.tokens))


class Post:
    """From the worker thread to mailboxes on the loop. `send` is for the worker, delivery happens on the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._letters: list[tuple[Mailbox, Item]] = []

    def send(self, letters: list[tuple[Mailbox, Item]]) -> None:
        """Deliver soon. A loop that is busy gets one call for all that has come meanwhile."""
        if not letters:
            return
        with self._lock:
            called = bool(self._letters)
            self._letters += letters
        if not called and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            letters, self._letters = self._letters, []
        for mailbox, item in letters:
            mailbox.put(item)
