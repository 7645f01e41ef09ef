"""The found clamp: which finalist, at which strength and scope, chosen on validation prompts; its curve, its gate, its
controls. What `clampdown demo` shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clampdown.discovery import causal
from clampdown.errors import NotEnoughDataError, StrengthError
from clampdown.evaluation import controls, utility
from clampdown.steering import units
from clampdown.steering.arms import BASELINE, Arm
from clampdown.steering.plan import Plan
from clampdown.study.finding import Found, find_features, with_gains
from clampdown.study.gating import GateChoice, gate_plan
from clampdown.study.groundwork import Groundwork
from clampdown.study.measure import benign_replies, generate_records, renamed
from clampdown.study.methods.method import NO_GAIN, arm_of, least_broken, plan_of
from clampdown.study.strengths import Choice, Rule, candidates, choose, sweep_arms
from clampdown.types import ATTACKS, SAFE, ArmKind, PromptRole, Split, Suite

SCOPES = ("all", "prompt")
VALIDATION_MULTIPLES = {"all": (0.5, 0.75, 1.0), "prompt": (1.0, 1.5, 2.0)}
TEST_MULTIPLES = {"all": (0.25, 0.5, 0.75, 1.0, 1.25), "prompt": (0.5, 1.0, 1.25, 1.5, 2.0)}
OTHER_MULTIPLES = (0.75, 1.0)
WHERE = {"all": "every token", "prompt": "prompt only"}
UNIT_PROMPTS = 40
MATCHING_TEXTS = 16
RANDOM_TRIES = 4


@dataclass(frozen=True, slots=True)
class Sweep:
    """The found clamp as columns: the chosen arm, the same behind a gate if it could be had, all arms in the order of
    the table, the features, and what the summary says of the choice."""

    chosen: Arm
    gated: Arm | None
    arms: tuple[Arm, ...]
    controls: tuple[Arm, ...]
    found: Found
    facts: dict[str, Any]
    matching: dict[str, Any]


def sweep_found_clamp(ground: Groundwork, directory: Path, gate: GateChoice | None = None) -> Sweep:
    """Find, choose on validation prompts (a run in `directory`), gate, and match controls."""
    found = find_features(ground)
    choice = choose_clamp(ground, found, directory)
    picked = choice.chosen.arm if choice.chosen else least_broken(choice.candidates)
    chosen = in_all_units(ground, picked)
    plan, feature = plan_of(chosen), plan_of(chosen).edits[0].features[0]
    curve = _curve_arms(plan, found.unit(feature), chosen)
    shown = next(arm for arm in curve if arm.strength == chosen.strength and arm.group == _group(plan.edits[0].scope))
    shown = replace(shown, plan=plan.named(shown.name))
    curve = [shown if arm.name == shown.name else arm for arm in curve]
    gated = None
    with ground.stages.stage("Calibrating the gate"), ground.stages.attempt("the clamp behind a gate"):
        gated = Arm("", ArmKind.GATED, gate_plan(ground, plan_of(shown), gate, f"{shown.name}, gated"),
                    chosen.strength, group="gated")  # fmt: skip
        gated = replace(gated, name=plan_of(gated).name)
    with ground.stages.stage("Matching controls"):
        matched, matching = matched_controls(ground, plan_of(shown))
    facts = _facts(shown, gated, choice)
    sets = with_gains(ground, found, _gains(choice), _prompts(choosing_suites(ground)))
    return Sweep(shown, gated, tuple(curve), tuple(matched), sets, facts, matching)


# ---- the choice --------------------------------------------------------------------------------------------------


def choosing_suites(ground: Groundwork) -> tuple[Suite, ...]:
    """What the choice is made on: validation attacks of known families."""
    return ground.study.data.known(Split.VALIDATION, ground.sizes.validation, *ATTACKS)


def choose_clamp(ground: Groundwork, found: Found, directory: Path) -> Choice:
    """The finalists at a few strengths on validation prompts, and the rule's pick."""
    study, suites = ground.study, choosing_suites(ground)
    arms: list[Arm] = []
    for score, scope in itertools.product(found.finalists(ground.sizes.finalists), SCOPES):
        unit = score.scores["max_activation"]
        plan = causal.clamp_plan(study.lm, study.sae, score.feature, unit, scope)
        arms.extend(sweep_arms(plan.named(f"clamp {score.feature} {scope}"), [unit], VALIDATION_MULTIPLES[scope]))
    answering = replace(ground.sizes.answering, per_suite=ground.sizes.validation)
    records = generate_records(
        study, [BASELINE, *arms], suites, directory, answering, ground.stages, "Choosing on validation"
    )
    (unsteered,) = candidates([BASELINE], records, suites)
    return choose(candidates(arms, records, suites), Rule(), baseline=unsteered.axes.refusal or 0.0)


def _gains(choice: Choice) -> dict[int, float]:
    """Each finalist's best refusal share."""
    gains: dict[int, float] = {}
    for candidate in choice.candidates:
        if candidate.axes.refusal is not None:
            feature = plan_of(candidate.arm).edits[0].features[0]
            gains[feature] = max(gains.get(feature, 0.0), candidate.axes.refusal)
    return gains


def _prompts(suites: Sequence[Suite]) -> list[Any]:
    return [prompt for suite in suites for prompt in suite.prompts]


