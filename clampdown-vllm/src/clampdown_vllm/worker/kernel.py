"""All of a site's edits in one Triton kernel, for accelerators: a program per token reads, edits and measures it.

It does what `edits.py` does in a dozen kernels, for sites whose edits are lines in what one bank reads (the usual case:
some features of one SAE under clamp, scale or add); `of` gives None for all others. On a CPU the kernel can be
interpreted, which is how it is tested.

    x = hidden + residual        a = rectify(x E + b)        hidden += sum over slots of (slope a + offset) d
"""

# ruff: noqa: ANN001, ANN202  (what a kernel takes has no types in Python)

from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor
from vllm.triton_utils import HAS_TRITON, tl, triton

MOST_SLOTS = 256
"""With more of them a product of matrices is the better way to read."""
_TILE = 8192


@triton.jit
def _edit(
    hidden,
    residual,
    rows,
    positions,
    table,
    open_,
    limit,
    encoder,
    bias,
    threshold,
    directions,
    sizes,
    lengths,
    width,
    slots,
    hidden_stride,
    residual_stride,
    TWO_PARTS: tl.constexpr,
    RECTIFIES: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    kind = hidden.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + token).to(tl.int64)
    position = tl.load(positions + token).to(tl.float32)
    slot = tl.arange(0, SLOTS)
    real = slot < slots
    activation = tl.zeros([SLOTS], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < width
        x = tl.load(hidden + token * hidden_stride + at, mask=there, other=0.0).to(tl.float32)
        if TWO_PARTS:
            x += tl.load(residual + token * residual_stride + at, mask=there, other=0.0).to(tl.float32)
            x = x.to(kind).to(tl.float32)  # their sum in their own precision
        square += x * x
        columns = tl.load(encoder + at[:, None] * slots + slot[None, :], mask=there[:, None] & real[None, :], other=0.0)
        activation += tl.sum(columns * x[:, None], axis=0)
    length = tl.sqrt(tl.sum(square, axis=0))
    activation += tl.load(bias + slot, mask=real, other=0.0)
    if RECTIFIES:
        activation *= (activation > tl.load(threshold + slot, mask=real, other=0.0)).to(tl.float32)
    cell = table + row * 4 * slots + slot
    slope = tl.load(cell, mask=real, other=0.0)
    offset = tl.load(cell + slots, mask=real, other=0.0)
    low = tl.load(cell + 2 * slots, mask=real, other=0.0)
    high = tl.load(cell + 3 * slots, mask=real, other=0.0)
    each = tl.zeros([SLOTS], tl.float32)  # one thing for all slots: the interpreter wants both sides of & as blocks
    acts = (position >= low) & (position < high) & (each + length <= tl.load(limit + row))
    if GATED:
        acts = acts & (each + tl.load(open_ + row).to(tl.float32) > 0.0)
    amount = tl.where(acts, offset + slope * activation, 0.0)
    moved = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < width
        lines = tl.load(
            directions + slot[:, None] * width + at[None, :], mask=real[:, None] & there[None, :], other=0.0
        )
        delta = tl.sum(lines * amount[:, None], axis=0).to(kind).to(tl.float32)
        here = hidden + token * hidden_stride + at
        tl.store(here, (tl.load(here, mask=there, other=0.0).to(tl.float32) + delta).to(kind), mask=there)
        moved += delta * delta
    tl.store(sizes + token, tl.sqrt(tl.sum(moved, axis=0)))
    tl.store(lengths + token, length)


@dataclass(frozen=True, slots=True)
class Kernel:
    """Per slot: its channel's column of the encoder, bias, threshold and direction. `table` is the bank's own."""

    encoder: Float[Tensor, "d_model slots"]
    bias: Float[Tensor, " slots"]
    threshold: Float[Tensor, " slots"] | None
    directions: Float[Tensor, "slots d_model"]
    table: Float[Tensor, "rows 4 slots"]

    def edit(
        self,
        hidden: Float[Tensor, "tokens d_model"],
        residual: Float[Tensor, "tokens d_model"] | None,
        rows: Int[Tensor, " tokens"],
        positions: Int[Tensor, " tokens"],
        open_: Bool[Tensor, " rows"] | None,
        limit: Float[Tensor, " rows"],
        sizes: Float[Tensor, " tokens"],
        lengths: Float[Tensor, " tokens"],
    ) -> None:
        """In place; `sizes` and `lengths` become ||x' - x|| and ||x||."""
        width, slots = self.encoder.shape
        padded = triton.next_power_of_2(slots)
        launch: Any = _edit[(hidden.shape[0],)]
        launch(
            hidden,
            hidden if residual is None else residual,
            rows,
            positions,
            self.table,
            rows if open_ is None else open_,
            limit,
            self.encoder,
            self.bias,
            self.bias if self.threshold is None else self.threshold,
            self.directions,
            sizes,
            lengths,
            width,
            slots,
            hidden.stride(0),
            hidden.stride(0) if residual is None else residual.stride(0),
            TWO_PARTS=residual is not None,
            RECTIFIES=self.threshold is not None,
            GATED=open_ is not None,
            BLOCK=min(triton.next_power_of_2(width), max(_TILE // padded, 16)),
            SLOTS=padded,
        )


def possible() -> bool:
    """Whether Triton is there, compiled or interpreted."""
    return bool(HAS_TRITON)
