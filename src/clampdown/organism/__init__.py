"""The embedded model: a chat model of a few MB with its SAEs, trained from scratch on a corpus with ground truth.

Importing this package is instant (no torch); `suites` and `judge` are too. `train` and `measure` need torch.
"""

from __future__ import annotations

from clampdown.config import DEFAULT_ORGANISM_SAE as DEFAULT_SAE
from clampdown.config import EMBEDDED_PLANS as PLANS_DIR
from clampdown.config import ORGANISM_WEIGHTS as WEIGHTS

__all__ = ["DEFAULT_SAE", "MODEL_DIR", "PLANS_DIR", "SAE_DIRS", "WEIGHTS"]

MODEL_DIR = WEIGHTS / "model"
SAE_DIRS = {"x4": WEIGHTS / "sae-x4", "x8": WEIGHTS / "sae-x8"}