def in_all_units(ground: Groundwork, arm: Arm) -> Arm:
    """The arm with its plan's strengths written down in every unit, measured on discovery prompts."""
    study, plan = ground.study, plan_of(arm)
    view = study.sae.select(plan.edits[0].features)
    prompts = unit_prompts(ground, UNIT_PROMPTS)
    edit = units.measured(plan.edits[0], units.calibrate(study.lm, study.site, view, prompts))
    return replace(arm, plan=plan.changed(edits=(edit, *plan.edits[1:])))


def unit_prompts(ground: Groundwork, n: int) -> list[Any]:
    """Discovery prompts on which units are measured: plain and wrapped attacks, and benign ones."""
    roles = (PromptRole.HARMFUL, PromptRole.JAILBROKEN, PromptRole.BENIGN)
    return ground.study.prompts(Split.DISCOVERY, n, *roles)


# ---- columns -----------------------------------------------------------------------------------------------------


def _curve_arms(plan: Plan, unit: float, chosen: Arm) -> list[Arm]:
    """The chosen clamp at several strengths in its own scope, and at two in the other."""
    scope = plan.edits[0].scope
    curve = _curve(plan, unit, scope, TEST_MULTIPLES[scope])
    if not any(arm.strength == chosen.strength for arm in curve):
        curve.append(renamed(chosen, chosen.name, _group(scope)))
    elsewhere = [arm for other in SCOPES if other != scope for arm in _curve(plan, unit, other, OTHER_MULTIPLES)]
    return [*curve, *elsewhere]


def _curve(plan: Plan, unit: float, scope: str, multiples: Sequence[float]) -> list[Arm]:
    """The plan's clamp at multiples of the feature's largest activation, in one scope."""
    scoped = plan.changed(edits=tuple(edit.changed(scope=scope) for edit in plan.edits))
    feature = plan.edits[0].features[0]
    arms = sweep_arms(scoped, [unit], multiples)
    names = [f"clamp {feature} x{multiple:g}, {WHERE[scope]}" for multiple in multiples]
    named = [replace(arm, plan=plan_of(arm).named(name)) for arm, name in zip(arms, names, strict=True)]
    return [renamed(arm, name, _group(scope)) for arm, name in zip(named, names, strict=True)]


def _group(scope: str) -> str:
    return f"clamp, {WHERE[scope]}"


def matched_controls(ground: Groundwork, plan: Plan) -> tuple[list[Arm], dict[str, Any]]:
    """Random feature, unrelated feature and difference of means, at the steered plan's own edit size on benign text."""
    study, sizes = ground.study, ground.sizes
    suites = study.data.known(Split.VALIDATION, sizes.answering.kl_prompts, *SAFE)
    forced = benign_replies(study.lm, suites, replace(sizes.answering, kl_prompts=MATCHING_TEXTS))
    notes: dict[str, Any] = {"matched_on": "mean ||x'-x|| / ||x|| on benign text"}
    if not forced:
        ground.stages.leave_out("controls of the clamp's size", "no benign validation prompts to match them on")
        return [], notes
    edit_size = utility.mean_edit(study.lm, [study.sae], forced)
    goal = edit_size(plan)
    arms: list[Arm] = []
    notes["goal"] = goal
    for kind, name, proposed in _control_options(ground, plan):
        with ground.stages.attempt(f"the control '{name}'"):
            match = _first_match(proposed(), edit_size, goal)
            arms.append(replace(arm_of(match.plan.named(name), "control", kind)))
            notes[name] = {"plan": match.plan.name, "reached": match.reached, "factor": match.factor}
    return arms, notes


def _control_options(ground: Groundwork, plan: Plan) -> list[tuple[ArmKind, str, Callable[[], list[Plan]]]]:
    """The controls by kind and name; each proposes plans, of which the first that can be matched is taken."""
    steered = plan.edits[0].features

    def features(name: str, chosen: Callable[[], Sequence[int]]) -> Callable[[], list[Plan]]:
        return lambda: [controls.with_features(plan, [f], f"{name} {f}") for f in chosen()]

    random, unrelated, dense = "random feature", "unrelated feature", "difference of means"
    drawn = features(
        random, lambda: controls.random_features(ground.table, steered, RANDOM_TRIES, seed=ground.study.seed)
    )
    return [
        (ArmKind.CONTROL, random, drawn),
        (ArmKind.CONTROL, unrelated, features(unrelated, lambda: [controls.unrelated_feature(ground.table, steered)])),
        (ArmKind.DIRECTION, dense, lambda: [controls.direction_plan(plan, ground.dense, dense)]),
    ]


def _first_match(plans: Sequence[Plan], measure: Callable[[Plan], float], goal: float) -> controls.Match:
    """The first of the plans that can be brought to the goal: some features saturate before they get there."""
    last: StrengthError | None = None
    for plan in plans:
        try:
            return controls.matched_plan(plan, measure, goal)
        except StrengthError as error:
            last = error
    raise last or NotEnoughDataError("no control to match")


def _facts(chosen: Arm, gated: Arm | None, choice: Choice) -> dict[str, Any]:
    edit = plan_of(chosen).edits[0]
    return {
        "arm": chosen.name,
        "gated_arm": gated.name if gated else None,
        "feature": edit.features[0],
        "strength": chosen.strength,
        "strength_note": units.other_units(edit),
        "operator": edit.operator,
        "rule": str(choice.rule) if choice.chosen else NO_GAIN,
    }
