"""The hand-made recipe (`study/methods/gated_set.py`) as the place where `clampdown tune` begins: its edits at other
strengths, its gate with other promises, its second side behind any plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from clampdown.steering.gate_fitting import FittedGate
from clampdown.steering.plan import Branch, Gate, Plan, read_plan, write_plan
from clampdown.study.groundwork import Groundwork
from clampdown.study.methods import gated_set
from clampdown.study.methods.method import plan_of
from clampdown.study.progress import Stages
from clampdown.study.sizes import Sizes
from clampdown.study.study import Study
from clampdown.study.tune.gates import GateKey, Promise, calibrated
from clampdown.study.tune.prompts import PromptSets, Scale
from clampdown.study.tune.search import HAND_MADE, Combination, Setting
from clampdown.types import Split, Suite


def hand_made(
    study: Study, sets: PromptSets, scale: Scale, units: Mapping[int, float], out: Path, stages: Stages
) -> Plan | None:
    """What the recipe of `gated_set.py` makes of the first feature: two-sided, or with one side where the prompts
    cannot carry a second. Of validation prompts it sees the trials' alone. None, and that is said, where it cannot be
    made."""
    path = out / "hand-made.toml"
    if not path.exists():
        with stages.attempt("the hand-made recipe"):
            sizes = Sizes(scale.discovery, scale.trial, scale.screened, 1, scale.calibration, scale.test)
            feature, unit = next(iter(units.items()))
            found = gated_set.search(Groundwork(_of_trials(study, sets), sizes, stages), feature, unit)
            write_plan(path, plan_of(found[-1]))
    return read_plan(path) if path.exists() else None


def _of_trials(study: Study, sets: PromptSets) -> Study:
    """The study with the trials' validation prompts and no others."""
    trial, drawn = {suite.name: suite for suite in sets.trial}, study.data.draw

    def draw(name: str, split: Split, n: int | None) -> Suite:
        if split is not Split.VALIDATION:
            return drawn(name, split, n)
        found = trial.get(name) or replace(drawn(name, split, 1), prompts=())
        return found if n is None else found.take(n)

    return replace(study, data=replace(study.data, draw=draw))


def _up_gate(made: Plan) -> Gate:
    gate = made.otherwise.gate if made.otherwise else made.gate
    assert gate is not None and gate.guarantee is not None, "hand-made plans have calibrated gates"
    return gate


def hand_made_gates(
    study: Study, sets: PromptSets, made: Plan, promises: Iterable[Promise]
) -> dict[GateKey, FittedGate]:
    """The hand-made gate as it is, and with every other promise that the calibration prompts can prove."""
    gate = _up_gate(made)
    assert gate.guarantee is not None
    found = calibrated(study, FittedGate(gate, {}), gate.window, sets.calibration.prompts, promises)
    own = (gate.guarantee.budget, gate.guarantee.confidence)
    return {(HAND_MADE, *promise): each for promise, each in {**found, own: FittedGate(gate, {})}.items()}


def starts_of(combination: Combination, made: Plan) -> tuple[Setting, ...]:
    promise = _up_gate(made).guarantee
    assert promise is not None
    sides = (False, True) if made.otherwise else (False,)
    return tuple(Setting(combination, 1.0, HAND_MADE, promise.budget, promise.confidence, down) for down in sides)


def stretched(plan: Plan, multiple: float) -> Plan:
    """With the first edit's strengths times a number; what is held down stays as it is."""
    first, *others = plan.edits
    stronger = first.changed(strengths=tuple(multiple * strength for strength in first.strengths))
    return plan.changed(edits=(stronger, *others))


def with_second_side(plan: Plan, two_sided: Plan) -> Plan:
    """Asked first: what the two-sided plan does down, behind its own gate; otherwise the plan."""
    assert plan.gate is not None, "a plan that always steers has no room for a second side"
    up = Branch(gate=plan.gate, edits=plan.edits)
    return plan.changed(edits=two_sided.edits, gate=two_sided.gate, otherwise=up)
