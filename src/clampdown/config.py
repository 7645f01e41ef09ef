"""Facts about the installation: where the embedded model lies, and which names mean it.

One owner for the names `organism`, `organism:x4`, `organism:x8`: loading, the command line and the docs all ask here.
"""

from __future__ import annotations

from pathlib import Path

from clampdown import __version__

CODE_VERSION = __version__
ORGANISM = "organism"
ORGANISM_WEIGHTS = Path(__file__).parent / "organism" / "weights"
DEFAULT_ORGANISM_SAE = "x4"


def embedded_model(name: str) -> Path | None:
    """Directory of the embedded model if `name` means it, else None."""
    return ORGANISM_WEIGHTS / "model" if name == ORGANISM else None


def embedded_sae(name: str) -> Path | None:
    """Directory of an embedded SAE if `name` is `organism` or `organism:<size>`, else None."""
    family, _, size = name.partition(":")
    return ORGANISM_WEIGHTS / f"sae-{size or DEFAULT_ORGANISM_SAE}" if family == ORGANISM else None
