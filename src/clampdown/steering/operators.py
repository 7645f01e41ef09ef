"""Operators: how much of a feature's decoder row to add, given its activation (methods: x' = x + coefficient * d_f).

    clamp(c)         c - a                 exactly encode-edit-decode with the error term kept (2411.11296)
    clamp_active(c)  1[a > 0] (c - a)      only where the feature is already live
    floor(c)         max(c - a, 0)         never lowers
    scale(g)         (g - 1) a             g = 0 ablates, g < 0 reverses
    add(s)           s                     a constant amount, whatever the activation (2511.00029)

The same forms serve dense directions: adding v is `add` on the row v. The others act on the unit row, whose
"activation" is the projection x . v: ablating it (2406.11717) is `project_out`, `clamp_direction` sets it,
`floor_direction` raises it. Several with orthonormal vectors set the coordinates of a subspace, or edit into a cone.

A new operator is one function and one row of `OPERATORS`. If it is a line in the activation, the row may say so: many
such edits can then be added up before the activations are known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Activations = Float[Tensor, "rows pos channels"]
Strengths = Float[Tensor, "rows 1 channels"]
Coefficient = Callable[[Activations, Strengths], Activations]


def clamp(activation: Activations, strength: Strengths) -> Activations:
    return strength - activation


def clamp_active(activation: Activations, strength: Strengths) -> Activations:
    return (strength - activation) * (activation > 0)


def floor(activation: Activations, strength: Strengths) -> Activations:
    return (strength - activation).clamp(min=0)


def scale(activation: Activations, strength: Strengths) -> Activations:
    return (strength - 1) * activation


def add(activation: Activations, strength: Strengths) -> Activations:
    return strength.expand_as(activation)


def project_out(activation: Activations, strength: Strengths) -> Activations:
    return -strength * activation


class Line(NamedTuple):
    """coefficient = slope * activation + offset."""

    slope: Tensor
    offset: Tensor


def _falling(strength: Tensor) -> Line:
    return Line(torch.full_like(strength, -1.0), strength)


def _scaling(strength: Tensor) -> Line:
    return Line(strength - 1, torch.zeros_like(strength))


def _flat(strength: Tensor) -> Line:
    return Line(torch.zeros_like(strength), strength)


def _projecting(strength: Tensor) -> Line:
    return Line(-strength, torch.zeros_like(strength))


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator and what it acts on: features, or `dense` directions (`unit_row`: scaled to length 1 first).

    At the strength `neutral` it leaves every residual as it is; None: there is no such strength. `line` says the same
    as `coefficient` when that is a line (a test holds them together). `sets`: the strength is what an activation is to
    be, not by how much it is to change.
    """

    coefficient: Coefficient
    dense: bool = False
    unit_row: bool = False
    neutral: float | None = None
    line: Callable[[Tensor], Line] | None = None
    sets: bool = False


OPERATORS: dict[str, Operator] = {
    "clamp": Operator(clamp, line=_falling, sets=True),
    "clamp_active": Operator(clamp_active, sets=True),
    "floor": Operator(floor, sets=True),
    "scale": Operator(scale, neutral=1.0, line=_scaling),
    "add": Operator(add, neutral=0.0, line=_flat),
    "add_direction": Operator(add, dense=True, neutral=0.0, line=_flat),
    "ablate_direction": Operator(project_out, dense=True, unit_row=True, neutral=0.0, line=_projecting),
    "clamp_direction": Operator(clamp, dense=True, unit_row=True, line=_falling, sets=True),
    "floor_direction": Operator(floor, dense=True, unit_row=True, sets=True),
}
