"""How much an attacker may spend, and how much of it is gone."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Budget:
    """For each objective under each arm: `queries` replies of black-box attacks, `steps` of each search with gradients,
    with `candidates` changed tokens per step. `seconds` bounds each attack on each arm; None: no bound."""

    queries: int = 200
    steps: int = 200
    candidates: int = 16
    suffix_tokens: int = 12
    seconds: float | None = None


@dataclass(slots=True)
class Clock:
    """Runs from when it was made. `ran_out` is remembered: what a clock stopped says so."""

    seconds: float | None
    began: float = field(default_factory=time.monotonic)
    ran_out: bool = False

    def over(self) -> bool:
        self.ran_out = self.ran_out or (self.seconds is not None and time.monotonic() - self.began >= self.seconds)
        return self.ran_out
