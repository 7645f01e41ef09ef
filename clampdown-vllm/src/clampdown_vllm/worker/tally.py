"""What was done to each position of each row, counted once however often a position was computed.

The op writes, per site and token of a pass, ||x'-x|| and ||x|| into buffers of fixed address. Afterwards they are put
where they belong: by row and position. So a position that is computed again (a preempted request, a rejected draft)
replaces what was there, and a reply's end cuts what lies behind it. A token that several sites change is one token.

A site's buffer begins each pass with -1: what is still there afterwards never went through the hook.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

REMEMBERED = 1 << 15
"""Blocks of which it is kept what was done to them."""
UNKNOWN = -1.0


class Sizes:
    """Buffers that the op writes: per site, how much each token of the pass was changed, and how long it is."""

    def __init__(self, sites: Sequence[str], tokens: int, device: str) -> None:
        self.at = {site: i for i, site in enumerate(sites)}
        self.both = torch.zeros(2, len(sites), tokens, device=device)

    def begin(self, n: int, expected: Sequence[bool]) -> None:
        """Before a pass of n tokens. Sites of which nothing is expected hold zeros."""
        self.both[:, :, :n] = 0.0
        for i, wanted in enumerate(expected):
            if wanted:
                self.both[0, i, :n] = -1.0

    def of(self, site: str, n: int) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Where a pass of n tokens writes how much it changed each, and how long each is."""
        return self.both[0, self.at[site], :n], self.both[1, self.at[site], :n]

    def write(self, site: str, delta: Float[Tensor, "tokens d_model"], length: Float[Tensor, " tokens"]) -> None:
        n = delta.shape[0]
        torch.linalg.vector_norm(delta, dim=-1, dtype=torch.float32, out=self.both[0, self.at[site], :n])
        self.both[1, self.at[site], :n] = length


@dataclass
class _Made:
    """A pass whose sizes are on their way to the host."""

    sizes: Tensor
    positions: Tensor
    rows: np.ndarray
    ready: torch.cuda.Event | None


class Tally:
    """Per row and position: how many sites changed the token, and the mean of ||x'-x|| / ||x|| over those. `lengths`
    holds, for rows that measure, how long the residual was at each site."""

    def __init__(self, sizes: Sizes, positions: Int[Tensor, " tokens"], rows: int, longest: int) -> None:
        self._sizes, self._positions = sizes, positions
        self.changed = np.zeros((rows, longest), dtype=bool)
        self.norm = np.zeros((rows, longest), dtype=np.float32)
        self.lengths: dict[int, np.ndarray] = {}
        self.missed: set[int] = set()
        self._pending: deque[_Made] = deque()
        self._longest, self._used = longest, np.zeros(rows, dtype=np.int64)
        self._known: OrderedDict[Hashable, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def start(self, row: int, measures: bool) -> None:
        """The row is somebody else's from here on."""
        self.settle()
        self.changed[row, : self._used[row]], self.norm[row, : self._used[row]] = False, 0.0
        self._used[row] = 0
        self.missed.discard(row)
        self.lengths.pop(row, None)
        if measures:
            self.lengths[row] = np.zeros((len(self._sizes.at), self._longest), dtype=np.float32)

    def made(self, rows: np.ndarray) -> None:
        """A pass was made: `rows` are those of its tokens, -1 for nobody's."""
        n = len(rows)
        sizes, positions = self._sizes.both[:, :, :n], self._positions[:n]
        ready = None
        if sizes.is_cuda:
            sizes, positions = (t.to("cpu", non_blocking=True) for t in (sizes, positions))
            ready = torch.cuda.Event()
            ready.record()
        self._pending.append(_Made(sizes, positions, rows, ready))
        if ready is None:
            self.settle()
        while self._pending and self._pending[0].ready is not None and self._pending[0].ready.query():
            self._count(self._pending.popleft())

    def settle(self) -> None:
        """Count every pass made so far."""
        while self._pending:
            made = self._pending.popleft()
            if made.ready is not None:
                made.ready.synchronize()
            self._count(made)

    def _count(self, made: _Made) -> None:
        mine = np.flatnonzero(made.rows >= 0)
        if not len(mine):
            return
        rows, at = made.rows[mine], made.positions.numpy()[mine]
        size, length = made.sizes.numpy()[:, :, mine]
        lost = (size < 0).any(0)
        if lost.any():
            self.missed.update(rows[lost].tolist())
        changed = size != 0  # what is no number any more was changed
        sites = changed.sum(0)
        norm = np.where(changed, size / np.maximum(length, 1e-12), 0.0).sum(0) / np.maximum(sites, 1)
        self.changed[rows, at], self.norm[rows, at] = sites > 0, norm
        np.maximum.at(self._used, rows, at + 1)
        for row in self.lengths.keys() & set(rows.tolist()):
            own = rows == row
            self.lengths[row][:, at[own]] = length[:, own]

    def totals(self, row: int, end: int) -> tuple[int, float]:
        """Tokens before `end` that were changed, and the mean of their sizes."""
        self.settle()
        changed = self.changed[row, :end]
        return int(changed.sum()), mean_size(changed, self.norm[row, :end])

    # ---- blocks that come from the prefix cache --------------------------------------------------------------

    def remember(self, row: int, keys: Sequence[Hashable], size: int, first: int = 0) -> None:
        """Keep what was done to the row's blocks from `first` on, by what makes them what they are."""
        self.settle()
        for block, key in enumerate(keys):
            if block < first:
                continue
            span = slice(block * size, (block + 1) * size)
            self._known[key] = (self.changed[row, span].copy(), self.norm[row, span].copy())
            self._known.move_to_end(key)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def recall(self, row: int, keys: Sequence[Hashable], size: int) -> list[int]:
        """Take what was done to cached blocks over into a row; returns the blocks of which nobody knows."""
        unknown = []
        for block, key in enumerate(keys):
            span = slice(block * size, (block + 1) * size)
            if key in self._known:
                self.changed[row, span], self.norm[row, span] = self._known[key]
                self._used[row] = max(self._used[row], span.stop)
            else:
                unknown.append(block)
        return unknown

    def unmeasured(self, row: int, low: int, high: int) -> None:
        """These positions were changed, nobody knows by how much."""
        self.changed[row, low:high], self.norm[row, low:high] = True, UNKNOWN
        self._used[row] = max(self._used[row], high)


def mean_size(changed: np.ndarray, norm: np.ndarray) -> float:
    """Of the changed positions whose size is known; 0.0 when there are none."""
    known = norm[changed & (norm != UNKNOWN)]
    return float(known.mean()) if len(known) else 0.0
