"""Past runs, and which of their arms can be steered with."""

from __future__ import annotations

from dataclasses import dataclass

from clampdown.results.rows import ArmResult
from clampdown.results.run import Run


@dataclass(frozen=True, slots=True)
class PastRun:
    """One run directory: its name below the directory of runs, what it found, and the digests of the plans that lie
    there."""

    name: str
    run: Run
    stored: frozenset[str]

    def loadable(self, arm: ArmResult) -> bool:
        """Whether it steers and its plan's file is there."""
        return arm.plan in self.stored

    def arm(self, name: str) -> ArmResult | None:
        return next((arm for arm in self.run.arms if arm.name == name), None)
