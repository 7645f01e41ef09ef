"""One forward pass as the decoder was called: which columns of which rows it computes, and which of them hold tokens.

Positions are columns of the batch, counted from the first one that the cache holds. Padding is what the mask says,
never what a token id looks like. A prompt is one unbroken run of tokens: padded on the left, as batches are, or on the
right, and then `aligned` moves it to where all prompts end together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from clampdown.errors import SteeringNotAppliedError


@dataclass(frozen=True, slots=True)
class Pass:
    """The columns [past, end) of `n_rows` rows. `mask` is whatever the caller gave; `ids` are None for embeddings."""

    ids: Tensor | None
    n_rows: int
    width: int
    past: int
    cache: Any
    mask: Any
    positions: Tensor | None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass:
        ids: Tensor | None = kwargs.get("input_ids", args[0] if args else None)
        inputs: Tensor = kwargs["inputs_embeds"] if ids is None else ids
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        return cls(ids, inputs.shape[0], inputs.shape[1], past, cache, mask, positions)

    @property
    def end(self) -> int:
        return self.past + self.width

    @property
    def plain_mask(self) -> Int[Tensor, "rows columns"] | Bool[Tensor, "rows columns"] | None:
        """The mask by rows and columns, if that is its form."""
        return self.mask if isinstance(self.mask, Tensor) and self.mask.ndim == 2 else None

    def real(self) -> Bool[Tensor, "rows pos"] | None:
        """Which of its own columns hold tokens, from whatever form of mask there is; None when there is no mask.

        Static caches come with masks by query and key, one for each kind of attention: a column is real if it sees
        itself.
        """
        mask = self.mask
        if isinstance(mask, Mapping):
            given = [m for m in mask.values() if m is not None]
            mask = next(
                (m for m in given if isinstance(m, Tensor) and m.shape[-1] >= self.end), next(iter(given), None)
            )
        if mask is None:
            return None
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= self.end:
            return mask[:, self.past : self.end].bool()
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-1] >= self.end:
            own = mask[:, 0, -self.width :, self.past : self.end].diagonal(dim1=1, dim2=2)
            seen = own if mask.dtype == torch.bool else own > torch.finfo(mask.dtype).min / 2
            return seen.expand(self.n_rows, -1)
        raise SteeringNotAppliedError(
            "the attention mask does not say which columns hold tokens",
            hint="pass a mask of rows x columns that covers what the cache holds and what this pass adds",
        )


def trailing_padding(real: Bool[Tensor, "prompts prompt"], where: str) -> Int[Tensor, " prompts"] | None:
    """By how many columns each prompt ends before the last one; None when all end there.

    Raises `SteeringNotAppliedError` for a mask with holes: what it leaves out is nobody's padding.
    """
    begins = real.clone()
    begins[:, 1:] &= ~real[:, :-1]
    if bool((begins.sum(1) > 1).any()):
        raise SteeringNotAppliedError(
            f"the attention mask has holes in {where}: its tokens are not one unbroken run",
            hint="pad prompts on one side only; a conversation that goes on from a cache needs rows of equal length",
        )
    seen_from_the_end = real.flip(1).int().cumsum(1) > 0
    shift = torch.where(real.any(1), (~seen_from_the_end).sum(1), 0)
    return shift if bool(shift.any()) else None


def aligned(values: Tensor, shift: Int[Tensor, " rows"] | None) -> Tensor:
    """Rows [rows, columns, ...] moved right by `shift`, what falls out coming back on the left, where padding is."""
    if shift is None:
        return values
    columns = torch.arange(values.shape[1], device=values.device)
    index = (columns - shift.unsqueeze(1)) % values.shape[1]
    return values[torch.arange(len(values), device=values.device).unsqueeze(1), index]
