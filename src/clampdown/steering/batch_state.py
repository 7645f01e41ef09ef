"""What a `steer` block knows about the batch it is steering, from the prompt's first pass on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clampdown.steering.fused import Step
from clampdown.steering.gate_programs import GateProgram
from clampdown.steering.generate_calls import GenerateCall
from clampdown.steering.passes import aligned
from clampdown.steering.program import Reach, SiteProgram
from clampdown.steering.turn_reading import GateReading


@dataclass
class BatchState:
    """One turn of a batch of conversations. `alive[i]` is the original row of current row i, `prompt_of[i]` its prompt
    among the `n_prompts` that the model was called with; while `narrow`, hidden states are one per prompt.

    The prompt is the columns below `prompt_width`, those before the turn included; `real` says which columns known at
    the beginning hold tokens, and `shift` by how many columns each prompt ends too early (None: none does). `call` is
    the library call that the turn answers. A pass computes the columns from `start` up to `seen`; `unread` while it
    holds a whole prompt that gates are to read, and `awaits_verdict` until it is known how they will.

    `factor` is what a branch's edits are multiplied with where it acts: 1, or what its gate's score says.

    `constant` holds the scopes' row factors while decoding, and `steps` what to do with them per site. `read_ahead`
    is what gates that read turn by turn found, by branch and row.
    """

    programs: tuple[SiteProgram, ...]
    gates: tuple[GateProgram, ...]
    alive: Int[Tensor, " rows"]
    opened: Bool[Tensor, "branches rows"]
    factor: Float[Tensor, "branches rows"]
    prompt_of: Int[Tensor, " rows"]
    n_prompts: int
    prompt_width: int
    prompt_ids: Int[Tensor, "prompts prompt"] | None
    real: Bool[Tensor, "rows columns"]
    shift: Int[Tensor, " prompts"] | None = None
    call: GenerateCall | None = None
    narrow: bool = False
    start: int = 0
    seen: int = 0
    awaits_verdict: bool = True
    unread: bool = False
    assistant_start: int | None = None
    last_user: Bool[Tensor, "rows prompt"] | None = None
    constant: dict[Reach, Float[Tensor, "rows 1"]] | None = None
    steps: Mapping[str, Step | None] = field(default_factory=dict)
    cache: Any = None
    read_ahead: Mapping[tuple[int, int], GateReading] = field(default_factory=dict)

    @property
    def fired(self) -> Bool[Tensor, "branches rows"]:
        """Which branch of each row's plan acts: the first whose gate opened, or none. Without a gate it is branch 0."""
        return self.opened & (self.opened.cumsum(0) == 1)

    def acts(self) -> Float[Tensor, "branches rows 1"]:
        """A branch's factor where it acts, else 0: one column for all positions."""
        return torch.where(self.fired, self.factor, 0.0).unsqueeze(-1)

    @property
    def row_shift(self) -> Int[Tensor, " rows"] | None:
        return None if self.shift is None else self.shift[self.prompt_of]

    @property
    def prompts(self) -> Int[Tensor, "prompts prompt"]:
        """The prompts' tokens, every prompt ending in the last column."""
        assert self.prompt_ids is not None, "who asks for tokens has made sure that they are known"
        return aligned(self.prompt_ids, self.shift)

    @property
    def real_prompts(self) -> Bool[Tensor, "prompts prompt"]:
        """Which columns of `prompts` hold tokens. Of a prompt that no row shows any more nothing is known: False."""
        real = torch.zeros(self.n_prompts, self.prompt_width, dtype=torch.bool, device=self.real.device)
        real[self.prompt_of] = self.real[:, : self.prompt_width]
        return aligned(real, self.shift)

    def keep_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these of the current rows only."""
        self.alive, self.opened, self.real = self.alive[rows], self.opened[:, rows], self.real[rows]
        self.factor = self.factor[:, rows]
        self.prompt_of = self.prompt_of[rows]
        self.programs = tuple(program.at(rows) for program in self.programs)
        self.constant, self.steps = None, {}
        if self.last_user is not None:
            self.last_user = self.last_user[rows]
