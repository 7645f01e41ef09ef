"""Whether a model has been compiled: a graph that was traced without hooks ignores those that are added later."""

from __future__ import annotations

from typing import Any

from torch import nn

from clampdown.errors import SteeringNotAppliedError
from clampdown.models.loading import LanguageModel


def compiled_part(lm: LanguageModel) -> str | None:
    """Name of the outermost part of the model that `torch.compile` has wrapped, or None.

    All three ways are seen: a wrapped module (`torch.compile(model)`), `model.compile()`, and a compiled `forward`.
    """
    model: Any = lm.model
    if _compiled(model):
        return type(model).__name__
    # Not every module: this is asked at every `steer`, and what is hooked lies in the decoder and its blocks.
    if _compiled(lm.layout.decoder):
        return "its decoder"
    return next((f"block {i}" for i, block in enumerate(lm.layout.blocks) if _compiled(block)), None)


def refuse_compiled(lm: LanguageModel) -> None:
    """Raises `SteeringNotAppliedError` when hooks that are added now could be ignored."""
    part = compiled_part(lm)
    if part is not None:
        raise SteeringNotAppliedError(
            f"{part} is compiled already: its graph will not call hooks that are added now",
            hint="call prepare(lm, ...) before torch.compile, and steer with what it returns",
        )


def _compiled(module: nn.Module) -> bool:
    wrapped = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    return wrapped or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
