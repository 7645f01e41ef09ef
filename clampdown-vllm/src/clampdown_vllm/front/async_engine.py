"""The asynchronous engine, which servers use: takes each steered request through its course (`desk.py`).

Readings first, then the prompt's own request, then the receipt, which is put on the last RequestOutput as `steering`.
Before its first steered request the engine is proved: every worker holds the plans that were checked, and a pass of the
served model goes through every site.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.inputs.engine import tokens_input
from vllm.renderers.inputs.preprocess import parse_model_prompt

from clampdown.errors import SteeringNotAppliedError
from clampdown_vllm.front import sinks
from clampdown_vllm.front.configuring import desk_of
from clampdown_vllm.front.desk import Course, Desk
from clampdown_vllm.front.requests import (
    asked,
    course_of,
    merged,
    one_token,
    refuse_unsteerable,
    with_order,
    written_of,
)
from clampdown_vllm.order import Order
from clampdown_vllm.runners.patching import wrap


def install() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    wrap(AsyncLLM, "generate", _generate)


@dataclass
class _Fetcher:
    """Asks the workers for receipts, once for all that are wanted in the same turn of the event loop."""

    engine: Any
    _wanted: dict[str, tuple[int | None, bool, asyncio.Future[Any]]] = field(default_factory=dict)
    _task: asyncio.Task[None] | None = None

    async def fetch(self, id_: str, end: int | None, *, last: bool) -> Any:
        future = asyncio.get_running_loop().create_future()
        self._wanted[id_] = (end, last, future)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._ask())
        return await future

    async def _ask(self) -> None:
        while self._wanted:
            await asyncio.sleep(0)
            wanted, self._wanted = self._wanted, {}
            ends = {id_: end for id_, (end, _, _) in wanted.items()}
            over = [id_ for id_, (_, last, _) in wanted.items() if last]
            try:
                found = merged(await self.engine.collective_rpc("clampdown_receipts", args=(ends, over)))
                for id_, (_, _, future) in wanted.items():
                    if not future.done():
                        future.set_result(found.get(id_))
            except Exception as error:  # whoever waits gets it
                for _, _, future in wanted.values():
                    if not future.done():
                        future.set_exception(error)


@dataclass
class AsyncFront:
    """Steering of one asynchronous engine."""

    desk: Desk
    engine: Any
    plain: Any
    fetcher: _Fetcher
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _proved: bool = False

    @classmethod
    def of(cls, engine: Any, plain: Any) -> AsyncFront | None:
        """An engine's own; None when it has no plans. `plain` is vLLM's way to generate."""
        if not hasattr(engine, "clampdown"):
            desk = desk_of(engine.vllm_config)
            engine.clampdown = desk and cls(desk, engine, plain, _Fetcher(engine))
        return engine.clampdown

    async def prove(self) -> None:
        """Raises `SteeringNotAppliedError` unless every worker steers as was checked here."""
        async with self._lock:
            if self._proved:
                return
            sinks.agree(self.desk, await self.engine.collective_rpc("clampdown_handshake"))
            made = sinks.measuring(self.desk)
            found = [await self.read(ids, order) for ids, order in made]
            limits = sinks.limits(self.desk, made, {o.id: f for (_, o), f in zip(made, found, strict=True)})
            await self.engine.collective_rpc("clampdown_limits", args=(limits,))
            self._proved = True

    async def read(self, ids: Sequence[int], order: Order) -> Any:
        """A pass for its prompt alone, and what the worker noted of it."""
        stream = self.plain(self.engine, tokens_input(list(ids)), one_token(order), f"clampdown-{order.id}")
        async for _ in stream:
            pass
        return await self.fetcher.fetch(order.id, None, last=True)

    async def ids(self, prompt: Any) -> Any:
        """A prompt as a rendered one."""
        if isinstance(prompt, Mapping) and "type" in prompt:
            return prompt
        renderer = self.engine.renderer
        parsed = parse_model_prompt(self.engine.model_config, prompt)
        (rendered,) = renderer.render_cmpl([parsed], renderer.default_cmpl_tok_params)
        return rendered


async def prove(engine: Any) -> None:
    """Before a server takes requests. Nothing where there are no plans."""
    cls = type(engine)
    front = AsyncFront.of(engine, cls.generate.__wrapped__) if hasattr(cls.generate, "__wrapped__") else None
    if front is not None:
        await front.prove()
    elif desk_of(engine.vllm_config) is not None:
        raise SteeringNotAppliedError(f"requests go to a {cls.__name__}, which is not steered")


async def _generate(
    before: Any, self: Any, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any
) -> AsyncGenerator[Any, None]:
    name, front = asked(sampling_params), AsyncFront.of(self, before)
    if name is None and front is None:
        async for out in before(self, prompt, sampling_params, request_id, **kwargs):
            yield out
        return
    steered = _answered(front, name, prompt, sampling_params, request_id, kwargs)
    began, written, ledger = time.perf_counter(), 0, front and front.desk.ledger
    if ledger is not None:
        ledger.require()
    try:
        async for out in steered:
            written = written_of(out, sampling_params, written)
            if out.finished and ledger is not None:
                ledger.close(began, request_id, out, getattr(out, "steering", None), written)
            yield out
    except BaseException as error:
        if ledger is not None:
            ledger.fail(name if front and name in front.desk.book.plans else None, request_id, error)
        raise
    finally:
        await steered.aclose()


async def _answered(
    front: AsyncFront | None,
    name: str | None,
    prompt: Any,
    sampling_params: Any,
    request_id: str,
    kwargs: Mapping[str, Any],
) -> AsyncGenerator[Any, None]:
    if name is None and front is not None:
        async for out in front.plain(front.engine, prompt, sampling_params, request_id, **kwargs):
            yield out
        return
    assert name is not None, "without plans and without a name nothing comes here"
    desk = refuse_unsteerable(front and front.desk, name, sampling_params)
    assert front is not None, "an engine with a desk has a front"
    await front.prove()
    prompt = await front.ids(prompt)
    course = course_of(desk, name, prompt, sampling_params)
    readings = course.readings()
    for reading, found in zip(
        readings, await asyncio.gather(*(front.read(r.window.ids, r.order) for r in readings)), strict=True
    ):
        course.learn(reading, found)
    async for out in _steered(front, course, prompt, sampling_params, request_id, kwargs):
        yield out


async def _steered(
    front: AsyncFront, course: Course, prompt: Any, params: Any, request_id: str, kwargs: Mapping[str, Any]
) -> AsyncGenerator[Any, None]:
    """The prompt's own request, made again with the verdict known where an armed gate opened too late."""
    stands = False
    while not stands:
        order = course.order()
        stream = front.plain(front.engine, prompt, with_order(params, order), request_id, **kwargs)
        written, judged = 0, not course.one_pass
        try:
            async for out in stream:
                if not judged:
                    judged = True
                    stands = course.settle(await front.fetcher.fetch(course.id, None, last=False))
                    if not stands:
                        request_id = f"{request_id}-again"
                        break
                written = written_of(out, params, written)
                if out.finished:
                    end = course.n_prompt + max(written - 1, 0)
                    found = None if order is None else await front.fetcher.fetch(course.id, end, last=True)
                    out.steering = course.receipt(found)
                yield out
            else:
                stands = True
        finally:
            await stream.aclose()
