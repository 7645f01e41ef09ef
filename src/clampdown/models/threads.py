"""How many threads a model is run with on a CPU.

Threads wait for each other at every kernel. For a model of a few million weights a kernel is shorter than the wait, and
on a busy machine the wait is long. So: one thread for small models; for others what the load leaves free, at least one.
Who sets OMP_NUM_THREADS has decided.
"""

from __future__ import annotations

import os

import torch

from clampdown.models.loading import LanguageModel

SMALL = 50_000_000
"""Weights up to which one thread is as fast as several."""


def threads_for(weights: int, cores: int, load: float) -> int:
    """Threads for a model of so many weights on a machine of so many cores, of which `load` are busy."""
    return 1 if weights <= SMALL else max(1, cores - round(load))


def choose_threads(lm: LanguageModel) -> int | None:
    """Set torch's threads for a model on a CPU; None where the user's environment or an accelerator decides."""
    if os.environ.get("OMP_NUM_THREADS") or lm.device.type != "cpu":
        return None
    weights = sum(parameter.numel() for parameter in lm.model.parameters())
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    chosen = threads_for(weights, os.cpu_count() or 1, load)
    torch.set_num_threads(chosen)
    return chosen
