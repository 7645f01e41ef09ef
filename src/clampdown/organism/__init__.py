"""The embedded model: a chat model of a few MB with its SAEs, trained from scratch on a corpus with ground truth.

Importing this package is instant (no torch); `suites` and `judge` are too. `train` and `measure` need torch.
"""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
MODEL_DIR = WEIGHTS / "model"
SAE_DIRS = {"x4": WEIGHTS / "sae-x4", "x8": WEIGHTS / "sae-x8"}
DEFAULT_SAE = "x4"
