"""Wrapping a method of a class that is not ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def wrap(cls: Any, name: str, around: Callable[..., Any]) -> None:
    """`cls.name` becomes `around(before, self, *args, **kwargs)`. Raises `AttributeError` when there is no such method,
    so that a vLLM of another shape is noticed when the plugin is put in place."""
    before = getattr(cls, name)

    @functools.wraps(before)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(before, self, *args, **kwargs)

    setattr(cls, name, method)
