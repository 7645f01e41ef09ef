"""From what was counted on one row to its receipt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clampdown.steering.plan import Plan
from clampdown.types import BRANCHES, Receipt


def make_receipt(
    plan: Plan,
    touched: float,
    norm: float,
    scores: Sequence[float],
    fired: Sequence[bool],
    read: TurnsRead | None = None,
    factors: Sequence[float] = (),
) -> Receipt:
    """`scores` and `fired` are per branch of the plan: its own gate first, then that of what it has `otherwise`.

    `read` is about a conversation of several windows; without it a gate that has them met one. `factors` are what each
    branch's edits were multiplied with where it acted.
    """
    mean = norm / touched if touched else 0.0
    if plan.gate is None:
        return Receipt(plan.name, int(touched), mean)
    read = read or (TurnsRead() if plan.gate.window else None)
    turns = (read.turns, read.worst, read.beyond) if read else (None, None, None)
    grows = any(gate.full is not None for gate in plan.gates)
    factor = next((f for f, acts in zip(factors, fired, strict=False) if acts), None) if grows else None
    if plan.otherwise is None:
        return Receipt(plan.name, int(touched), mean, scores[0], fired[0], None, None, *turns, factor)
    acted = next((name for name, acts in zip(BRANCHES, fired, strict=True) if acts), "none")
    return Receipt(plan.name, int(touched), mean, scores[0], any(fired), acted, scores[1], *turns, factor)


@dataclass(frozen=True, slots=True)
class TurnsRead:
    """What the first gate of a plan read turn by turn: how many user turns, which of them decided, and whether the
    conversation was longer than what the gate was calibrated on."""

    turns: int = 1
    worst: int = 0
    beyond: bool = False


@dataclass(frozen=True, slots=True)
class Seat:
    """One row after its prompt's pass: by what factor each branch of its plan acts on what it generates (0: not), and
    what was counted."""

    plan: Plan | None
    acts: tuple[float, ...] = (1.0, *(0.0 for _ in BRANCHES[1:]))
    touched: float = 0.0
    norm: float = 0.0
    scores: Sequence[float] = (0.0,) * len(BRANCHES)
    fired: Sequence[bool] = (False,) * len(BRANCHES)
    read: TurnsRead | None = None

    def receipt(self, touched: float = 0.0, norm: float = 0.0) -> Receipt | None:
        """With what was touched since. None without a plan."""
        if self.plan is None:
            return None
        counted = (self.touched + touched, self.norm + norm)
        return make_receipt(self.plan, *counted, self.scores, self.fired, self.read, self.acts)
