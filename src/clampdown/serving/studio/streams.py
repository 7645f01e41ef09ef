"""The stream that brings a page its results, ended so that no result is lost.

Gradio's server ends a page's stream when nothing more is awaited, and says so in its last message. What the page asks
for at that moment would be lost: it gets the answer to its request, believes that the stream goes on, reads that last
message, and closes it. The result, and every later click on the same thing, waits until something else opens a stream.
So a request of a page whose stream has ended is answered here when the page has let go of that stream, and not before.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

_LAST = re.compile(rb'"msg": ?"close_stream"')  # what is said in a message has its quotes escaped
_PATIENCE = 30.0  # seconds for a page to let go; a client that never does has had its results


class Streams:
    """The streams of results of all pages, by their sessions."""

    def __init__(self) -> None:
        self._ended: dict[str, asyncio.Event] = {}

    async def results(self, app: Asgi, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a stream on. After its last message nothing comes, not even the end, until the page has let go."""
        session = _session_of(scope)
        released = asyncio.Event()

        async def passed(message: Any) -> None:
            if _LAST.search(message.get("body", b"")):
                self._ended[session] = released  # before the page can read it
            held = message["type"] == "http.response.body" and self._ended.get(session) is released
            await send({**message, "more_body": True} if held else message)

        try:
            await app(scope, receive, passed)
            if self._ended.get(session) is released:
                await _let_go(receive)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            released.set()
            if self._ended.get(session) is released:
                del self._ended[session]

    def answering(self, session: str, send: Send) -> Send:
        """`send` for the answer to a page's request, which the page's ended stream goes before."""

        async def answer(message: Any) -> None:
            ended = self._ended.get(session) if message["type"] == "http.response.start" else None
            if ended is not None:
                await ended.wait()
            await send(message)

        return answer


async def _let_go(receive: Receive) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(_PATIENCE):
            while (await receive())["type"] != "http.disconnect":
                pass


def _session_of(scope: Scope) -> str:
    return parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
