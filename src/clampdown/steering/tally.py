"""What a `steer` block has counted: at how many sites each column of each row was changed, and by how much.

Columns are kept apart until somebody asks. A cache that is cut back (a guess at the reply that was rejected, a point
from which to go on differently) takes the counts of its columns with it. A token that several sites change is one
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clampdown.types import BRANCHES

FLUSH_EVERY = 32
"""Passes whose tensors are kept before they are reduced."""


@dataclass(frozen=True, slots=True)
class Change:
    """What one site did in one pass: x' and x of the columns from `start` on. `real` is False on padding; None where
    there is none."""

    start: int
    changed: Float[Tensor, "rows pos d_model"]
    x: Float[Tensor, "rows pos d_model"]
    real: Bool[Tensor, "rows pos"] | None = None

    @property
    def columns(self) -> range:
        return range(self.start, self.start + self.x.shape[1])


def edit_sizes(changes: Sequence[Change]) -> tuple[Float[Tensor, "rows pos"], Float[Tensor, "rows pos"]]:
    """Per position, one change after the other: 1 if it was changed at all, and ||x'-x|| / ||x||. What is no number any
    more was changed."""
    changed = torch.cat([change.changed for change in changes], dim=1)
    x = torch.cat([change.x for change in changes], dim=1)
    size = torch.linalg.vector_norm(changed - x, dim=-1, dtype=torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).clamp(min=1e-12)
    touched, relative = (size != 0).float(), size / length
    if all(change.real is None for change in changes):
        return touched, relative
    real = torch.cat([_real(change) for change in changes], dim=1)
    return touched * real, torch.where(real, relative, 0.0)


def _real(change: Change) -> Bool[Tensor, "rows pos"]:
    return (
        torch.ones(change.x.shape[:2], dtype=torch.bool, device=change.x.device) if change.real is None else change.real
    )


def over_sites(
    sites: Float[Tensor, "rows pos"], sizes: Float[Tensor, "rows pos"]
) -> tuple[Float[Tensor, "rows pos"], Float[Tensor, "rows pos"]]:
    """Per position: 1 if any site changed it, and the mean size over the sites that did."""
    return (sites > 0).float(), sizes / sites.clamp(min=1)


@dataclass
class Tally:
    """Per original row. `pending` holds changes that are not counted yet; `counts` holds, per column, the number of
    sites that changed it and the sum of the sizes. `gate_score`, `fired` and `factor` are the turn's verdicts."""

    gate_score: Float[Tensor, "branches rows"]
    fired: Bool[Tensor, "branches rows"]
    counts: Float[Tensor, "2 rows columns"]
    factor: Float[Tensor, "branches rows"]
    pending: list[Change] = field(default_factory=list)

    @classmethod
    def empty(cls, n: int, device: torch.device) -> Tally:
        score = torch.zeros(len(BRANCHES), n, device=device)
        shut, none = torch.zeros_like(score, dtype=torch.bool), torch.zeros(2, n, 0, device=device)
        return cls(score, shut, none, torch.ones_like(score))

    def restart(self) -> None:
        """Forget what was counted. Without a cache each pass edits every column again: only the last pass counts."""
        self.pending.clear()
        self.counts = self.counts[:, :, :0]

    def flush(self, alive: Int[Tensor, " rows"]) -> None:
        """Count the kept changes, all passes at once: they hold the same rows."""
        if not self.pending:
            return
        touched, sizes = edit_sizes(self.pending)
        columns = [column for change in self.pending for column in change.columns]
        first, end = min(columns), max(columns) + 1
        at = torch.tensor(columns, device=sizes.device) - first
        part = torch.zeros(2, len(alive), end - first, device=sizes.device)
        part.index_add_(2, at, torch.stack([touched, sizes]))
        if end > self.counts.shape[2]:
            self.counts = torch.nn.functional.pad(self.counts, (0, end + end // 2 - self.counts.shape[2]))
        self.counts[:, :, first:end].index_add_(1, alive, part)
        self.pending.clear()

    def cut(self, end: int | Int[Tensor, " rows"]) -> None:
        """Forget the columns from `end` on; one number for all rows, or one for each. After `flush`."""
        if isinstance(end, int):
            self.counts = self.counts[:, :, :end]
        else:
            kept = torch.arange(self.counts.shape[2], device=end.device) < end.unsqueeze(1)
            self.counts = torch.where(kept, self.counts, 0.0)

    def totals(self) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
        """Tokens that were changed, and the sum of their sizes. After `flush`."""
        touched, sizes = over_sites(*self.counts)
        return touched.sum(1), sizes.sum(1)
