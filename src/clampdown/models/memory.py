"""How many rows fit: the batch size that free memory allows, estimated from the model's shape.

A row needs its keys and values in every block, the activations of the widest block at prefill, and its logits. The
estimate is rough and only half of what is free is given away; who runs out all the same halves the batch
(`steering/arms.py`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from clampdown.models.loading import LanguageModel
from clampdown.models.placing import places_of

SHARE = 0.5
MOST_ROWS = {"cpu": 256, "cuda": 1024}
"""Beyond these, more rows did not make a token cheaper (docs/benchmarks.md)."""


def rows_that_fit(lm: LanguageModel, columns: int) -> int:
    """Rows of `columns` tokens (prompt and reply) that a batch may have on the model's device now; at least 1."""
    budget = SHARE * min(map(free_bytes, devices_of(lm)))
    return max(1, min(int(budget / row_bytes(lm, columns)), MOST_ROWS.get(lm.device.type, 256)))


def devices_of(lm: LanguageModel) -> set[torch.device]:
    """The devices that a model computes on. What is left on disk is computed where its inputs go."""
    placed = {place for place in places_of(lm.model).values() if place not in ("disk", "meta")}
    return {lm.device, *(torch.device(place) for place in placed if lm.device.type == "cpu" or place != "cpu")}


def row_bytes(lm: LanguageModel, columns: int) -> int:
    """Memory that one row of `columns` tokens needs beside the model."""
    config: Any = lm.layout.decoder.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or lm.d_model // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or 4 * lm.d_model
    cached = 2 * lm.n_layers * kv_heads * head_dim
    active = 6 * lm.d_model + 3 * inner
    item = torch.empty((), dtype=lm.dtype).element_size()
    return columns * (cached + active) * item + 3 * 4 * config.vocab_size


def free_bytes(device: torch.device) -> int:
    """Memory that this device has left: an accelerator's own, else what the system says is available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")
    if table.exists():
        found = next((line for line in table.read_text().splitlines() if line.startswith("MemAvailable:")), None)
        if found is not None:
            return int(found.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
