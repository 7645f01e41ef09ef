"""What Inspect loads at start: the provider's name. torch and the model wait until somebody asks for it."""

from __future__ import annotations

from clampdown.extras import extra

with extra("inspect", "the model of Inspect"):
    from inspect_ai.model import ModelAPI, modelapi  # pyright: ignore[reportMissingImports]


@modelapi(name="clampdown")
def clampdown() -> type[ModelAPI]:
    """`--model clampdown/PLAN`, PLAN a file, or `clampdown/baseline`."""
    from clampdown.interop.inspect import SteeredAPI

    return SteeredAPI
