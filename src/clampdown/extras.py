"""Packages that only some uses need: which extra brings each, and the one error that says so when it is missing.

`pip install clampdown` brings what finds, steers and measures. What serves, searches, draws or reads unusual files
comes with an extra. Every import of such a package stands inside `with extra(...)`: a test compares all imports with
pyproject.toml.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from clampdown.errors import MissingPackageError

EXTRAS: dict[str, tuple[str, ...]] = {
    "serve": ("fastapi", "starlette", "uvicorn", "prometheus_client"),
    "tune": ("optuna",),
    "report": ("plotly",),
    "studio": ("gradio",),
    "gguf": ("gguf",),
    "pandas": ("pandas",),
    "saelens": ("sae_lens",),
    "hub": ("datasets", "pyarrow"),
    "lm-eval": ("lm_eval",),
    "spread": ("accelerate",),
    "quantise": ("accelerate", "bitsandbytes"),
    "ray": ("ray",),
    "inspect": ("inspect_ai",),
}
"""What an extra brings, as it is imported. Names are those of pyproject.toml."""


def how_to_get(name: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'clampdown[{name}]'"


@contextmanager
def extra(name: str, purpose: str, *, otherwise: str = "") -> Iterator[None]:
    """Around imports of packages that come with the extra `name`; `purpose` begins the message, "reading a GGUF file".

    Raises `MissingPackageError` for a package of that extra that is not there. A package that is there and cannot be
    imported is not missing: its own error passes.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS[name]:
            raise
        hint = how_to_get(name) + (f", or {otherwise}" if otherwise else "")
        raise MissingPackageError(f"{purpose} needs the package {package}", hint=hint) from error


def is_there(name: str) -> bool:
    """Whether every package of an extra can be imported. They are looked for, not imported."""
    return all(_found(package) for package in EXTRAS[name])


def require(name: str, purpose: str) -> None:
    """Raises `MissingPackageError` for an extra that is not there, before any work is done for what will need it."""
    for package in EXTRAS[name]:
        if not _found(package):
            raise MissingPackageError(f"{purpose} needs the package {package}", hint=how_to_get(name))


def _found(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False
