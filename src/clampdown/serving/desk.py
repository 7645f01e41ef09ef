"""One request from its job to its answer: submit, collect or stream, count, write down.

1. Every choice is one request to the engine. The first event is awaited before anything is sent, so that what fails at
   once is an HTTP error and not a broken stream.
2. A client that goes away cancels its requests. A client that reads slowly slows its own streams only: what waits for
   it is bounded here, and the engine bounds what waits there.
3. Whatever happens, the request is counted once and has one line in the audit log.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import anyio

from clampdown.errors import QueueFullError
from clampdown.extras import extra
from clampdown.models.loading import LanguageModel
from clampdown.serving.faults import Json, fault
from clampdown.serving.intake import Intake, Job
from clampdown.serving.ledger import CLIENT_WENT, Exchange, Ledger
from clampdown.serving.limits import Keys, Limits
from clampdown.serving.plans import PlanTable
from clampdown.serving.replies import Answer, Form
from clampdown.serving.requests import Done, Piece, Request, Serves, Stream
from clampdown.serving.vocabulary import TokenBytes, token_bytes

with extra("serve", "the server"):
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response, StreamingResponse

_WAITING_EVENTS = 16


@dataclass(frozen=True)
class Served:
    """Everything that a server has: one model behind one engine, its plans, and what keeps count of them."""

    lm: LanguageModel
    model: str
    engine: Serves
    plans: PlanTable
    ledger: Ledger
    limits: Limits = field(default_factory=Limits)
    keys: Keys = field(default_factory=lambda: Keys({}))

    @cached_property
    def intake(self) -> Intake:
        return Intake(self.lm, self.plans, self.limits, self.engine.places)

    @cached_property
    def bytes_of(self) -> TokenBytes:
        return token_bytes(self.lm.tokenizer)


class Feed:
    """Several streams as one, events in the order in which they come."""

    def __init__(self, streams: Sequence[Stream]) -> None:
        self._streams = streams
        self._queue: asyncio.Queue[tuple[int, Piece | Done | Exception]] = asyncio.Queue(_WAITING_EVENTS)
        self._tasks = [asyncio.create_task(self._pump(i, stream)) for i, stream in enumerate(streams)]

    async def _pump(self, index: int, stream: Stream) -> None:
        try:
            async for event in stream:
                await self._queue.put((index, event))
                if isinstance(event, Done):
                    return
            raise RuntimeError("a stream ended without saying how")
        except Exception as error:
            await self._queue.put((index, error))

    async def events(self) -> AsyncIterator[tuple[int, Piece | Done]]:
        """Until every stream is done. Raises the first error of any of them."""
        left = len(self._streams)
        while left:
            index, event = await self._queue.get()
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event, Done)
            yield index, event

    async def aclose(self) -> None:
        """Stop reading, and tell the engine that nobody will."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for stream in self._streams:
            await stream.aclose()


