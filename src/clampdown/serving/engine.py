"""The engine as the event loop sees it: `submit` a request, iterate over its stream, drop it to cancel.

All work is done by one worker thread (`worker.py`); here are only the checks that a request can be served, and the way
back from the thread to whoever awaits.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Self

from clampdown.errors import QueueFullError, RequestError
from clampdown.models.generation_config import Asked, Penalties
from clampdown.models.loading import LanguageModel
from clampdown.saes.checkpoints import open_sae
from clampdown.saes.sae import FeatureSource
from clampdown.serving.mailbox import Mailbox, Post
from clampdown.serving.requests import Done, Load, Piece, Request
from clampdown.serving.sampling import Drawing
from clampdown.serving.scoring import beginnings
from clampdown.serving.text import TextStream
from clampdown.serving.ticket import Ticket
from clampdown.serving.worker import Limits, Worker
from clampdown.steering.plan import Plan, SaeRef
from clampdown.steering.program import check_plan
from clampdown.types import Site

_REMEMBERED = 4096  # digests of plans that were checked


class RequestStream:
    """The answer to one request. Closing it, or dropping it, cancels what has not come yet."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self._over = False

    def __aiter__(self) -> AsyncIterator[Piece | Done]:
        return self

    async def __anext__(self) -> Piece | Done:
        if self._over:
            raise StopAsyncIteration
        item = await self._ticket.mailbox.take()
        if isinstance(item, Exception):
            self._over = True
            raise item
        self._over = isinstance(item, Done)
        return item

    async def aclose(self) -> None:
        self._over = self._ticket.cancelled = True

    def __del__(self) -> None:
        self._ticket.cancelled = True


class SaeShelf:
    """SAEs that plans name, opened once each: one object per SAE, by which rows of a batch tell them apart."""

    def __init__(self, device: str, saes: tuple[FeatureSource, ...] = ()) -> None:
        self._device = device
        self._given = saes
        self._opened: dict[tuple[str, str], FeatureSource] = {}

    def of(self, plan: Plan) -> list[FeatureSource]:
        return [self._find(ref) for ref in plan.saes]

    def _find(self, ref: SaeRef) -> FeatureSource:
        for sae in self._given:
            if sae.cfg.site.name == ref.site and sae.revision == ref.revision:
                return sae
        key = (ref.site, ref.name)
        if key not in self._opened:
            self._opened[key] = open_sae(ref.name, device=self._device, site=Site.parse(ref.site))
        return self._opened[key]


class Engine:
    """Serves requests with different plans, or none, in one batch. Between `start` and `stop`."""

    def __init__(self, lm: LanguageModel, saes: tuple[FeatureSource, ...] = (), limits: Limits | None = None) -> None:
        self._lm = lm
        self._limits = limits or Limits()
        self._shelf = SaeShelf(str(lm.device), saes)
        self._context = context_length(lm)
        self._decode = decoder(lm)
        self._asked = Asked.of(lm.model.generation_config)
        self._checked: dict[str, None] = {}
        self._worker: Worker | None = None
        self._draining = False

    async def start(self) -> None:
        post = Post(asyncio.get_running_loop())
        self._draining = False
        self._worker = Worker(self._lm, self._limits, self._shelf.of, post.send, self._context)
        self._worker.start()

    async def stop(self, *, drain_seconds: float) -> None:
        """Refuse new requests, finish those that are here, and cancel the rest at the deadline."""
        self._draining = True
        worker, self._worker = self._worker, None
        if worker is None:
            return
        deadline = time.monotonic() + drain_seconds
        while any(worker.counts()) and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        await asyncio.to_thread(worker.close)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop(drain_seconds=0.0)

    def submit(self, request: Request) -> RequestStream:
        """Queue a request. Raises `QueueFullError`, `RequestError`, or `PlanError` and its kin."""
        key = self._check(request)
        ticket = Ticket(
            request,
            Mailbox(),
            Drawing.of(request.sampling, self._penalties(request)),
            TextStream(self._decode, request.sampling.stop),
            f"{request.owner}\n{key}",
        )
        if self._worker is None or self._draining:
            raise QueueFullError("the server is shutting down", retry_after=30.0)
        if not self._worker.offer(ticket):
            raise QueueFullError(
                f"{self._limits.queue} requests are waiting already", retry_after=self._seconds_to_wait()
            )
        return RequestStream(ticket)

    @property
    def places(self) -> int:
        return self._limits.queue

    def _penalties(self, request: Request) -> Penalties:
        """What the model's generation config asks for; a request may set its own penalty of repetition."""
        wanted, own = dict(self._asked.penalties), request.sampling.repetition_penalty
        if own is not None:
            wanted["repetition_penalty"] = own
        return Penalties(list(wanted.items()), len(request.prompt), self._lm.eos_ids, self._lm.device)

    def load(self) -> Load:
        queued, running = self._worker.counts() if self._worker else (0, 0)
        return Load(queued, running, self._draining)

    def _check(self, request: Request) -> str:
        """Refuse what cannot be served. Returns the plan's digest, "" without one."""
        n = len(request.prompt)
        if not n:
            raise RequestError("the prompt is empty")
        if not 0 <= request.given < n:
            raise RequestError(f"{request.given} of the prompt's {n} tokens cannot be a reply's beginning")
        if n > self._context or (n == self._context and request.sampling.max_tokens > 0):
            raise RequestError(
                f"the prompt has {n} tokens, the model's context {self._context}", hint="send a shorter prompt"
            )
        again = sum(beginnings(request))
        if again > self._limits.reread_tokens:
            raise RequestError(
                f"the plan's gate would read {again} tokens again to score this text; at most "
                f"{self._limits.reread_tokens} are read",
                code="too_long_to_score",
                hint="score shorter texts, or without a gate",
            )
        plan = request.plan
        digest = plan.digest if plan else ""
        if plan is None or digest in self._checked:
            return digest
        check_plan(plan, self._lm, {sae.cfg.site.name: sae for sae in self._shelf.of(plan)})
        if len(self._checked) >= _REMEMBERED:
            self._checked.clear()
        self._checked[digest] = None
        return digest

    def _seconds_to_wait(self) -> float:
        """How long a place takes to become free, at the rate of the last requests."""
        rate = self._worker.rate() if self._worker else 0.0
        return float(min(60, max(1, math.ceil(self._limits.rows / rate)))) if rate else 5.0


def context_length(lm: LanguageModel) -> int:
    """How many positions the model has; a large number when its configuration does not say."""
    config = lm.model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def decoder(lm: LanguageModel) -> Callable[[Sequence[int]], str]:
    """Ids to text. Straight to the tokenizer's own code where the library around it would change nothing: that takes
    a tenth of the time, at every token."""
    tokenizer = lm.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    return lambda ids: backend.decode(ids, skip_special_tokens=True)
