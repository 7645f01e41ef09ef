"""Operators: how much of a feature's decoder row to add, given its activation (methods: x' = x + coefficient * d_f).

    clamp(c)         c - a                 exactly encode-edit-decode with the error term kept (2411.11296)
    clamp_active(c)  1[a > 0] (c - a)      only where the feature is already live
    floor(c)         max(c - a, 0)         never lowers
    scale(g)         (g - 1) a             g = 0 ablates, g < 0 reverses
    add(s)           s                     a constant amount, whatever the activation (2511.00029)

The same two forms serve dense directions: adding v is `add` on the row v, ablating it (2406.11717) is
`project_out` on the unit row, whose "activation" is the projection x . v.

A new operator is one function and one row of `OPERATORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator and what it acts on: features, or `dense` directions (`unit_row`: scaled to length 1 first).

    At the strength `neutral` it leaves every residual as it is; None: there is no such strength.
    """

    coefficient: Coefficient
    dense: bool = False
    unit_row: bool = False
    neutral: float | None = None


OPERATORS: dict[str, Operator] = {
    "clamp": Operator(clamp),
    "clamp_active": Operator(clamp_active),
    "floor": Operator(floor),
    "scale": Operator(scale, neutral=1.0),
    "add": Operator(add, neutral=0.0),
    "add_direction": Operator(add, dense=True, neutral=0.0),
    "ablate_direction": Operator(project_out, dense=True, unit_row=True, neutral=0.0),
}
