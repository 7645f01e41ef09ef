"""Plans that edit along several directions of refusal at once (`discovery/subspace.py`): one edit for each of them.

The directions are orthonormal, so the edits do not touch each other's coordinate: `clamp_direction` along all of them
sets a point of a subspace, `floor_direction` raises into a cone, `ablate_direction` takes the subspace out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clampdown.discovery.subspace import Subspace
from clampdown.errors import PlanError, StrengthError
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import FeatureSource
from clampdown.steering.operators import OPERATORS
from clampdown.steering.plan import Edit, Plan
from clampdown.steering.program import Directions
from clampdown.steering.units import Strength, Unit, calibrate, measured, resolve
from clampdown.types import Prompt

DENSE = tuple(name for name, operator in OPERATORS.items() if operator.dense)
VECTOR = "refusal{}"
ONE_GAP = Strength(1.0, Unit.GAP)


@dataclass(frozen=True, slots=True)
class Along:
    """What is done along every direction, how far, and where."""

    operator: str = "floor_direction"
    strength: Strength = ONE_GAP
    scope: str = "all"

    def check(self) -> None:
        """Raises `PlanError` for an operator on features, `StrengthError` for a unit that means nothing here."""
        if self.operator not in DENSE:
            raise PlanError(f"'{self.operator}' is not an operator on directions", hint=f"one of: {', '.join(DENSE)}")
        if self.strength.unit is Unit.GAP and self.operator == "ablate_direction":
            raise StrengthError("'ablate_direction' takes a share of the projection, not a gap", hint="--strength 1")


def plan_along(
    lm: LanguageModel, sae: FeatureSource | None, found: Subspace, asked: Along, prompts: Sequence[Prompt], name: str
) -> Plan:
    """The plan. The SAE, where there is one, is for gates that read features. `prompts` are what other units than raw
    ones and gaps are resolved on, and what is moved how far measured on."""
    asked.check()
    vectors = {VECTOR.format(i): tuple(row) for i, row in enumerate(found.directions.tolist())}
    edits = [_edit(lm, found, i, asked, prompts) for i in range(len(found))]
    called = name or f"{asked.operator} along {len(found)} directions at {asked.strength}"
    return Plan.of(lm, [sae] if sae else [], edits, called, vectors=vectors)


def coordinate(found: Subspace, i: int, operator: str, gaps: float) -> float:
    """What a number of gaps along a direction is as a raw strength: for what sets a coordinate counted from where
    harmless prompts are."""
    start = float(found.harmless[i]) if OPERATORS[operator].sets else 0.0
    return start + gaps * float(found.gap[i])


def _edit(lm: LanguageModel, found: Subspace, i: int, asked: Along, prompts: Sequence[Prompt]) -> Edit:
    strength = asked.strength
    if strength.unit is Unit.GAP:
        strength = Strength(coordinate(found, i, asked.operator, strength.value))
    edit = Edit(
        site=found.site.name,
        operator=asked.operator,
        vector=VECTOR.format(i),
        strengths=(strength.value,),
        scope=asked.scope,
    )
    if not prompts and strength.unit is Unit.RAW:
        return edit
    view = Directions(torch.tensor(found.directions[i : i + 1], dtype=torch.float32, device=lm.device))
    calibration = calibrate(lm, found.site, view, prompts)
    return measured(edit.changed(strengths=resolve([strength], asked.operator, calibration)), calibration)
