"""The gate of a study's plan: a sparse probe on SAE features, fitted on discovery prompts, promising on benign ones.

It learns from harmful and harmless prompts as they are, from earlier turns of harmless conversations, and, where that
is asked for, from copies of both sides inside the same random wrappers (`wrapping.py`). Neither the fit nor the
threshold ever sees a harmful prompt in a wrapper family that is held out for testing. Too few
calibration prompts cannot prove a small budget: then the promise is the smallest that they can prove, and that is said;
above `LARGEST_BUDGET` there is no gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from clampdown.activations.collect import collect
from clampdown.activations.stream import plan_pass, read_sae
from clampdown.errors import NotEnoughDataError
from clampdown.evaluation.intervals import wilson
from clampdown.evaluation.suites import TARGET
from clampdown.steering.gate_fitting import FittedGate
from clampdown.steering.gates import Pooled, Probe, fit_probe, make_gate, prompts_needed, provable_budget
from clampdown.steering.plan import Gate, Plan
from clampdown.steering.turn_promise import TURNS, Turnwise, last_turns, longest_turn
from clampdown.study.composing import BENIGN_WRAPPED
from clampdown.study.family_out import touched
from clampdown.study.groundwork import Groundwork
from clampdown.study.prompts import StudyPrompts
from clampdown.study.study import Study
from clampdown.study.wrapping import copies, earlier_turns
from clampdown.types import ATTACKS, SAFE, Interval, Prompt, PromptRole, Record, Split

HARMLESS = (PromptRole.BENIGN, PromptRole.BORDERLINE, PromptRole.CAPABILITY)
POOLINGS = ("max", "assistant_start")
LARGEST_BUDGET = 0.25


@dataclass(frozen=True, slots=True)
class GateChoice:
    """The gate's budget: how many benign conversations may trigger it, and with what confidence; of how many turns
    they are at most; how large its probe may be; and how many copies of each prompt in random wrappers it learns
    from."""

    budget: float = 0.02
    confidence: float = 0.95
    max_features: int = 80
    turns: int = TURNS
    wrapped: int = 0


def gate_plan(ground: Groundwork, plan: Plan, choice: GateChoice | None = None, name: str | None = None) -> Plan:
    """The plan behind a gate. Raises `NotEnoughDataError` when the prompts cannot carry one."""
    choice = choice or GateChoice()
    study = ground.study
    learnt = Lessons.discovery(ground, ground.sizes.discovery, choice.wrapped)
    probe = fit_probe(
        read_pooled(study, learnt.turns), learnt.harmful, max_features=choice.max_features, seed=study.seed
    )
    return plan.behind(calibrate(ground, probe, learnt.turns, choice), name)


@dataclass(frozen=True, slots=True)
class Lessons:
    """What a probe learns from: turns, which of them are harmful, and which wrapper families each touches. Those from
    `n_own` on are copies of the first in random wrappers, and earlier turns of harmless conversations."""

    turns: tuple[Prompt, ...]
    harmful: Bool[np.ndarray, " turns"]
    families: tuple[frozenset[str], ...]
    n_own: int

    @classmethod
    def discovery(cls, ground: Groundwork, n: int, wrapped: int) -> Lessons:
        """From at most `n` discovery prompts of each suite."""
        sides = (ground.study.prompts(Split.DISCOVERY, n, *roles) for roles in (ATTACKS, HARMLESS))
        return cls.of(ground.study, *sides, wrapped=wrapped)

    @classmethod
    def of(cls, study: Study, harmful: Sequence[Prompt], harmless: Sequence[Prompt], wrapped: int) -> Lessons:
        prompts = [*harmful, *harmless]
        own, labels = last_turns(prompts), np.arange(len(prompts)) < len(harmful)
        skipped = [bool(h) or p.suite in study.data.over_refused for p, h in zip(prompts, labels, strict=True)]
        more = [*copies(own, study.data.parts, wrapped, study.seed), *earlier_turns(prompts, skipped)]
        asked = np.array([labels[copy.of] for copy in more], dtype=bool)
        known = study.data.roles_of(PromptRole.JAILBROKEN)
        families = [touched(turn, known) for turn in own]
        families += [families[copy.of] | copy.families for copy in more]
        turns = (*own, *(copy.prompt for copy in more))
        return cls(turns, np.concatenate([labels, asked]), tuple(families), len(own))


def read_pooled(study: Study, prompts: Sequence[Prompt]) -> Pooled:
    """What the gate reads: each feature's peak over the prompt, and its value where the reply is decided."""
    found = collect(plan_pass(study.lm, [read_sae(study.sae, *POOLINGS)], prompts))
    return {name: found.matrix(name) for name in POOLINGS}


