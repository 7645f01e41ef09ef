"""A study, end to end: find refusal features, choose on validation prompts, gate, control, read the test once, report.

1. The found clamp is swept (`sweeping.py`): finders, the choice, its curve, its gate, controls of its size.
2. With methods, both papers', dense baselines and the gated set of features are compared (`comparing.py`).
3. All arms answer the test prompts together, once. `plan.toml` is the best plan that the validation prompts chose: the
   gated set's, else the clamp behind its gate, else the clamp.
4. What too few prompts cannot show is left out, said, and kept in the summary (`left_out`); the rest goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clampdown.evaluation import controls
from clampdown.evaluation.control_arms import SYSTEM_PROMPT
from clampdown.steering.arms import BASELINE, Arm
from clampdown.steering.plan import Plan, write_plan
from clampdown.store import to_jsonable, write_feature_set
from clampdown.study.comparing import Comparison, MatchingRequest, compare_methods
from clampdown.study.frontier import write_summary
from clampdown.study.gating import GateChoice, gate_facts
from clampdown.study.groundwork import Groundwork
from clampdown.study.measure import Asked, measure_arms, methods_where_it_acts, never
from clampdown.study.methods import clamp
from clampdown.study.methods.method import plan_of
from clampdown.study.methods.table import ALL, check_methods, make_methods
from clampdown.study.progress import Stages
from clampdown.study.sizes import SMALL, Sizes
from clampdown.study.study import Study
from clampdown.study.sweeping import Sweep, sweep_found_clamp
from clampdown.types import Record, Split

PLAN = "plan.toml"


@dataclass(frozen=True, slots=True)
class StudyRequest:
    """What a study does: its sizes, which methods are compared (None: all or none, as the size says), whether the found
    clamp is swept, the gate's budget, and where methods are matched."""

    sizes: Sizes = SMALL
    methods: tuple[str, ...] | None = None
    sweep: bool = True
    gate: GateChoice = field(default_factory=GateChoice)
    matching: MatchingRequest = field(default_factory=MatchingRequest)

    @property
    def compared(self) -> tuple[str, ...]:
        """The methods by their short names."""
        return (ALL if self.sizes.methods else ()) if self.methods is None else self.methods


def run_study(study: Study, out: Path, request: StudyRequest, stages: Stages) -> dict[str, Any]:
    """Everything, into `out`; returns the summary. A run of the same settings that was interrupted goes on.

    Raises `PromptSetError` for an unknown method, and what the stages raise when nothing at all can be shown.
    """
    check_methods(request.compared)
    ground = Groundwork(study, request.sizes, stages)
    swept = sweep_found_clamp(ground, out / "validation", request.gate) if request.sweep else None
    compared, reading = None, study
    if request.compared:
        found = make_methods(ground, request.compared)
        reading = _with_gate_saes(ground, study, request.compared)
        directory = out / "validation-methods" if request.sweep else out / "validation"
        compared = compare_methods(ground, reading, found, directory, request.matching)
    plan = _best_plan(swept, compared)
    write_plan(out / PLAN, plan)
    if swept:
        for feature_set in swept.found.feature_sets:
            write_feature_set(out / "features" / f"{feature_set.finder}.json", feature_set)
    answering = request.sizes.answering
    asked = Asked(
        tuple(study.suites(Split.TEST, answering.per_suite)),
        by_likelihood=methods_where_it_acts if compared else never,
    )
    arms = _distinct(columns(swept, compared))

    def extra(records: Sequence[Record]) -> Mapping[str, Any]:
        return _extra(swept, compared, plan, stages, records)

    summary = measure_arms(reading, arms, asked, out, answering, stages, extra)
    if compared:
        summary |= to_jsonable({"claims": compared.claims(summary)})
        write_summary(out / "summary.json", summary)
    return summary


def _with_gate_saes(ground: Groundwork, study: Study, methods: Sequence[str]) -> Study:
    """The study with what CAST's gate reads beside the SAE."""
    return replace(study, more_saes=(ground.condition.sae,)) if "cast" in methods else study


def columns(swept: Sweep | None, compared: Comparison | None) -> list[Arm]:
    """All arms of the test, in the order of the table."""
    asked = controls.system_prompt_arm(SYSTEM_PROMPT)
    if swept is None:
        return [BASELINE, asked, *(compared.arms if compared else ())]
    gated = [swept.gated] if swept.gated else []
    return [BASELINE, *swept.arms, *swept.controls, asked, *gated, *(compared.arms if compared else ())]


def _distinct(arms: Sequence[Arm]) -> list[Arm]:
    """Each name once: what the sweep and the methods both show is one column."""
    return list({arm.name: arm for arm in reversed(arms)}.values())[::-1]


def _best_plan(swept: Sweep | None, compared: Comparison | None) -> Plan:
    best = compared.best if compared else None
    if best is not None:
        return best
    if swept is not None:
        return plan_of(swept.gated or swept.chosen)
    assert compared is not None, "a study sweeps or compares"
    return plan_of(next(iter(compared.chosen.values())).arm)


def _extra(
    swept: Sweep | None, compared: Comparison | None, plan: Plan, stages: Stages, records: Sequence[Record]
) -> dict[str, Any]:
    """Further top-level keys of the summary."""
    found: dict[str, Any] = {"split": Split.TEST.value, "strength_unit": "raw activation", "plan": plan.name}
    if swept:
        found |= {"chosen": swept.facts, "controls": swept.matching}
        if swept.gated:
            found["gate"] = gate_facts(plan_of(swept.gated), records)
    elif compared and clamp.NAME in compared.chosen:
        found["chosen"] = {"arm": clamp.NAME}
    if compared:
        found |= {"methods": compared.lines, "matched_kl": compared.kl, "n_random": len(compared.random)}
    if stages.left_out:
        found["left_out"] = stages.left_out
    return found


