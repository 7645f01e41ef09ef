"""Which collected residuals an SAE learns from, and which it is measured on.

Left out, and counted:
    sinks      the first position of every text, and whatever is longer than SINK times the median: attention sinks are
               hundreds of times longer than the rest, and a squared loss would be about nothing else
    repeats    the same text up to here gives the same residual: each is taken at most MOST_REPEATS times, which thins
               the template's opening that every conversation shares
Held out are whole texts, by a hash of their tokens, so that neither more text nor another order moves one across.
"""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clampdown.errors import NotEnoughDataError
from clampdown.sae_training.shards import Collected

SINK = 4.0
MOST_REPEATS = 50
ONE_IN = 20
FEWEST = 64


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Residuals in float16 [tokens, d_model] to learn from and to measure on; `dropped` counts what was left out."""

    train: Float[Tensor, "tokens d_model"]
    held_out: Float[Tensor, "held d_model"]
    dropped: dict[str, int]
    longest: float
    """Residuals longer than this were left out as sinks."""


def choose_rows(found: Collected) -> TrainingRows:
    """Split what was collected. Raises `NotEnoughDataError` when too little is left to train on or measure."""
    norms = found.residual.float().norm(dim=1)
    longest = SINK * float(norms[found.position > 0].median()) if bool((found.position > 0).any()) else 0.0
    sinks = is_sink(norms, found.position, longest)
    repeated, held = _by_text(found)
    kept = ~sinks & ~repeated
    dropped = {"sinks": int(sinks.sum()), "repeats": int((repeated & ~sinks).sum())}
    rows = TrainingRows(found.residual[kept & ~held], found.residual[kept & held], dropped, longest)
    if min(len(rows.train), len(rows.held_out)) < FEWEST:
        raise NotEnoughDataError(
            f"{len(rows.train)} residuals to train on and {len(rows.held_out)} to measure on are too few",
            hint=f"one text in {ONE_IN} is held out: give more texts",
        )
    return rows


def is_sink(
    norms: Float[Tensor, "*tokens"], positions: Int[Tensor, "*tokens"], longest: float
) -> Bool[Tensor, "*tokens"]:
    """First positions, and residuals longer than `longest` (or not finite in float16)."""
    return (positions == 0) | ~(norms <= longest)


def is_held_out(ids: Sequence[int] | np.ndarray) -> bool:
    """Whether a text is measured on and never learnt from."""
    return zlib.crc32(np.asarray(ids, dtype=np.int32).tobytes()) % ONE_IN == 0


def _by_text(found: Collected) -> tuple[Bool[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """(taken often enough already, held out), text by text: a text starts where the position is 0."""
    tokens = found.token.numpy()
    starts = [*np.flatnonzero(found.position.numpy() == 0).tolist(), len(tokens)]
    repeated, held = np.zeros(len(tokens), dtype=bool), np.zeros(len(tokens), dtype=bool)
    seen: Counter[int] = Counter()
    for start, stop in itertools.pairwise(starts):
        held[start:stop] = is_held_out(tokens[start:stop])
        prefix = 0
        for place in range(start, stop):
            prefix = hash((prefix, int(tokens[place])))
            seen[prefix] += 1
            repeated[place] = seen[prefix] > MOST_REPEATS
    return torch.from_numpy(repeated), torch.from_numpy(held)
