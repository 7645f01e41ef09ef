"""The decoding batch: rows of different lengths and ages that get one token each per forward pass.

All rows end at the same column, so that one column is added per pass (left padding). The keys and values of a block lie
in one buffer, of which the batch uses rows [0, n) and columns [start, end):

    row 0   . . . . k k k k k|        `.` is padding: masked, whatever stands there
    row 1   . . k k k k k k k|        start moves right when the longest row leaves: trimming is a change of view
    row 2   k k k k k k k k k|        a row joins by a copy of its own keys and values, ending at `end`

When `end` meets the buffer's edge, or a row joins that is longer than `end`, the window is moved inside the buffer, or
the buffer grows. A row that leaves is replaced by the last one. Everything goes through the model's own forward with a
2-D mask and positions, so the pool knows nothing of any family.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from clampdown.models.loading import LanguageModel

_ROOM = 64  # columns and rows by which buffers grow, at least
_ROWS = 8
_KEPT_COLUMNS = 1024  # an empty pool frees buffers that are wider than this


class PooledLayer(DynamicLayer):
    """One block's keys and values [rows, heads, columns, head_dim]: `keys` and `values` are views of the buffers."""

    keys: Any  # Tensor; None in the library's layer until the first update
    values: Any

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        super().__init__()
        self.buffers: tuple[Tensor, Tensor] | None = None
        self.end = 0

    def view(self, rows: int, start: int, end: int) -> None:
        """The batch is rows [0, rows) and columns [start, end)."""
        assert self.buffers is not None, "a row has joined"
        self.keys, self.values = (buffer[:rows, :, start:end] for buffer in self.buffers)
        self.start, self.end, self.is_initialized = start, end, True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the next column; returns all keys and values."""
        assert self.buffers is not None and key_states.shape[2] == 1, "rows decode one token each"
        rows, end = key_states.shape[0], self.end
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:rows, :, end : end + 1] = states
        self.view(rows, self.start, end + 1)
        return self.keys, self.values


class Pool:
    """Rows that decode together. `lengths[i]` is how many tokens of row i are cached."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm = lm
        self._layers: list[PooledLayer] = []
        self._cache: Cache | None = None
        self._start = self._end = 0
        self.lengths: list[int] = []

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def _capacity(self) -> tuple[int, int]:
        """Rows and columns of the buffers."""
        if not self._layers or self._layers[0].buffers is None:
            return 0, 0
        shape = self._layers[0].buffers[0].shape
        return shape[0], shape[2]

    def join(self, prefilled: Cache, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Add rows of a cache that ends in their last tokens (left padded); `lengths` are their tokens."""
        if not rows:
            return
        sources: list[Any] = list(prefilled.layers)
        if not self._layers:
            self._layers = [PooledLayer() for _ in sources]
            self._cache = Cache(layers=list(self._layers))
        first = len(self.lengths)
        self._make_room(first + len(rows), max(lengths), sources)
        for row, source_row, length in zip(range(first, first + len(rows)), rows, lengths, strict=True):
            for layer, source in zip(self._layers, sources, strict=True):
                assert layer.buffers is not None, "room was made"
                for buffer, states in zip(layer.buffers, (source.keys, source.values), strict=True):
                    _write(buffer, row, self._end, states[source_row, :, -length:])
        self.lengths += lengths
        self._settle()

    def keep(self, rows: Sequence[int]) -> None:
        """Row i becomes what row rows[i] was; only rows that move are copied."""
        for row, old in enumerate(rows):
            if row != old:
                span = slice(self._end - self.lengths[old], self._end)
                for layer in self._layers:
                    for buffer in layer.buffers or ():
                        _write(buffer, row, self._end, buffer[old, :, span])
        self.lengths = [self.lengths[row] for row in rows]
        self._settle()

    def decode(self, tokens: Sequence[int]) -> Float[Tensor, "rows vocab"]:
        """Feed every row its token; returns the logits of each row's next one."""
        device = self._lm.device
        if self._end == self._capacity[1]:
            self._make_room(len(self), 0, self._layers)
            self._settle()
        lengths = torch.tensor(self.lengths, device=device)
        output = self._lm.model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            attention_mask=self._mask(lengths + 1),
            position_ids=lengths[:, None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._end += 1
        self.lengths = [length + 1 for length in self.lengths]
        return output.logits[:, -1]

    def _mask(self, lengths: Int[Tensor, " rows"]) -> Int[Tensor, "rows columns"]:
        width = self._end + 1 - self._start
        columns = torch.arange(width, device=lengths.device)
        return (columns >= width - lengths[:, None]).long()

    def _settle(self) -> None:
        """Columns that are padding for every row leave the view."""
        self._start = self._end - max(self.lengths, default=0)
        if not self.lengths and self._capacity[1] > _KEPT_COLUMNS:
            self._layers, self._cache = [], None
        for layer in self._layers:
            layer.view(len(self.lengths), self._start, self._end)

    def _make_room(self, rows: int, longest: int, like: Sequence[Any]) -> None:
        """Place the window so that `rows` fit, `longest` columns lie before its end and some after it."""
        had_rows, columns = self._capacity
        used = max(self.lengths, default=0)
        width = max(used, longest)
        fits = width <= self._end < columns if used else False
        if rows <= had_rows and fits:
            return
        wanted = width + max(_ROOM, width // 4)
        end = min(max(width, self._end), columns - 1) if fits else width
        room = (max(rows, _ROWS, 2 * had_rows if rows > had_rows else had_rows), max(columns, wanted))
        for layer, source in zip(self._layers, like, strict=True):
            layer.buffers = tuple(  # type: ignore[assignment]  (two of them)
                self._moved(old, states, room, used, end)
                for old, states in zip(layer.buffers or (None, None), (source.keys, source.values), strict=True)
            )
        self._end = end

    def _moved(self, old: Tensor | None, like: Tensor, room: tuple[int, int], used: int, end: int) -> Tensor:
        """A buffer of size `room` with the window's `used` columns ending at `end`."""
        rows = len(self.lengths)
        held = None if old is None else old[:rows, :, self._end - used : self._end]
        if old is not None and (old.shape[0], old.shape[2]) == room:
            held = held.clone() if held is not None else None
            target = old.zero_()
        else:
            target = like.new_zeros((room[0], like.shape[1], room[1], like.shape[3]))
        if held is not None:
            target[:rows, :, end - used : end] = held
        return target


def _write(buffer: Tensor, row: int, end: int, states: Float[Tensor, "heads pos dim"]) -> None:
    """Put a row's states so that they end at `end`. What stood before them is zeroed: padding is masked by a weight of
    0, which another row's infinite leftovers would survive."""
    start = end - states.shape[1]
    buffer[row, :, :start] = 0
    buffer[row, :, start:end] = states
