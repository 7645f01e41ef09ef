"""How often a study's gate will find harm in wrappers that nobody has seen: estimated before the test, and beside it.

The estimate leaves each known wrapper family out of the fit (`family_out.py`) and never touches the test split. The
truth is how often the gate fired on test prompts in held-out families, which no fit, threshold or choice saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool

from clampdown.errors import NotEnoughDataError
from clampdown.evaluation.intervals import wilson
from clampdown.steering.gate_fitting import FittedGate, Pooled
from clampdown.steering.gates import fit_probe
from clampdown.steering.plan import Gate
from clampdown.steering.turn_promise import last_turns
from clampdown.study.family_out import Learnt, leave_families_out, promising
from clampdown.study.gating import GateChoice, Lessons, benign_once, read_pooled, ungauged
from clampdown.study.groundwork import Groundwork
from clampdown.types import Interval, PromptRole, Record

KEY = "unseen_wrappers"


def estimated(ground: Groundwork, gate: Gate, choice: GateChoice) -> dict[str, Any]:
    """By family that was left out, and over all. Raises `NotEnoughDataError` for prompts of fewer than two families."""
    study, site = ground.study, ground.study.site.name
    learnt = Lessons.discovery(ground, ground.sizes.discovery, choice.wrapped)
    wrapped = study.data.roles_of(PromptRole.JAILBROKEN)
    tested = np.array(
        [bool(f) and turn.suite in wrapped for turn, f in zip(learnt.turns, learnt.families, strict=True)]
    )
    tested[learnt.n_own :] = False
    pooled = Pooled(site, read_pooled(study, learnt.turns), {})
    benign = last_turns(benign_once(study.data, ground.sizes.calibration))
    if not benign or gate.guarantee is None:
        raise NotEnoughDataError("there are no benign calibration prompts to set thresholds on")
    shown, promise = Pooled(site, read_pooled(study, benign), {}), gate.guarantee

    def fit(some: Pooled, harmful: Bool[np.ndarray, " rows"]) -> FittedGate:
        probe = fit_probe(some.features, harmful, max_features=choice.max_features, seed=study.seed)
        return ungauged(study, probe)

    def calibrated(again: FittedGate) -> FittedGate:
        return promising(again, shown, gate, promise.budget, promise.confidence)

    rows = Learnt(pooled, learnt.harmful, learnt.families, tested)
    with ground.stages.stage("Leaving families out") as tick:
        found = leave_families_out(rows, fit, calibrated, tick)
    return {"families": dict(found.families), "estimate": found.estimate}


def with_truth(
    found: Mapping[str, Any], arm: str, held_out: Sequence[str], records: Sequence[Record]
) -> dict[str, Any]:
    """The estimate with what the arm's gate did on test prompts of held-out families."""
    fired = [bool(r.receipt.gate_fired) for r in records if r.arm == arm and r.suite in held_out and r.receipt]
    truth: Interval | None = wilson(sum(fired), len(fired)) if fired else None
    return {**found, "truth": truth}
