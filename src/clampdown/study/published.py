"""A published method run as its paper runs it: its own choice on validation prompts, its own curve, beside controls.

What `clampdown recipe` shows: the method's arms, the chosen one behind a gate (which neither paper has), and controls
of the chosen plan's own size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clampdown.discovery.contrast import ContrastSettings
from clampdown.evaluation import utility
from clampdown.evaluation.control_arms import Control, Matching, Material, control_arms
from clampdown.steering.arms import BASELINE, Arm
from clampdown.steering.plan import Plan
from clampdown.study.gating import GateChoice, gate_plan
from clampdown.study.groundwork import Groundwork
from clampdown.study.measure import benign_replies, generate_records
from clampdown.study.methods.method import Method, Picked, plan_of
from clampdown.study.strengths import candidates
from clampdown.types import ATTACKS, SAFE, ArmKind, Judge, Prompt, Split

QUANTITIES = {"edit": "mean ||x'-x|| / ||x|| on benign text", "kl": "KL on benign text, nats per token"}
"""What controls are brought to the plan's own size in."""


@dataclass(frozen=True, slots=True)
class ControlsRequest:
    """How many random features, what they are matched on (a key of `QUANTITIES`), on how many benign texts, and which
    feature is the unrelated one (None: one is looked for)."""

    random: int = 20
    match: str = "edit"
    texts: int = 16
    unrelated: int | None = None


@dataclass(frozen=True, slots=True)
class PublishedRequest:
    """The method, the gate for its choice and its controls (None leaves them out), and what its finder reads: one
    prompt, contrast settings, who tells refusals. `pipeline` is a hash of all settings, `make`'s own among them."""

    make: Callable[[Groundwork], Method]
    gate: GateChoice | None = None
    controls: ControlsRequest | None = None
    only: Prompt | None = None
    settings: ContrastSettings | None = None
    refusal_judge: Judge | None = None
    pipeline: str = ""

    def prepared(self, ground: Groundwork) -> Groundwork:
        """The groundwork as this method reads it."""
        settings = self.settings or ground.settings
        return replace(ground, only=self.only, settings=settings, refusal_judge=self.refusal_judge)


@dataclass(frozen=True, slots=True)
class Published:
    """The method, its choice (with its gate), all its arms, and its controls."""

    method: Method
    chosen: Arm
    gated: Arm | None
    arms: tuple[Arm, ...]
    controls: tuple[Control, ...]
    facts: dict[str, Any]
    matched_on: str | None

    @property
    def columns(self) -> tuple[Arm, ...]:
        """In the order of the table."""
        gated = (self.gated,) if self.gated else ()
        return (*self.arms, *gated, *(control.arm for control in self.controls if control.arm))


def run_published(ground: Groundwork, request: PublishedRequest, directory: Path) -> Published:
    """Propose, choose on validation attacks (a run in `directory`), gate, control."""
    with ground.stages.stage("Finding features"):
        method = request.make(ground)
    picked = _choose(ground, method, directory)
    chosen, note = picked.as_column(method).arm, picked.note
    arms = method.shown(chosen)
    same = next((arm for arm in arms if plan_of(arm).digest == plan_of(chosen).digest), None)
    arms = arms if same else (chosen, *arms)
    chosen = same or chosen
    gated = None
    if request.gate is not None:
        with ground.stages.stage("Calibrating the gate"), ground.stages.attempt("the choice behind a gate"):
            plan = gate_plan(ground, plan_of(chosen), request.gate)
            gated = Arm(plan.name, ArmKind.GATED, plan, chosen.strength, group="gated")
    controls = _controls(ground, plan_of(chosen), request.controls) if request.controls else ()
    facts = method.facts | {"note": note or method.facts.get("note", "")}
    matched_on = QUANTITIES[request.controls.match] if request.controls else None
    return Published(method, chosen, gated, arms, controls, facts, matched_on)


def _choose(ground: Groundwork, method: Method, directory: Path) -> Picked:
    """The arm that validation prompts choose by generated, judged replies, and what is to be said about it."""
    suites = ground.study.data.known(Split.VALIDATION, ground.sizes.validation, *ATTACKS)
    answering = replace(ground.sizes.answering, per_suite=ground.sizes.validation)
    records = generate_records(
        ground.study, [BASELINE, *method.arms], suites, directory, answering, ground.stages, "Choosing on validation"
    )
    (unsteered,) = candidates([BASELINE], records, suites)
    return method.chosen(candidates(method.arms, records, suites), unsteered)


def _controls(ground: Groundwork, plan: Plan, request: ControlsRequest) -> tuple[Control, ...]:
    """Random and unrelated features, the dense direction and a system prompt, of the chosen plan's own size."""
    study = ground.study
    suites = study.data.known(Split.VALIDATION, None, *SAFE)
    answering = replace(ground.sizes.answering, kl_prompts=request.texts)
    with ground.stages.stage("Matching controls"):
        forced = benign_replies(study.lm, suites, answering)
        measure = (utility.mean_edit if request.match == "edit" else utility.benign_kl)(study.lm, study.saes, forced)
        matching = Matching(QUANTITIES[request.match], measure, request.random, study.seed, request.unrelated)
        return control_arms(plan, Material(ground.table, ground.dense), matching)


def control_rows(of: str, matched_on: str, controls: tuple[Control, ...]) -> dict[str, Any]:
    """The controls of a plan as the summary keeps them."""
    rows = {
        control.name: {
            "arm": control.arm.name if control.arm else None,
            "goal": control.goal,
            "reached": control.reached,
            "factor": control.factor,
            "note": control.note or None,
        }
        for control in controls
    }
    return {"of": of, "matched_on": matched_on, **rows}
