"""What a `steer` block knows about the batch it is steering, from the prompt's pass on, and what it has counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clampdown.steering.fused import Step
from clampdown.steering.program import GateProgram, Reach, SiteProgram
from clampdown.types import BRANCHES


@dataclass
class Turn:
    """One batch of conversations from its prefill on. `alive[i]` is the original row of current row i, `prompt_of[i]`
    its prompt among the `n_prompts` that the model was called with; while `narrow`, hidden states are one per prompt.
    A pass computes the columns from `start` up to `seen`. `constant` holds the scopes' row factors while decoding, and
    `steps` what to do with them per site.
    """

    programs: tuple[SiteProgram, ...]
    gates: tuple[GateProgram, ...]
    alive: Int[Tensor, " rows"]
    opened: Bool[Tensor, "branches rows"]
    prompt_of: Int[Tensor, " rows"]
    n_prompts: int
    prompt_width: int
    prompt_ids: Int[Tensor, "prompts prompt"] | None
    real: Bool[Tensor, "rows columns"]
    narrow: bool = False
    start: int = 0
    seen: int = 0
    assistant_start: int | None = None
    last_user: Bool[Tensor, "rows prompt"] | None = None
    constant: dict[Reach, Float[Tensor, "rows 1"]] | None = None
    steps: Mapping[str, Step | None] = field(default_factory=dict)
    cache: Any = None

    @property
    def fired(self) -> Bool[Tensor, "branches rows"]:
        """Which branch of each row's plan acts: the first whose gate opened, or none. Without a gate it is branch 0."""
        return self.opened & (self.opened.cumsum(0) == 1)

    def acts(self) -> Float[Tensor, "branches rows 1"]:
        """1 where a branch acts, else 0: one column for all positions."""
        return self.fired.float().unsqueeze(-1)


@dataclass
class Tally:
    """What the receipts report, per original row. `pending` holds (x', x) of passes not counted yet."""

    touched: Float[Tensor, " rows"]
    norm: Float[Tensor, " rows"]
    gate_score: Float[Tensor, "branches rows"]
    fired: Bool[Tensor, "branches rows"]
    pending: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def empty(cls, n: int, device: torch.device) -> Tally:
        touched, norm = torch.zeros(2, n, device=device)
        score = torch.zeros(len(BRANCHES), n, device=device)
        return cls(touched, norm, score, torch.zeros_like(score, dtype=torch.bool))

    def restart(self) -> None:
        """Without a cache each pass edits every column again: only the last pass counts."""
        self.pending.clear()
        self.touched.zero_()
        self.norm.zero_()

    def flush(self, alive: Int[Tensor, " rows"]) -> None:
        """Reduce the kept pairs to counts and norms, all passes at once: they hold the same rows."""
        if not self.pending:
            return
        changed = torch.cat([changed for changed, _ in self.pending], dim=1)
        x = torch.cat([x for _, x in self.pending], dim=1)
        touched, relative = edit_sizes(changed, x)
        self.touched.index_add_(0, alive, touched.sum(1))
        self.norm.index_add_(0, alive, relative.sum(1))
        self.pending.clear()


def edit_sizes(
    changed: Float[Tensor, "rows pos d_model"], x: Float[Tensor, "rows pos d_model"]
) -> tuple[Float[Tensor, "rows pos"], Float[Tensor, "rows pos"]]:
    """Per position: 1 if it was changed at all, and ||x'-x|| / ||x||."""
    size = torch.linalg.vector_norm(changed - x, dim=-1, dtype=torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).clamp(min=1e-12)
    return (size > 0).float(), size / length


def real_columns(
    ids: Tensor | None, mask: Tensor | None, n_rows: int, width: int, device: torch.device, pad: int | None
) -> Bool[Tensor, "rows columns"]:
    """Which columns hold tokens. Without a 2-D mask (static caches send 4-D ones) a leading run of pads is padding."""
    if mask is not None:
        return mask[:, :width].bool()
    if ids is None or pad is None:
        return torch.ones(n_rows, width, dtype=torch.bool, device=device)
    return (ids != pad).cumsum(1) > 0


def columns_real(turn: Turn, start: int, width: int, mask: Tensor | None) -> Bool[Tensor, "rows pos"]:
    if start == 0 and mask is not None:
        return mask[:, :width].bool()
    if start == 0:
        grown = torch.ones(len(turn.alive), width, dtype=torch.bool, device=turn.real.device)
        known = min(width, turn.real.shape[1])
        grown[:, :known] = turn.real[:, :known]
        return grown
    if mask is not None and mask.shape[1] >= start + width:
        return mask[:, start : start + width].bool()
    return torch.ones(len(turn.alive), width, dtype=torch.bool, device=turn.real.device)
