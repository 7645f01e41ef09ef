"""What a gate's threshold promises, from scores that were read once.

A threshold that was fixed before the calibration prompts were read has the exact (Clopper-Pearson) bound. On a page one
looks first and chooses then. A threshold with k of the n calibration scores above it is no lower than the (k+1)-th
largest score, and there are n of those: with a confidence of 1 - (1 - c) / n for each (Bonferroni), the bound holds for
whichever is chosen. That second bound is what a plan saved with a moved threshold states.
"""

from __future__ import annotations

from dataclasses import dataclass

from clampdown.errors import NotEnoughDataError
from clampdown.steering.gates import upper_bound
from clampdown.steering.plan import Guarantee
from clampdown.types import Interval

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class SuiteScores:
    """The gate's scores on one suite's validation prompts. `harmful`: the gate should fire."""

    suite: str
    harmful: bool
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class GateScores:
    """The gate's scores on benign calibration prompts, and on each suite's validation prompts."""

    benign: tuple[float, ...]
    suites: tuple[SuiteScores, ...]

    @property
    def span(self) -> tuple[float, float]:
        """The lowest and the highest score of all."""
        every = [*self.benign, *(score for suite in self.suites for score in suite.scores)]
        return min(every), max(every)


@dataclass(frozen=True, slots=True)
class Rate:
    """How often the gate fires on one suite."""

    suite: str
    harmful: bool
    fires: Interval


@dataclass(frozen=True, slots=True)
class Promise:
    """A threshold and what is known of it. `bound` is for a threshold that was fixed before, `bound_any` for one that
    was chosen after looking."""

    threshold: float
    confidence: float
    n: int
    triggered: int
    bound: float
    bound_any: float
    rates: tuple[Rate, ...]

    @property
    def guarantee(self) -> Guarantee:
        """What a plan with this threshold may state: it was chosen after looking."""
        return Guarantee(
            budget=self.bound_any,
            confidence=self.confidence,
            n=self.n,
            triggered=self.triggered,
            bound=self.bound_any,
        )


def promise(scores: GateScores, threshold: float, confidence: float = CONFIDENCE) -> Promise:
    """Recompute everything for a threshold. Raises `NotEnoughDataError` without calibration prompts."""
    n = len(scores.benign)
    if not n:
        raise NotEnoughDataError("there are no benign calibration prompts", hint="give some with --prompts")
    triggered = _above(scores.benign, threshold)
    return Promise(
        threshold,
        confidence,
        n,
        triggered,
        upper_bound(triggered, n, confidence),
        upper_bound(triggered, n, 1 - (1 - confidence) / n),
        tuple(
            Rate(s.suite, s.harmful, Interval.of_rate(_above(s.scores, threshold), len(s.scores)))
            for s in scores.suites
        ),
    )


def _above(scores: tuple[float, ...], threshold: float) -> int:
    return sum(score > threshold for score in scores)
