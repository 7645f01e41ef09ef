"""Pooling: one number per prompt and channel out of the numbers at its tokens.

A pooling is a fold over chunks of positions, so that a long prompt never needs positions x d_sae at once:

    state = start(chunk);  state = merge(state, start(next chunk));  pooled = finish(state)

and calling it pools one chunk that holds everything: `POOLINGS["max"](acts, mask)`. SAE activations are never
negative, so a prompt with no counted token pools to 0. Poolings with `signed` also suit residuals, which have signs.

A new pooling is one row of `POOLINGS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Acts = Float[Tensor, "batch pos channels"]
Mask = Bool[Tensor, "batch pos"]
Pooled = Float[Tensor, "batch channels"]
State = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Pooling:
    """A fold over position chunks. `at_assistant_start` reads one token, whatever the mask: the last of the template's
    generation prompt, which predicts the first reply token and, by left padding, is always the last column."""

    start: Callable[[Acts, Mask], State]
    merge: Callable[[State, State], State]
    finish: Callable[[State], Pooled]
    signed: bool = False
    at_assistant_start: bool = False

    def __call__(self, acts: Acts, mask: Mask) -> Pooled:
        return self.finish(self.start(acts, mask))


def _first(state: State) -> Tensor:
    return state[0]


def _sum_states(before: State, after: State) -> State:
    return tuple(a + b for a, b in zip(before, after, strict=True))


def _ratio(state: State) -> Tensor:
    total, count = state
    return total / count.clamp(min=1)


def _counted(acts: Acts, mask: Mask) -> Acts:
    """Zero where the mask is False; the same tensor when it is True everywhere, to save a copy of a large one."""
    return acts if bool(mask.all()) else acts.masked_fill(~mask[..., None], 0)


def _largest(acts: Acts, mask: Mask) -> State:
    return (_counted(acts, mask).amax(1),)


def _total(acts: Acts, mask: Mask) -> State:
    return _counted(acts, mask).sum(1), mask.sum(1, keepdim=True)


def _active_total(acts: Acts, mask: Mask) -> State:
    live = _counted(acts, mask)
    return live.sum(1), (live > 0).sum(1)


def _final(acts: Acts, mask: Mask) -> State:
    """The last counted token: the one with as many counted tokens up to it as there are in the row."""
    is_last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return _counted(acts, is_last).sum(1), mask.any(1, keepdim=True)


def _later(before: State, after: State) -> State:
    return torch.where(after[1], after[0], before[0]), before[1] | after[1]


def _last_column(acts: Acts, mask: Mask) -> State:
    return (acts[:, -1],)


POOLINGS: dict[str, Pooling] = {
    "max": Pooling(_largest, lambda before, after: (torch.maximum(before[0], after[0]),), _first),
    "mean": Pooling(_total, _sum_states, _ratio, signed=True),
    "mean_active": Pooling(_active_total, _sum_states, _ratio),
    "last": Pooling(_final, _later, _first, signed=True),
    "assistant_start": Pooling(_last_column, lambda before, after: after, _first, signed=True, at_assistant_start=True),
}