class Desk:
    """Answers jobs with the engine, within the limit of how many at once."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self._open = 0

    async def answer(self, job: Job, http: HttpRequest, key: str) -> Response:
        """Raises what refuses the request. After that the answer, or the stream, is on its way."""
        self._check_open()
        exchange = http.state.exchange = self._exchange(job, key)
        try:
            return await self._answered(exchange, http)
        except asyncio.CancelledError:  # the server's time to stop is over; what it began has its line too
            self.served.ledger.close(exchange, 503, "server_stopped")
            raise

    async def _answered(self, exchange: Exchange, http: HttpRequest) -> Response:
        job, headers = exchange.job, {"X-Request-Id": exchange.form.id}
        feed = Feed(await self._submitted(exchange))
        self._open += 1
        if not job.stream:
            return await self._whole(exchange, feed, http, headers)
        events = feed.events()
        try:
            first = await anext(events)
        except BaseException:
            await self._leave(feed)
            raise
        return _Events(self._chunks(exchange, first, events), lambda: self._end_stream(exchange, feed), headers)

    async def _end_stream(self, exchange: Exchange, feed: Feed) -> None:
        await self._leave(feed)
        self.served.ledger.close(exchange, CLIENT_WENT)  # unless it has been closed by its own end

    def _check_open(self) -> None:
        self.served.ledger.require_audit()
        if self._open >= self.served.limits.concurrent:
            raise QueueFullError(f"{self._open} requests are open, and no more are taken", retry_after=1)

    def _exchange(self, job: Job, key: str) -> Exchange:
        prefix = "chatcmpl" if job.endpoint == "chat" else "cmpl"
        form = Form(
            endpoint=job.endpoint,
            id=f"{prefix}-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=job.model,
            choice=job.choice,
            alternatives=job.sampling.top_logprobs,
            include_usage=job.include_usage,
            n=job.n,
            raw=job.raw,
            reread=job.reread,
            placeholder=job.placeholder,
            bytes_of=self.served.bytes_of,
        )
        answers = [Answer(i, prompt.echoed, prompt.starts) for i, prompt in enumerate(job.prompt_of)]
        return Exchange(job, key, form, answers)

    async def _submitted(self, exchange: Exchange) -> list[Stream]:
        """All choices or none: a queue that takes only some of them takes none."""
        job, streams = exchange.job, []
        for i, prompt in enumerate(job.prompt_of):
            request = Request(
                id=f"{exchange.form.id}-{i}",
                prompt=prompt.ids,
                plan=job.choice.plan,
                sampling=job.sampling_of(i),
                echo=bool(prompt.echoed) and job.sampling.top_logprobs is not None,
                given=prompt.given,
                reread=job.reread,
                owner=exchange.key,
            )
            try:
                streams.append(self.served.engine.submit(request))
            except Exception:
                for stream in streams:
                    await stream.aclose()
                raise
        return streams

    async def _leave(self, feed: Feed) -> None:
        self._open -= 1
        await feed.aclose()

    # ---- the whole answer at once --------------------------------------------------------------------------------

    async def _whole(self, exchange: Exchange, feed: Feed, http: HttpRequest, headers: dict[str, str]) -> Response:
        collecting = asyncio.create_task(self._collect(exchange, feed))
        gone = asyncio.create_task(_gone(http))
        try:
            await asyncio.wait([collecting, gone], return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                self.served.ledger.close(exchange, CLIENT_WENT)
                return Response(status_code=CLIENT_WENT)
            collecting.result()
        finally:
            for task in (collecting, gone):
                task.cancel()
            await self._leave(feed)
        self.served.ledger.close(exchange, 200)
        self.served.ledger.check_written()
        return Json(exchange.form.whole(exchange.answers), headers=headers)

    async def _collect(self, exchange: Exchange, feed: Feed) -> None:
        async for index, event in feed.events():
            exchange.take(index, event)

    # ---- piece by piece --------------------------------------------------------------------------------------------

    async def _chunks(
        self, exchange: Exchange, first: tuple[int, Piece | Done], events: AsyncIterator[tuple[int, Piece | Done]]
    ) -> AsyncIterator[bytes]:
        form = exchange.form
        try:
            for answer in exchange.answers:
                if opening := form.opening(answer):
                    yield _event(opening)
            index, event = first
            while True:
                answer = exchange.answers[index]
                if isinstance(event, Piece):
                    chunk = form.piece(answer, event.text, event.tokens)
                    exchange.take(index, event)
                else:
                    exchange.take(index, event)
                    chunk = form.closing(answer)
                yield _event(chunk)
                try:
                    index, event = await anext(events)
                except StopAsyncIteration:
                    break
        except Exception as error:  # too late for a status: the stream says what happened, and ends
            status, body, _ = fault(error)
            self.served.ledger.close(exchange, status)
            yield _event(body)
            return
        if form.include_usage:
            yield _event(form.usage_chunk(exchange.answers))
        self.served.ledger.close(exchange, 200)
        yield b"data: [DONE]\n\n"


class _Events(StreamingResponse):
    """Server-sent events. `leave` runs at the end whatever happens, before the first chunk too."""

    media_type = "text/event-stream"

    def __init__(
        self, chunks: AsyncIterator[bytes], leave: Callable[[], Awaitable[None]], headers: dict[str, str]
    ) -> None:
        super().__init__(chunks, headers={**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._leave = leave

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._leave()


def _event(body: Any) -> bytes:
    return f"data: {json.dumps(body, allow_nan=False)}\n\n".encode()


async def _gone(http: HttpRequest) -> None:
    """Returns when the client has gone away."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
