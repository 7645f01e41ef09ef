"""What the front end may ask of a worker, by vLLM's collective_rpc: plain data in, plain data out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clampdown.errors import SteeringNotAppliedError
from clampdown_vllm import PLUGIN_VERSION
from clampdown_vllm.worker.state import State


def _state(worker: Any) -> State:
    state = getattr(worker.model_runner, "clampdown", None)
    if state is None:
        raise SteeringNotAppliedError(
            "this worker's model has no steering: the plugin was not there when it was loaded"
        )
    return state


def clampdown_handshake(worker: Any) -> dict[str, Any]:
    """What this worker is armed with."""
    from vllm import __version__

    state = _state(worker)
    return {
        "plugin": PLUGIN_VERSION,
        "vllm": __version__,
        "digests": state.book.digests,
        "sites": list(state.book.sites),
        "kernels": sorted(site for site, kernel in state.kernels.items() if kernel is not None),
        "runner": f"{type(worker.model_runner).__module__}.{type(worker.model_runner).__qualname__}",
    }


def clampdown_limits(worker: Any, limits: Mapping[str, float]) -> None:
    """How long a token may be, per site, that is no attention sink."""
    _state(worker).limits.update(limits)


def clampdown_receipts(
    worker: Any, ends: Mapping[str, int | None], forget: Sequence[str] = ()
) -> dict[str, dict[str, Any] | None]:
    """What was done to these requests, and which of them need not be kept any longer."""
    state = _state(worker)
    found = state.receipts(ends)
    state.forget(forget)
    return found


REMOTE: tuple[Callable[..., Any], ...] = (clampdown_handshake, clampdown_limits, clampdown_receipts)
