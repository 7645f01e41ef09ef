"""Types and shapes checked at every call of the package, at a price that the tests can pay.

jaxtyping's own decorator makes two functions of every one that it meets, when it meets it, checks arguments twice per
call, and does all of it again for a function inside another, each time the outer one is called. Here the checker wraps
a function when it is first called, once per code, and axes' names mean the same within one call because the call has
a context of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jaxtyping
from jaxtyping import jaxtyped

Function = Callable[..., Any]
Checker = Callable[[Function], Function]

_FUNCTION = "__beartype_func"
_RUNS_LATER = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)
"""beartype checks what such a function is given when it runs, in a context where axes have other lengths."""


@dataclass(frozen=True)
class Known:
    """What is known of a code: whether its annotations name shapes, and beartype's wrapper without the function, None
    where there is nothing to check."""

    shapes: bool
    wrapper: types.FunctionType | None


_KNOWN: dict[types.CodeType, Known] = {}


def checked(fn: Any = None, *, typechecker: Checker) -> Any:
    """`jaxtyping.jaxtyped`, which it stands in for, and leaves to what is rare."""
    if fn is None:
        return functools.partial(checked, typechecker=typechecker)
    if inspect.isclass(fn):
        if dataclasses.is_dataclass(fn) and "__init__" in vars(fn):
            fn.__init__ = checked(fn.__init__, typechecker=typechecker)
        return fn
    if not isinstance(fn, types.FunctionType) or any(kind(fn) for kind in _RUNS_LATER):
        return jaxtyped(fn, typechecker=typechecker)
    if hasattr(fn, "__wrapped__"):  # a dataclass's own initializer, which has its checks
        return fn
    config, typed = jaxtyping.config, None

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal typed
        if config.jaxtyping_disable:  # a test needs that no check is in the way
            return fn(*args, **kwargs)
        if typed is None:
            typed = _typed(fn, typechecker)
        return typed(*args, **kwargs)

    return wrapped


def _typed(fn: types.FunctionType, typechecker: Checker) -> Function:
    known = _KNOWN.get(fn.__code__)
    if known is None:
        try:
            hints = typing.get_type_hints(fn, include_extras=True)
        except Exception:  # it may name what is defined beside the function
            return jaxtyped(fn, typechecker=typechecker)
        made = typechecker(fn)
        checks = isinstance(made, types.FunctionType) and made is not fn
        known = Known(any(map(_has_shape, hints.values())), _around(made, None) if checks else None)
        if fn.__code__.co_filename != "<string>":  # initializers of dataclasses are equal where only types differ
            _KNOWN[fn.__code__] = known
    typed = fn if known.wrapper is None else _around(known.wrapper, fn)
    return _in_context(typed) if known.shapes else typed


def _has_shape(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_has_shape, typing.get_args(hint)))


def _around(wrapper: types.FunctionType, fn: types.FunctionType | None) -> types.FunctionType:
    """The same checks around another function of the same code."""
    assert wrapper.__kwdefaults__ and _FUNCTION in wrapper.__kwdefaults__, "beartype keeps the function elsewhere"
    code, name = wrapper.__code__, wrapper.__name__
    copy = types.FunctionType(code, wrapper.__globals__, name, wrapper.__defaults__, wrapper.__closure__)
    copy.__kwdefaults__ = {**wrapper.__kwdefaults__, _FUNCTION: fn}
    return copy


def _in_context(typed: Function) -> Function:
    context = jaxtyped("context")

    def shaped(*args: Any, **kwargs: Any) -> Any:
        with context:
            return typed(*args, **kwargs)

    return shaped
