"""Where edits act in the pass at hand: each scope's columns, times the rows whose branch fired.

While a reply is decoded token by token nothing about this changes, so it is worked out once and then held, together
with what to do at each site.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Bool, Float, Int
from torch import Tensor

from clampdown.steering.batch_state import BatchState
from clampdown.steering.fused import decoding_step
from clampdown.steering.passes import Pass
from clampdown.steering.program import Reach
from clampdown.steering.scopes import SCOPES
from clampdown.steering.turn_start import columns_real, numbered


@dataclass
class PassWeights:
    """`by_reach` is what the edits of a pass are multiplied with. `real` says which of its columns hold tokens (None:
    all), and `reached` which scopes ever covered one."""

    by_reach: dict[Reach, Float[Tensor, "rows pos"]] = field(default_factory=dict)
    real: Bool[Tensor, "rows pos"] | None = None
    reached: set[str] = field(default_factory=set)
    _masks: dict[str, Bool[Tensor, "rows pos"]] = field(default_factory=dict)

    def open(self, state: BatchState, now: Pass) -> None:
        """For the columns that this pass computes."""
        decoding = now.width == 1 and now.past >= state.prompt_width
        if decoding and state.constant is not None:
            self.by_reach, self.real = state.constant, None
            return
        real = columns_real(state, now)
        window = numbered(state, real)
        scopes = {reach.scope for program in state.programs for reach in program.reaches}
        self._masks = {scope: SCOPES[scope](window) for scope in scopes}
        self.reached |= {scope for scope, mask in self._masks.items() if bool(mask.any())}
        self.real = None if decoding else real
        state.constant, state.steps = None, {}
        self.weigh(state)
        if decoding:  # from here on every pass does the same, until rows leave
            state.constant = self.by_reach
            state.steps = {program.site.name: decoding_step(program, self.by_reach) for program in state.programs}

    def weigh(self, state: BatchState) -> None:
        """Anew, because a gate has decided or rows have left."""
        acts = state.acts()
        reaches = {reach for program in state.programs for reach in program.reaches}
        self.by_reach = {reach: self._masks[reach.scope] * acts[reach.branch] for reach in reaches}

    def widen(self, state: BatchState, rows: Int[Tensor, " kept"]) -> None:
        """In the middle of a prompt's pass, go on with these rows only."""
        self._masks = {scope: mask[rows] for scope, mask in self._masks.items()}
        self.real = None if self.real is None else self.real[rows]
        self.weigh(state)
