"""The synchronous engine, which `LLM` uses: the same course for a request as in `async_engine.py`, driven by its steps.

What a step brings is a reading, the beginning of a reply whose gate was armed, or a reply's end; each is followed by
the next thing to add. So a call of `generate` returns when every request has gone its whole way.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.inputs.engine import tokens_input

from clampdown_vllm.front import sinks
from clampdown_vllm.front.configuring import desk_of
from clampdown_vllm.front.desk import Course, Desk, Reading
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
    from vllm.v1.engine.llm_engine import LLMEngine

    wrap(LLMEngine, "__init__", _engine_init)
    wrap(LLMEngine, "add_request", _add_request)
    wrap(LLMEngine, "step", _step)
    wrap(LLMEngine, "abort_request", _abort_request)


_JOB = "clampdown-job-"
"""Begins what `add_request` returns for a steered request, which may have no request of vLLM's yet."""


@dataclass
class _Job:
    """One steered request of a synchronous engine, and what vLLM needs to be given for it."""

    course: Course
    request_id: str
    prompt: Any
    params: Any
    kwargs: Mapping[str, Any]
    waiting: int = 0
    order: Order | None = None
    judged: bool = False
    written: int = 0


@dataclass
class SyncFront:
    """Steering of one synchronous engine."""

    desk: Desk
    engine: Any
    add: Any
    step: Any
    readings: dict[str, tuple[_Job, Reading]] = field(default_factory=dict)
    jobs: dict[str, _Job] = field(default_factory=dict)

    def rpc(self, method: str, *args: Any) -> list[Any]:
        return self.engine.collective_rpc(method, args=args)

    def fetch(self, ends: Mapping[str, int | None], over: Sequence[str]) -> dict[str, Any]:
        return merged(self.rpc("clampdown_receipts", dict(ends), list(over))) if ends else {}

    def prove(self) -> None:
        """As `AsyncFront.prove`."""
        sinks.agree(self.desk, self.rpc("clampdown_handshake"))
        made = sinks.measuring(self.desk)
        for ids, order in made:
            self.add(self.engine, order.id, tokens_input(ids), one_token(order))
        while self.engine.has_unfinished_requests():
            self.step(self.engine)
        found = self.fetch({o.id: None for _, o in made}, [o.id for _, o in made])
        self.rpc("clampdown_limits", sinks.limits(self.desk, made, found))

    def begin(self, job: _Job) -> None:
        """What has to be read first, or the prompt's own request."""
        for reading in job.course.readings():
            id_ = f"clampdown-{reading.order.id}"
            self.readings[id_] = (job, reading)
            job.waiting += 1
            self.add(self.engine, id_, tokens_input(list(reading.window.ids)), one_token(reading.order))
        if not job.waiting:
            self.submit(job)

    def submit(self, job: _Job) -> None:
        job.order = job.course.order()
        job.judged, job.written = not job.course.one_pass, 0
        self.jobs[job.request_id] = job
        self.add(self.engine, job.request_id, job.prompt, with_order(job.params, job.order), **job.kwargs)

    def read(self, outs: Sequence[Any]) -> None:
        """Readings that were made."""
        done = [self.readings.pop(out.request_id) for out in outs]
        ids = [reading.order.id for _, reading in done]
        found = self.fetch(dict.fromkeys(ids), ids)
        for job, reading in done:
            job.course.learn(reading, found.get(reading.order.id))
            job.waiting -= 1
            if not job.waiting:
                self.submit(job)

    def judge(self, jobs: Sequence[_Job]) -> None:
        """Armed gates whose replies begin: a reply that does not stand is made again."""
        found = self.fetch({job.course.id: None for job in jobs}, ())
        for job in jobs:
            job.judged = job.course.settle(found.get(job.course.id))

    def finish(self, outs: Sequence[Any]) -> None:
        ends = {}
        for out in outs:
            job = self.jobs[out.request_id]
            if job.order is not None:
                ends[job.course.id] = job.course.n_prompt + max(job.written - 1, 0)
        found = self.fetch(ends, list(ends))
        for out in outs:
            job = self.jobs.pop(out.request_id)
            out.steering = job.course.receipt(found.get(job.course.id))


def _engine_init(before: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    before(self, *args, **kwargs)
    desk = desk_of(self.vllm_config)
    cls = type(self)
    self.clampdown = desk and SyncFront(desk, self, cls.add_request.__wrapped__, cls.step.__wrapped__)
    if self.clampdown is not None:
        self.clampdown.prove()


def _add_request(before: Any, self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> str:
    name = asked(params)
    if name is None:
        return before(self, request_id, prompt, params, *args, **kwargs)
    front: SyncFront | None = getattr(self, "clampdown", None)
    desk = refuse_unsteerable(front and front.desk, name, params)
    assert front is not None, "an engine with a desk has a front"
    kwargs.setdefault("arrival_time", time.time())
    front.begin(_Job(course_of(desk, name, prompt, params), request_id, prompt, params, kwargs))
    return f"{_JOB}{request_id}"


def _abort_request(before: Any, self: Any, request_ids: list[str], internal: bool = False) -> None:
    """A steered request is one or several of vLLM's."""
    mine = {id_.removeprefix(_JOB) for id_ in request_ids if id_.startswith(_JOB) or not internal}
    front = getattr(self, "clampdown", None)
    if front is not None and mine:
        readings = [id_ for id_, (job, _) in front.readings.items() if job.request_id in mine]
        before(self, [*readings, *(id_ for id_ in mine if front.jobs.pop(id_, None))])
        for id_ in readings:
            del front.readings[id_]
    if left := [id_ for id_ in request_ids if not id_.startswith(_JOB)]:
        before(self, left, internal)


def _step(before: Any, self: Any) -> list[Any]:
    front, outs = getattr(self, "clampdown", None), before(self)
    if front is None or not (front.jobs or front.readings):
        return outs
    front.read([out for out in outs if out.request_id in front.readings])
    outs = [out for out in outs if not out.request_id.startswith("clampdown-")]
    mine = [out for out in outs if out.request_id in front.jobs]
    front.judge([job for out in mine if not (job := front.jobs[out.request_id]).judged])
    kept, done = [], []
    for out in outs:
        job = front.jobs.get(out.request_id)
        if job is not None and not job.judged:
            if not out.finished:
                self.abort_request([out.request_id])
            front.submit(job)  # after the abort, which forgets the job
            continue
        if job is not None:
            job.written = written_of(out, job.params, job.written)
            done += [out] if out.finished else []
        kept.append(out)
    front.finish(done)
    return kept
