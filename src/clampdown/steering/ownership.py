"""Whose hooks act: those of the context (thread or task) that entered the block, and nobody else's.

Hooks are on the model, which threads share; what they do belongs to one context. A pass by a context that steers with
something else skips them. A pass by a context that steers with nothing is an error, not an unsteered answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from clampdown.errors import PlanError, SteeringNotAppliedError

_ACTIVE: ContextVar[Mapping[int, object]] = ContextVar("clampdown_steering", default={})  # noqa: B039  (never mutated)


def steers_here(key: int, owner: object) -> bool:
    """Whether the running context steers the decoder `key` with `owner`. Raises `SteeringNotAppliedError` when it does
    not steer at all."""
    active = _ACTIVE.get().get(key)
    if active is None:
        raise SteeringNotAppliedError(
            "this model is being steered, but not by the thread that is running it now",
            hint="run generate in the thread that entered steer(...), or inside contextvars.copy_context().run; "
            "for an unsteered run beside it use steer(lm, None)",
        )
    return active is owner


def owner_of(key: int) -> object | None:
    """What steers the decoder `key` in the running context; None where nothing does."""
    return _ACTIVE.get().get(key)


@contextmanager
def aside(key: int) -> Iterator[None]:
    """Inside the block the running context only reads the decoder `key`: hooks of steering skip its passes."""
    token = _ACTIVE.set({**_ACTIVE.get(), key: object()})
    try:
        yield
    finally:
        _ACTIVE.reset(token)


@contextmanager
def owning(key: int, owner: object, attach: Callable[[], list[Any]]) -> Iterator[None]:
    """Inside the block the hooks that `attach` registers are on, and the running context steers with `owner`.

    Raises `PlanError` when it steers this decoder already.
    """
    if key in _ACTIVE.get():
        raise PlanError("this model is already being steered here", hint="put all edits into one plan")
    handles: list[Any] = []
    token = _ACTIVE.set({**_ACTIVE.get(), key: owner})
    try:
        handles = attach()
        yield
    finally:
        for handle in handles:
            handle.remove()
        _ACTIVE.reset(token)
