"""Gates that are read again while a reply is written: what looked harmless may be answered with something else.

1. The reply's tokens join the prompt's content tokens under `max` and `mean`; `assistant_start` keeps the prompt's
   value.
2. After every `recheck` tokens of the reply, what is pooled so far is scored. A gate above its threshold opens there,
   and its edits act from that token on. What was open stays open, and a branch that acts is not replaced by another.
3. A gate reads at or below every edit of its plan, so the scores are the unsteered model's of the same tokens.

All of it is a function of the tokens alone. So a pass that holds many tokens (a given reply, or decoding without a
cache) decides at each of them what decoding one by one would have decided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clampdown.steering.gate_kinds import GATE_POOLINGS
from clampdown.steering.program import GateProgram

State = Float[Tensor, "rows state"]
Values = Float[Tensor, "rows pos width"]
Content = Bool[Tensor, "rows pos"]


@dataclass(frozen=True, slots=True)
class Running:
    """A pooling that goes on: its state after the prompt; then, per token, what is pooled so far, and the new state."""

    start: Callable[[Values, Content], State]
    grow: Callable[[State, Values, Content], tuple[Values, State]]


def _grow_max(state: State, values: Values, content: Content) -> tuple[Values, State]:
    masked = values.masked_fill(~content.unsqueeze(-1), 0.0)
    pooled = torch.cat([state.unsqueeze(1), masked], dim=1).cummax(1).values[:, 1:]
    return pooled, pooled[:, -1]


def _summands(values: Values, content: Content) -> Float[Tensor, "rows pos wider"]:
    """The content tokens' values, and a last column that counts them."""
    mask = content.unsqueeze(-1).float()
    return torch.cat([values * mask, mask], dim=-1)


def _start_mean(values: Values, content: Content) -> State:
    return _summands(values, content).sum(1)


def _grow_mean(state: State, values: Values, content: Content) -> tuple[Values, State]:
    total = state.unsqueeze(1) + _summands(values, content).cumsum(1)
    return total[..., :-1] / total[..., -1:].clamp(min=1), total[:, -1]


def _grow_last(state: State, values: Values, content: Content) -> tuple[Values, State]:
    return state.unsqueeze(1).expand_as(values), state


RUNNING: Mapping[str, Running] = {
    "max": Running(GATE_POOLINGS["max"], _grow_max),
    "mean": Running(_start_mean, _grow_mean),
    "assistant_start": Running(GATE_POOLINGS["assistant_start"], _grow_last),
}


@dataclass(frozen=True, slots=True)
class Recheck:
    """Gates of one branch and site, and what their poolings hold of each row so far."""

    gate: GateProgram
    states: Mapping[str, State]

    @classmethod
    def after_prompt(
        cls,
        gate: GateProgram,
        x: Float[Tensor, "prompts prompt d_model"],
        content: Bool[Tensor, "prompts prompt"],
        prompt_of: Int[Tensor, " rows"] | None,
    ) -> Recheck:
        values = gate.reader.read(x.float())
        states = {name: RUNNING[name].start(values, content) for name in gate.weights}
        return cls(gate, states if prompt_of is None else {name: state[prompt_of] for name, state in states.items()})

    def at(self, rows: Int[Tensor, " kept"]) -> Recheck:
        """Of some of the rows."""
        return Recheck(self.gate.at(rows), {name: state[rows] for name, state in self.states.items()})

    def on(
        self, x: Float[Tensor, "rows pos d_model"], content: Content
    ) -> tuple[Recheck, Mapping[str, Float[Tensor, "rows pos width"]]]:
        """After more tokens, and what was pooled up to each of them."""
        values = self.gate.reader.read(x.float())
        grown = {name: RUNNING[name].grow(state, values, content) for name, state in self.states.items()}
        return replace(self, states={name: g[1] for name, g in grown.items()}), {n: g[0] for n, g in grown.items()}
