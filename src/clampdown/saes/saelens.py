"""Releases and formats that only SAELens knows, read through that package when it is installed.

Its list of releases is looked up without importing it (that takes 7-10 s and 680 MB); it is imported when a release of
that list is asked for by name. SAELens applies what its list says beyond the files: overrides and folded norms.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from clampdown.errors import CheckpointError, translated
from clampdown.extras import extra
from clampdown.saes.formats import Raw, from_saelens_config


def lists_release(release: str) -> bool:
    """Whether an installed SAELens lists this release."""
    spec = importlib.util.find_spec("sae_lens")
    if spec is None or not spec.submodule_search_locations:
        return False
    path = Path(spec.submodule_search_locations[0]) / "pretrained_saes.yaml"
    return path.is_file() and f"\n{release}:\n" in "\n" + path.read_text(encoding="utf-8")


def read_release(release: str, sae_id: str) -> Raw:
    """Download and load with SAELens. Raises `CheckpointError` when it cannot, `SaeError` for kinds that are no SAE."""
    with extra("saelens", f"the SAE '{release}:{sae_id}'"):
        package: Any = importlib.import_module("sae_lens")
    with translated(CheckpointError, f"SAELens cannot load '{release}:{sae_id}'"):
        sae = package.SAE.from_pretrained(release, sae_id, device="cpu", dtype="float32")
    cfg = sae.cfg.to_dict()
    return from_saelens_config(cfg, dict(sae.state_dict()), f"{release}:{sae_id}")