def ungauged(study: Study, probe: Probe) -> FittedGate:
    """The probe as a gate whose threshold is still open."""
    return FittedGate(make_gate(study.site.name, probe, 0.0), {})


def calibrate(ground: Groundwork, probe: Probe, read: Sequence[Prompt], choice: GateChoice) -> Gate:
    """The threshold with its guarantee on conversations of benign calibration prompts. `read` was fitted on."""
    study, n = ground.study, ground.sizes.calibration
    benign = benign_once(study.data, n)
    least = check_provable(len(benign), choice.budget, confidence=choice.confidence)
    if least > choice.budget:
        ground.stages.leave_out(
            f"a gate that promises {choice.budget:.1%} of benign prompts",
            f"{len(benign)} calibration prompts can prove {least:.1%} at best, which it promises instead",
            f"{prompts_needed(choice.budget, choice.confidence)} benign calibration prompts would do",
        )
    window = longest_turn(study.lm, [*read, *benign])
    turnwise = Turnwise(study.lm, study.sae, window, choice.confidence, choice.turns)
    return turnwise.within(ungauged(study, probe), benign, max(choice.budget, least)).gate


def benign_once(data: StudyPrompts, n: int | None) -> list[Prompt]:
    """Benign calibration prompts (or other harmless ones where there are none), every request in one form: in a
    template where it has one. A promise counts prompts that are independent of each other."""
    found = data.prompts(Split.CALIBRATION, n, PromptRole.BENIGN) or data.prompts(Split.CALIBRATION, n, *SAFE)
    wrapped = {prompt.meta[TARGET] for prompt in found if prompt.suite == BENIGN_WRAPPED}
    return [prompt for prompt in found if prompt.suite == BENIGN_WRAPPED or prompt.text not in wrapped]


def check_provable(n: int, budget: float, on: str = "benign", confidence: float = 0.95) -> float:
    """The smallest budget that `n` calibration prompts can prove. Raises `NotEnoughDataError` when it is no promise."""
    least = provable_budget(n, confidence) if n else 1.0
    if least > max(budget, LARGEST_BUDGET):
        raise NotEnoughDataError(
            f"{n} {on} calibration prompts prove no useful budget (at best {least:.0%})",
            hint=f"{prompts_needed(budget, confidence)} would prove {budget:.1%}",
        )
    return least


def gate_facts(plan: Plan, records: Sequence[Record], calibrated_on: str = "benign") -> dict[str, Any]:
    """What a summary says of a plan's gate: its promise, and how often it fired on the prompts of its own arm."""
    gate = plan.gate
    assert gate is not None and gate.guarantee is not None, "a study's gates are calibrated"
    return {
        "kind": gate.kind,
        "features": gate.features,
        "threshold": gate.threshold,
        "budget": gate.guarantee.budget,
        "confidence": gate.guarantee.confidence,
        "n_calibration": gate.guarantee.n,
        "bound": gate.guarantee.bound,
        "calibrated_on": calibrated_on,
        "trigger_rates": trigger_rates(plan.name, records),
    }


def trigger_rates(arm: str, records: Sequence[Record]) -> dict[str, Interval]:
    """By suite, the share of an arm's prompts on which its gate fired."""
    fired: dict[str, list[bool]] = {}
    for record in records:
        if record.arm == arm and record.receipt is not None:
            fired.setdefault(record.suite, []).append(bool(record.receipt.gate_fired))
    return {suite: wilson(sum(flags), len(flags)) for suite, flags in fired.items()}
