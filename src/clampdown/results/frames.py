"""A run as a data frame: one row per arm and suite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clampdown.notebook import pandas
from clampdown.results.points import NOTHING, Sides
from clampdown.results.rows import ArmResult, Paired
from clampdown.types import Verdict


def frame_of(arms: Sequence[ArmResult], sides: Sides) -> Any:
    """A `pandas.DataFrame` whose `value` is the share refused (safety suites) or right (capability suites), with its
    interval and n. What was not measured is NaN, never 0."""
    return pandas().DataFrame([row for arm in arms for row in _rows(arm, sides)])


def _rows(arm: ArmResult, sides: Sides) -> list[dict[str, Any]]:
    by_side = {"harmful": sides.harmful, "safe": sides.answerable, "capability": sides.capability}
    return [_row(arm, side, suite) for side, suites in by_side.items() for suite in suites]


def _row(arm: ArmResult, side: str, suite: str) -> dict[str, Any]:
    right = side == "capability"
    rate = (arm.capability.get(suite) if right else arm.rate(suite)) or NOTHING
    broken = arm.degenerate_capability.get(suite) if right else arm.rate(suite, Verdict.DEGENERATE)
    change = arm.against_baseline.get(suite) or Paired()
    fired = arm.gate_fired.get(suite) or NOTHING
    return {
        "arm": arm.name, "kind": arm.kind.value, "group": arm.group, "strength": _number(arm.strength),
        "feature": arm.feature, "operator": arm.operator, "plan": arm.plan,
        "suite": suite, "side": side, "outcome": "right" if right else "refused",
        "value": _number(rate.value), "low": _number(rate.low), "high": _number(rate.high), "n": rate.n,
        "broken": _number((broken or NOTHING).value), "gate_fired": _number(fired.value),
        "change": _number(change.difference), "change_low": _number(change.low),
        "change_high": _number(change.high), "p_value": _number(change.p_value),
        "kl_benign": _number(arm.kl_benign),
    }  # fmt: skip


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
