"""What a prepared model knows of its passes, as tensors: whose each token is, what was counted, and what went wrong.

Nothing here looks at a value: a graph that was traced once must do the same for every plan. Passes that are not those
of the prompts given (other tokens, gaps, pieces that a gate should have read together) are marked, and the host
asks after the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clampdown.steering.seating import PromptSpan
from clampdown.steering.slots import FOREVER, GateSlots, PromptMarks, Tokens, move_rows

FAULTS = {
    "foreign": (
        "the model was run on other tokens than the prompts that this block was given",
        "one block for each turn, its prompts padded on the left as they are given; guidance cannot be steered",
    ),
    "pieces": (
        "a prompt came in pieces, and its gate had decided before it had read them all",
        "run such a prompt in one pass, or use steer(...) on a model that is not compiled",
    ),
    "several": (
        "several tokens at once followed a prompt: guesses at the reply, or another prompt",
        "one block for each turn; decode token by token",
    ),
    "jumped": (
        "positions were computed twice or left out: tokens were taken back, or rows changed places",
        "decode greedily or by sampling, in a batch of the size that the block was given",
    ),
}
"""What a row's passes can show that no receipt could account for: what it was, and what to do."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """The fixed sizes. `features` and `directions` are slots per site, one for each different (feature or vector,
    operator, scope) in a batch; `prompt` is the longest prompt that a gate reads. `tokens` > 0 makes batches packed: it
    is the most tokens of one pass, and `rows` is the most requests."""

    rows: int
    features: int = 8
    directions: int = 2
    gate_features: int = 64
    prompt: int = 4096
    tokens: int = 0


class Passes(nn.Module):
    """What the hooks know about a pass and have counted so far, as buffers."""

    first: Tensor
    arm_of_token: Tensor
    position: Tensor
    fired: Tensor
    fresh: Tensor
    score: Tensor
    touched: Tensor
    norm: Tensor
    began: Tensor
    furthest: Tensor
    counted: Tensor
    ids: Tensor
    n_rows: Tensor
    n_passes: Tensor
    n_visits: Tensor
    endings: Tensor
    foreign: Tensor
    pieces: Tensor
    several: Tensor
    jumped: Tensor
    ends: Tensor

    def __init__(self, capacity: Capacity, n_sites: int, endings: Sequence[int], device: str) -> None:
        super().__init__()
        self.packed = capacity.tokens > 0
        self.prompt = PromptMarks(capacity.rows, capacity.prompt, device)
        rows = capacity.rows
        for name, tensor in {
            "first": torch.zeros((), dtype=torch.long),
            "arm_of_token": torch.full((capacity.tokens,), -1),
            "position": torch.zeros(capacity.tokens, dtype=torch.long),
            "fired": torch.ones(rows, dtype=torch.bool),
            "fresh": torch.zeros(rows, dtype=torch.bool),
            "score": torch.zeros(rows),
            "touched": torch.zeros(n_sites, rows),
            "norm": torch.zeros(n_sites, rows),
            "began": torch.full((rows,), -1),
            "furthest": torch.full((rows,), -1),
            "counted": torch.full((rows,), -1),
            "ids": torch.full((rows, capacity.prompt), -1),
            "n_rows": torch.zeros((), dtype=torch.long),
            "endings": torch.tensor(endings),
            "ends": torch.full((rows,), FOREVER),
            **{name: torch.zeros(rows, dtype=torch.bool) for name in FAULTS},
            "n_passes": torch.zeros((), dtype=torch.long),
            "n_visits": torch.zeros(n_sites, dtype=torch.long),
        }.items():
            self.register_buffer(name, tensor.to(device))

    def reset(self) -> None:
        for counter in (self.score, self.touched, self.norm, self.n_rows, self.n_passes, self.n_visits, *self.faults):
            counter.zero_()
        self.fired.fill_(True)
        for marks in (self.began, self.furthest, self.counted, self.ids):
            marks.fill_(-1)

    @property
    def faults(self) -> list[Tensor]:
        return [self.get_buffer(name) for name in FAULTS]

    def expect(self, prompts: Sequence[PromptSpan]) -> None:
        """Whose tokens the passes should hold."""
        self.n_rows.fill_(len(prompts))
        for row, span in enumerate(prompts):
            known = torch.tensor(span.ids[: self.ids.shape[1]], device=self.ids.device)
            self.ids[row].fill_(-1)
            self.ids[row, : len(known)] = known

    def tokens(self, shape: torch.Size) -> Tokens:
        """Rows and positions of the tokens of a residual [rows, pos, d_model], or packed [(1,) tokens, d_model]."""
        if self.packed:
            n = shape[:-1].numel()
            rows = self.arm_of_token[:n]
            return Tokens(rows.clamp(min=0), torch.where(rows < 0, -1, self.position[:n]))
        n_rows, width = shape[0], shape[1]
        columns = self.first + torch.arange(width, device=self.first.device)
        positions = columns - self.prompt.pad[:n_rows].unsqueeze(1)
        rows = torch.arange(n_rows, device=self.first.device).unsqueeze(1).expand(n_rows, width)
        return Tokens(rows.reshape(-1), positions.reshape(-1))

    def open(self, inputs: Tensor, past: Tensor | int, position_ids: Tensor | None, ids: Tensor | None) -> None:
        """Begin a pass. A row whose position 0 is in it starts a new turn."""
        if self.packed and position_ids is not None:
            flat = position_ids.reshape(-1)
            self.position[: flat.shape[0]] = flat
        elif isinstance(past, Tensor):
            self.first.copy_(past)
        else:
            self.first.fill_(past)
        tokens = self.tokens(torch.Size((*inputs.shape[:2], 1)))
        starts = torch.zeros_like(self.score).index_add_(0, tokens.rows, (tokens.positions == 0).float())
        self.fresh.copy_(starts > 0)
        self.fired.logical_or_(self.fresh)
        for tally in (self.touched, self.norm, self.score):
            tally.masked_fill_(self.fresh, 0.0)
        for mark in (self.began, self.furthest, self.counted):
            mark.masked_fill_(self.fresh, -1)
        self._look_for_faults(tokens, None if ids is None else ids.reshape(-1), inputs.shape[0])
        self.furthest.scatter_reduce_(0, tokens.rows, tokens.positions, "amax")
        within = torch.where(tokens.positions < self.ends[tokens.rows], tokens.positions, -1)
        self.counted.scatter_reduce_(0, tokens.rows, within, "amax")
        self.n_passes.add_(1)

    def _look_for_faults(self, tokens: Tokens, ids: Tensor | None, n_rows: int) -> None:
        """Whether these are the tokens that should follow in each row."""
        rows, positions = tokens
        real = positions >= 0
        first = torch.full_like(self.furthest, FOREVER)
        first.scatter_reduce_(0, rows, torch.where(real, positions, FOREVER), "amin")
        here = first < FOREVER
        self.began.copy_(torch.where(here & (self.began < 0), first, self.began))
        self.jumped.logical_or_(here & (first > 0) & (first != self.furthest + 1) & (self.furthest >= 0))
        written = torch.zeros_like(self.score).index_add_(
            0, rows, (real & (positions >= self.prompt.length[rows])).float()
        )
        self.several.logical_or_(here & (first >= self.prompt.length) & (written > 1))
        if not self.packed:
            self.jumped.logical_or_((self.n_rows > 0) & (self.n_rows != n_rows))
        if ids is not None:
            room = self.ids.shape[1]
            wanted = self.ids[rows, positions.clamp(0, room - 1)]
            known = real & (positions < room) & (wanted >= 0)
            other = torch.zeros_like(self.score).index_add_(0, rows, (known & (wanted != ids)).float())
            self.foreign.logical_or_(other > 0)
            over = real & (positions >= self.prompt.length[rows]) & torch.isin(ids, self.endings)
            self.ends.fill_(FOREVER)
            self.ends.scatter_reduce_(0, rows, torch.where(over, positions, FOREVER), "amin")

    def decide(self, gate: GateSlots, x: Float[Tensor, "tokens 1 d_model"], tokens: Tokens) -> None:
        """Let a site's gates decide for the rows whose prompt this pass holds a part of."""
        scores = gate.scores(x, tokens, self.prompt, self.fresh)
        in_prompt = (tokens.positions >= 0) & (tokens.positions < self.prompt.length[tokens.rows])
        read = torch.zeros_like(self.score).index_add_(0, tokens.rows, in_prompt.float())
        deciding = gate.gated & (read > 0)
        self.pieces.logical_or_(deciding & (read < self.prompt.length))
        self.score.copy_(torch.where(deciding, scores, self.score))
        self.fired.copy_(torch.where(deciding, scores > gate.threshold, self.fired))

    def count(
        self, site: int, delta: Float[Tensor, "tokens 1 d"], x: Float[Tensor, "tokens 1 d"], tokens: Tokens
    ) -> None:
        """What a site did. A residual that is no number any more was changed; padding never is, nor what ends a reply
        or follows its end in a batch that goes on."""
        real = (tokens.positions >= 0) & (tokens.positions < self.ends[tokens.rows])
        size = torch.linalg.vector_norm(delta.squeeze(1).detach(), dim=-1, dtype=torch.float32)
        length = torch.linalg.vector_norm(x.squeeze(1).detach(), dim=-1, dtype=torch.float32).clamp(min=1e-12)
        self.touched[site].index_add_(0, tokens.rows, ((size != 0) & real).float())
        self.norm[site].index_add_(0, tokens.rows, torch.where(real, size / length, 0.0))

    def keep_rows(self, rows: Int[Tensor, " kept"]) -> None:
        self.prompt.keep_rows(rows)
        for tensor in (
            self.fired,
            self.score,
            self.began,
            self.counted,
            self.furthest,
            self.ids,
            *self.touched,
            *self.norm,
            *self.faults,
        ):
            move_rows(tensor, rows)
        self.n_rows.fill_(len(rows))
