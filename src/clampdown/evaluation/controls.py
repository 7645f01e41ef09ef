"""Controls: arms that differ from the steered one in a single respect, so that a cost can be put down to it.

    random feature      same firing rate, same edit size: is it this feature, or any push of that size?
    unrelated feature   as above, and pointing elsewhere, and no finder ranks it (2411.11296 clamped "philosophy")
    direction           difference of means at the same edit size: does the SAE buy anything over a dense vector?
    system prompt       no steering at all: would asking have done?

1. Pick features from a table of facts (`FeatureTable`): the pool is the features nearest in log firing rate.
2. Give the control's plan the strength at which a measured quantity (mean ||x'-x||/||x||, or KL on benign replies)
   equals the steered plan's. The search is one-dimensional and pure; what it measures is a callback.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from clampdown.errors import NotEnoughDataError, StrengthError
from clampdown.steering.arms import Arm
from clampdown.steering.plan import Edit, Plan
from clampdown.types import ArmKind

POOL = 32
UNRELATED_COSINE = 0.1
TWIN_COSINE = 0.5


@dataclass(frozen=True, slots=True)
class FeatureTable:
    """What picking a control needs to know of every feature.

    `firing_rate` is the share of tokens (or prompts) where it is active; `refusal_score` is any finder's score, of
    which only the magnitude is read; `decoder` rows are the directions.
    """

    firing_rate: Float[np.ndarray, " d_sae"]
    refusal_score: Float[np.ndarray, " d_sae"]
    decoder: Float[np.ndarray, "d_sae d_in"]

    def cosines(self, features: Sequence[int]) -> Float[np.ndarray, " d_sae"]:
        """Of each feature, the largest |cosine| to any of the given ones."""
        unit = self.decoder / np.maximum(np.linalg.norm(self.decoder, axis=1, keepdims=True), 1e-12)
        return np.abs(unit @ unit[list(features)].T).max(axis=1)


def pool(table: FeatureTable, steered: Sequence[int], size: int = POOL) -> Int[np.ndarray, " pool"]:
    """The `size` live features nearest to the steered ones' mean firing rate on a log scale, nearest first.

    Steered features and their near-duplicates (an SAE splits features) are left out: a twin is no control.
    """
    target = float(np.mean(table.firing_rate[list(steered)]))
    if target <= 0:
        raise NotEnoughDataError("the steered feature never fired on these prompts, so no firing rate can be matched")
    usable = np.flatnonzero((table.firing_rate > 0) & (table.cosines(steered) < TWIN_COSINE))
    distance = np.abs(np.log(table.firing_rate[usable] / target))
    return usable[np.argsort(distance, kind="stable")][:size]


def random_features(table: FeatureTable, steered: Sequence[int], n: int, *, seed: int) -> tuple[int, ...]:
    """`n` different features drawn from the pool (twice `n` when that is larger). Raises `NotEnoughDataError`."""
    candidates = pool(table, steered, max(POOL, 2 * n))
    if len(candidates) < n:
        raise NotEnoughDataError(f"only {len(candidates)} features could serve as controls, {n} were asked for")
    drawn = np.random.default_rng(seed).choice(candidates, size=n, replace=False)
    return tuple(int(feature) for feature in drawn)


def unrelated_features(table: FeatureTable, steered: Sequence[int]) -> tuple[int, ...]:
    """The pool's features nearly orthogonal to the steered ones, smallest |refusal score| first.

    Raises `NotEnoughDataError` when none is orthogonal enough.
    """
    candidates = pool(table, steered, 2 * POOL)
    apart = candidates[table.cosines(steered)[candidates] <= UNRELATED_COSINE]
    if not len(apart):
        raise NotEnoughDataError(f"no feature of similar firing rate has |cosine| <= {UNRELATED_COSINE} to {steered}")
    order = np.argsort(np.abs(table.refusal_score[apart]), kind="stable")
    return tuple(int(feature) for feature in apart[order])


def unrelated_feature(table: FeatureTable, steered: Sequence[int]) -> int:
    """The first of `unrelated_features`."""
    return unrelated_features(table, steered)[0]


def with_features(plan: Plan, features: Sequence[int], name: str) -> Plan:
    """The same edits on other features, one for one. Gate and p99 figures belong to the old ones and are dropped."""
    wanted = [feature for edit in plan.edits for feature in edit.features]
    if len(features) != len(wanted):
        raise ValueError(f"{len(features)} features for a plan that edits {len(wanted)}")
    left = list(features)
    edits = []
    for edit in plan.edits:
        mine, left = left[: len(edit.features)], left[len(edit.features) :]
        edits.append(_edited(edit, features=tuple(mine), p99=None, edit_norm=None))
    return _planned(plan, name=name, edits=tuple(edits), gate=None, otherwise=None)


def with_strengths(plan: Plan, strengths: Sequence[float], name: str | None = None) -> Plan:
    """The same edits at other raw strengths, in order of edits and features. Raises `StrengthError` if not finite."""
    wanted = sum(len(edit.strengths) for edit in plan.edits)
    if len(strengths) != wanted:
        raise ValueError(f"{len(strengths)} strengths for a plan that has {wanted}")
    left = list(strengths)
    edits = []
    for edit in plan.edits:
        mine, left = left[: len(edit.strengths)], left[len(edit.strengths) :]
        edits.append(_edited(edit, strengths=tuple(mine), edit_norm=None))
    return _planned(plan, name=name or plan.name, edits=tuple(edits))


def scaled(plan: Plan, factor: float) -> Plan:
    """Every strength times `factor`, measured from the operator's neutral point (1 for `scale`, else 0)."""
    strengths = [
        1 + factor * (s - 1) if edit.operator == "scale" else factor * s for edit in plan.edits for s in edit.strengths
    ]
    return with_strengths(plan, strengths)


