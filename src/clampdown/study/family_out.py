"""How well a gate will do in wrappers that nobody has seen: fitted and calibrated again without each family it knows.

A family that is left out is gone from the fit altogether, the random wrappers made of its sentences included. Its own
prompts are then read by a gate that has never met it. The families are the observations: an interval over prompts alone
would be too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from clampdown.errors import NotEnoughDataError
from clampdown.evaluation.intervals import clustered, wilson
from clampdown.evaluation.suites import FAMILY, TARGET
from clampdown.steering.gate_fitting import FittedGate, Pooled
from clampdown.steering.plan import Gate
from clampdown.steering.turn_promise import conversation_maxima
from clampdown.study.progress import Tick
from clampdown.types import Interval, Prompt

Fit = Callable[[Pooled, Bool[np.ndarray, " rows"]], FittedGate]


@dataclass(frozen=True, slots=True)
class FamilyOut:
    """How often a gate finds harm in wrappers that its fit never saw: by family left out of the fit, over all of them,
    and, as the truth beside it, in the families that are tested only (None without validation prompts in them)."""

    families: Mapping[str, Interval]
    estimate: Interval
    truth: Interval | None = None


@dataclass(frozen=True, slots=True)
class Learnt:
    """What a gate is fitted on, row by row: whether it is harmful, which families it touches, and whether it is one of
    the jailbroken prompts that a left-out family is tested with."""

    pooled: Pooled
    harmful: Bool[np.ndarray, " rows"]
    families: tuple[frozenset[str], ...]
    tested: Bool[np.ndarray, " rows"]


def family_of(prompt: Prompt) -> str | None:
    """The wrapper family of a jailbroken prompt: a file's column, or the embedded corpus's category."""
    named = prompt.meta.get(FAMILY)
    return prompt.category if named == prompt.suite else named


def touched(prompt: Prompt, wrapped: Sequence[str]) -> frozenset[str]:
    """The families that a prompt shows a fit: of a prompt of the `wrapped` suites its own, and of a harmless one that
    was put into an attack's template, too."""
    put = prompt.meta.get(FAMILY) if TARGET in prompt.meta else None
    return frozenset(filter(None, [family_of(prompt) if prompt.suite in wrapped else put]))


def promising(again: FittedGate, benign: Pooled, like: Gate, budget: float, confidence: float) -> FittedGate:
    """A gate that was fitted again, its threshold set on benign turns as that of the gate itself was."""
    scores = again.scores(benign)
    maxima = conversation_maxima(scores, np.arange(len(scores)), max(1, like.turns_calibrated))
    return again.calibrated(maxima, budget=budget, confidence=confidence)


def leave_families_out(
    learnt: Learnt, fit: Fit, calibrated: Callable[[FittedGate], FittedGate], tick: Tick
) -> FamilyOut:
    """One fit per family. Raises `NotEnoughDataError` for prompts of fewer than two families."""
    names = sorted({name for row in np.flatnonzero(learnt.tested) for name in learnt.families[row]})
    if len(names) < 2:
        raise NotEnoughDataError(
            "the jailbroken prompts name fewer than two wrapper families", hint="a column `family`"
        )
    flags: dict[str, list[bool]] = {}
    for done, name in enumerate(names):
        tick(done, len(names))
        touched = np.array([name in each for each in learnt.families], dtype=bool)
        again = calibrated(fit(learnt.pooled.at(~touched), learnt.harmful[~touched]))
        scores = again.scores(learnt.pooled.at(touched & learnt.tested))
        flags[name] = (scores > again.gate.threshold).tolist()
    every = [(hit, name) for name, hits in flags.items() for hit in hits]
    estimate = clustered([hit for hit, _ in every], [name for _, name in every])
    return FamilyOut({name: wilson(sum(hits), len(hits)) for name, hits in flags.items()}, estimate)
