"""The pass of some requests' prompts, from their beginning or from a cached prefix on.

All rows of a pass compute the same number of last tokens, S: with prefixes of p_i tokens, S is the largest L_i - p_i,
and row i takes only L_i - S tokens from its prefix. So padding is on the left only, as everywhere, and positions, masks
and sliding windows are what they always are:

    cached   . . . p p p p | s s s s s    row 0
             p p p p p p p | s s s s s    row 1
             . . . . . . . | . . s s s    row 2: shorter than S, nothing cached
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from clampdown.models.chat import pad_left
from clampdown.models.loading import LanguageModel
from clampdown.serving.prefix import Prefix
from clampdown.steering.decoding import SaesOf
from clampdown.steering.hooks import Steering, steer
from clampdown.steering.plan import Plan
from clampdown.steering.receipts import Seat


@dataclass(frozen=True, slots=True)
class Part:
    """What a pass is asked for one request: the pass of `tokens`, of which `prefix` holds the first `cached` or more.
    The last `given` are a reply's beginning."""

    tokens: tuple[int, ...]
    plan: Plan | None
    given: int
    prefix: Prefix
    cached: int


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A pass that is done. `logits` are those of the last position, or of the columns asked for. Row i's keys and
    values end at the caches' last column; `reused[i]` of its tokens were not computed. `sizes` are per computed column.
    """

    parts: Sequence[Part]
    cache: Cache
    logits: Float[Tensor, "rows pos vocab"]
    seats: Sequence[Seat]
    reused: Sequence[int]
    sizes: tuple[Float[Tensor, "rows columns"], Float[Tensor, "rows columns"]] | None

    def prefix(self, row: int, n: int) -> Prefix:
        """A copy of what is cached of the row's first n tokens."""
        part, old, length = self.parts[row], self.reused[row], len(self.parts[row].tokens)
        states = []
        layers: list[Any] = list(self.cache.layers)
        for layer in layers:
            span = slice(layer.keys.shape[2] - length, layer.keys.shape[2] - length + n)
            states.append((layer.keys[row, :, span].clone(), layer.values[row, :, span].clone()))
        sums = []
        for known, sizes in zip((part.prefix.touched, part.prefix.norm), self.sizes or (None, None), strict=True):
            new = np.zeros(length - old) if sizes is None else sizes[row, -(length - old) :].double().cpu().numpy()
            start = known[old - 1] if old else 0.0
            sums.append(np.concatenate([known[:old], start + new.cumsum()])[:n])
        return Prefix(part.tokens[:n], tuple(states), sums[0], sums[1])


def prefill(
    lm: LanguageModel, saes_of: SaesOf, parts: Sequence[Part], *, columns: Int[Tensor, " columns"] | None = None
) -> Prefilled:
    """Run the pass. Plans that read different SAEs at one site, and parts of different `given`, cannot share one."""
    computed = max(len(part.tokens) - part.cached for part in parts)
    reused = [max(len(part.tokens) - computed, 0) for part in parts]
    plans = [part.plan for part in parts]
    saes = {sae.cfg.site.name: sae for plan in plans if plan for sae in saes_of(plan)}
    batch = pad_left([part.tokens[old:] for part, old in zip(parts, reused, strict=True)], lm.pad_id, lm.device)
    mask = pad_left([[1] * len(part.tokens) for part in parts], 0, lm.device).input_ids
    width, past = mask.shape[1], max(reused)
    with steer(
        lm,
        plans,
        list(saes.values()),
        prompt_width=width - parts[0].given,
        require_reach=False,
        resumed=past > 0,
    ) as steering:
        cache = _cached(lm, parts, reused)
        output = lm.model(
            input_ids=batch.input_ids,
            attention_mask=mask,
            position_ids=_positions(mask, batch.input_ids.shape[1]),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1 if columns is None else columns,
        )
        sizes = steering.sizes()
        seats = _seats(steering, parts, reused)
    return Prefilled(parts, cache, output.logits, seats, reused, sizes)


def _positions(mask: Int[Tensor, "rows columns"], n: int) -> Int[Tensor, "rows n"]:
    return (mask.cumsum(-1) - 1).clamp(min=0)[:, -n:]


def _seats(steering: Steering, parts: Sequence[Part], reused: Sequence[int]) -> list[Seat]:
    """The rows as they go on, with what was done to the tokens that were not computed again."""
    counted = [part.prefix.counted(n) for part, n in zip(parts, reused, strict=True)]
    seats = zip(steering.seats(), counted, strict=True)
    return [replace(seat, touched=seat.touched + t, norm=seat.norm + n) for seat, (t, n) in seats]


def _cached(lm: LanguageModel, parts: Sequence[Part], reused: Sequence[int]) -> Cache:
    """A cache of the reused tokens, left padded."""
    past = max(reused)
    if not past:
        return Cache(layer_class_to_replicate=DynamicLayer)
    like = next(part.prefix for part, n in zip(parts, reused, strict=True) if n).states
    layers = []
    for index, pair in enumerate(like):
        filled = tuple(_stacked(parts, reused, past, index, which, states) for which, states in enumerate(pair))
        layer = DynamicLayer()
        layer.update(*filled)
        layers.append(layer)
    return Cache(layers=layers)


def _stacked(
    parts: Sequence[Part], reused: Sequence[int], past: int, index: int, which: int, like: Tensor
) -> Float[Tensor, "rows heads past dim"]:
    """The keys (`which` 0) or values (1) of block `index`."""
    stacked = torch.zeros((len(parts), like.shape[0], past, like.shape[2]), dtype=like.dtype, device=like.device)
    for row, (part, n) in enumerate(zip(parts, reused, strict=True)):
        if n:
            stacked[row, :, past - n :] = part.prefix.states[index][which][:, :n]
    return stacked