def direction_plan(like: Plan, vector: Sequence[float], name: str, *, strength: float = 1.0) -> Plan:
    """Add a dense vector (difference of means) at the first edit's site and scope, ungated."""
    first = like.edits[0]
    edit = Edit(site=first.site, operator="add_direction", strengths=(strength,), vector="direction", scope=first.scope)
    return Plan(name=name, model=like.model, edits=(edit,), vectors={"direction": tuple(vector)})


def system_prompt_arm(text: str, name: str = "system prompt") -> Arm:
    """Ask instead of steering."""
    return Arm(name=name, kind=ArmKind.CONTROL, system_prompt=text)


@dataclass(frozen=True, slots=True)
class Match:
    """A plan whose measured quantity reached the goal, by a `factor` on its strengths, in how many measurements."""

    plan: Plan
    factor: float
    reached: float
    calls: int


def matched_plan(plan: Plan, measure: Callable[[Plan], float], goal: float, *, tolerance: float = 0.02) -> Match:
    """`plan` with its strengths scaled until `measure(plan)` is within `tolerance * goal` of `goal`.

    Raises `StrengthError` when no strength gets there: an unmatched control would be worse than none.
    """
    found = search(lambda factor: measure(scaled(plan, factor)), goal, tolerance=tolerance)
    return Match(scaled(plan, found.factor), found.factor, found.reached, found.calls)


@dataclass(frozen=True, slots=True)
class Found:
    """Result of `search`."""

    factor: float
    reached: float
    calls: int


def search(measure: Callable[[float], float], goal: float, *, tolerance: float = 0.02, max_calls: int = 30) -> Found:
    """Find a factor > 0 with |measure(factor) - goal| <= tolerance * goal, for a quantity that grows with the factor.

    Doubling from 1 brackets the goal; the Illinois form of false position closes in, which takes one step where the
    quantity is proportional to the factor (as ||x'-x|| is for `add`).
    """
    if not (goal > 0 and math.isfinite(goal)):
        raise StrengthError(f"nothing to match: the steered plan measures {goal:g}")
    low, high = _Point(0.0, -goal), None
    factor, reached, stayed = 1.0, math.nan, ""
    for calls in range(1, max_calls + 1):
        reached = measure(factor)
        if abs(reached - goal) <= tolerance * goal:
            return Found(factor, reached, calls)
        point = _Point(factor, reached - goal)
        if point.miss < 0:
            low, high = point, (high.halved() if high and stayed == "high" else high)
            stayed = "high"
        else:  # too high, or not a number: a broken model is never the answer
            low, high = (low.halved() if stayed == "low" else low), point
            stayed = "low"
        factor = 2 * factor if high is None else _between(low, high)
    raise StrengthError(
        f"no strength measures {goal:g} within {tolerance:.0%} (tried {max_calls}, the last gave {reached:g})",
        hint="pick another control feature",
    )


@dataclass(frozen=True, slots=True)
class _Point:
    """A tried factor and by how much it missed the goal."""

    factor: float
    miss: float

    def halved(self) -> _Point:
        """An end that stayed twice counts half, or it would hold the line back for ever (Illinois)."""
        return _Point(self.factor, self.miss / 2)


def _between(low: _Point, high: _Point) -> float:
    """Where the line through both points crosses the goal, kept off the ends; the middle when it cannot be drawn."""
    width = high.factor - low.factor
    if not (math.isfinite(high.miss) and high.miss > low.miss):
        return low.factor + width / 2
    share = low.miss / (low.miss - high.miss)
    return low.factor + width * min(max(share, 0.02), 0.98)


def _edited(edit: Edit, **changes: object) -> Edit:
    """A validated copy: pydantic's `model_copy` would skip the checks."""
    return Edit.model_validate({**edit.model_dump(), **changes})


def _planned(plan: Plan, **changes: object) -> Plan:
    return Plan.model_validate({**dict(plan), **changes})
