"""What the page's controls do to a plan: strength, operator, scope, gate and threshold, as one pure function.

The slider multiplies the plan's own strengths. For an operator whose strength is a factor (`scale`) it is the factor
itself when the plan has none, and back from factors it multiplies the features' p99. Only the first branch's edits are
changed; a two-sided plan keeps what it does otherwise, behind its own gate. Controls left alone return the plan itself,
digest and all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from clampdown.errors import PlanError
from clampdown.steering.operators import OPERATORS
from clampdown.steering.plan import Edit, Guarantee, Plan

AS_PLANNED = "as planned"
FACTORS = ("scale", "ablate_direction")
"""Operators whose strength has no unit."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,59}")


@dataclass(frozen=True, slots=True)
class Settings:
    """The controls. `threshold` None leaves the gate where it is; `guarantee` is what another threshold promises."""

    multiple: float = 1.0
    operator: str = AS_PLANNED
    scope: str = AS_PLANNED
    gated: bool = True
    threshold: float | None = None
    guarantee: Guarantee | None = None


def operators_for(plan: Plan) -> tuple[str, ...]:
    """Operators that the plan's edits could have: those on features or on directions; none other when it has both."""
    kinds = {OPERATORS[edit.operator].dense for edit in plan.edits}
    if len(kinds) != 1:
        return (AS_PLANNED,)
    (dense,) = kinds
    return (AS_PLANNED, *(name for name, row in OPERATORS.items() if row.dense is dense))


def adjusted(plan: Plan, settings: Settings) -> Plan:
    """The plan as the controls want it. Raises `PlanError` for what cannot be, such as p99 that nobody measured."""
    said = changes(plan, settings)
    if not said:
        return plan
    fields: dict[str, Any] = {**dict(plan), "edits": tuple(_edit(edit, settings) for edit in plan.edits)}
    if plan.gate is not None and not settings.gated:
        fields |= {"gate": None, "otherwise": None}
    elif plan.gate is not None and settings.threshold is not None:
        moved = {"threshold": settings.threshold, "guarantee": settings.guarantee}
        fields["gate"] = plan.gate.changed(**moved)
    fields["name"] = f"{plan.name}, {', '.join(said)}"
    fields["provenance"] = {**plan.provenance, "adjusted_from": plan.digest, "adjusted": ", ".join(said)}
    return Plan.model_validate(fields)


def changes(plan: Plan, settings: Settings) -> tuple[str, ...]:
    """What the controls change, in a word each; nothing when they are as the plan has them."""
    said = []
    if settings.multiple != 1.0:
        said.append(f"x{settings.multiple:g}")
    if any(_chosen(settings.operator, edit.operator) != edit.operator for edit in plan.edits):
        said.append(settings.operator)
    if any(_chosen(settings.scope, edit.scope) != edit.scope for edit in plan.edits):
        said.append(f"scope {settings.scope}")
    if plan.gate is not None and not settings.gated:
        said.append("no gate")
    elif plan.gate is not None and settings.threshold not in (None, plan.gate.threshold):
        said.append(f"threshold {settings.threshold:.4g}")
    return tuple(said)


def _chosen(asked: str, planned: str) -> str:
    return planned if asked == AS_PLANNED else asked


def _edit(edit: Edit, settings: Settings) -> Edit:
    operator, scope = _chosen(settings.operator, edit.operator), _chosen(settings.scope, edit.scope)
    strengths = _strengths(edit, operator, settings.multiple)
    same = (operator, strengths) == (edit.operator, edit.strengths)
    changed = {"operator": operator, "scope": scope, "strengths": strengths}
    return Edit.model_validate({**edit.model_dump(), **changed, "edit_norm": edit.edit_norm if same else None})


def _strengths(edit: Edit, operator: str, multiple: float) -> tuple[float, ...]:
    was, becomes = edit.operator in FACTORS, operator in FACTORS
    if was == becomes:
        return tuple(multiple * strength for strength in edit.strengths)
    if becomes:
        return (multiple,) * len(edit.strengths)
    if not edit.p99:
        raise PlanError(
            f"'{operator}' needs a strength in the features' own units, and the plan has only factors",
            hint="choose 'scale', or a plan with p99 values",
        )
    return tuple(multiple * unit for unit in edit.p99)


def checked_name(name: str) -> str:
    """A name that is also a file's stem. Raises `PlanError` for anything that could be a path."""
    cleaned = " ".join(name.split())
    if not _NAME.fullmatch(cleaned) or cleaned.endswith("."):
        raise PlanError(
            f"'{name}' cannot be a plan's name",
            hint="letters, digits, spaces, dots, dashes and underscores, at most 60, beginning with a letter or digit",
        )
    return cleaned
