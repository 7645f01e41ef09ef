"""Facts about the installation: where the embedded model and the shipped SAEs lie, which names mean
them, and the cache.

One owner for the names `organism`, `organism:x4`, `organism:x8`: loading, the command line and the docs all ask here.
"""

from __future__ import annotations

import os
from pathlib import Path

from clampdown import __version__

CODE_VERSION = __version__
ORGANISM = "organism"
ORGANISM_WEIGHTS = Path(__file__).parent / "organism" / "weights"
EMBEDDED_PLANS = Path(__file__).parent / "organism" / "plans"
DEFAULT_ORGANISM_SAE = "x4"
SHIPPED_SAES = Path(__file__).parent / "saes" / "shipped"
"""A directory per real model that this package brings an SAE for, by the model's short name."""


def embedded_model(name: str) -> Path | None:
    """Directory of the embedded model if `name` means it, else None."""
    return ORGANISM_WEIGHTS / "model" if name == ORGANISM else None


def embedded_sae(name: str) -> Path | None:
    """Directory of an SAE that comes with the package: `organism`, `organism:<size>`, or a real model's short name."""
    if name in shipped_saes():
        return SHIPPED_SAES / name
    family, _, size = name.partition(":")
    return ORGANISM_WEIGHTS / f"sae-{size or DEFAULT_ORGANISM_SAE}" if family == ORGANISM else None


def embedded_plan(name: str) -> Path | None:
    """The file of a plan that comes with the embedded model, by the plan's name, else None."""
    return next((path for path in EMBEDDED_PLANS.glob("*.toml") if path.stem == name), None)


def shipped_saes() -> tuple[str, ...]:
    """The real models that this package brings an SAE for."""
    return tuple(sorted(path.name for path in SHIPPED_SAES.glob("*") if path.is_dir()))


def cache_directory() -> Path:
    """Where what was made from downloads is kept: `CLAMPDOWN_CACHE`, else `clampdown` in the user's cache directory."""
    given = os.environ.get("CLAMPDOWN_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clampdown"
