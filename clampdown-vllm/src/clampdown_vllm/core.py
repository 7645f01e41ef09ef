"""In the engine's core: a request whose steering nobody resolved is refused there, before it can run unsteered."""

from __future__ import annotations

from typing import Any

from clampdown_vllm.order import Order
from clampdown_vllm.runners.patching import wrap


def install() -> None:
    from vllm.v1.engine.core import EngineCore

    wrap(EngineCore, "preprocess_add_request", _preprocess)


def _preprocess(before: Any, self: Any, request: Any) -> Any:
    params = request.sampling_params
    if params is not None:
        Order.of(params.extra_args)
    return before(self, request)
