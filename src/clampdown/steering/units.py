"""Strength units: what "1.5p99" or "5%" means in the raw units that act, measured on calibration prompts (methods, 2).

    12        raw activation units; for `scale` the factor, for `ablate_direction` the share; of a direction that is set
              the coordinate x . v, which the units below count like an activation
    1.5max    multiples of the feature's largest activation
    1.5p99    multiples of its 99th percentile over the tokens where it is active (most features rest on most tokens)
    0.1resid  multiples of the residual's mean length
    5%        whatever moves the residual by this much: mean ||x' - x|| / ||x|| over the tokens that it changes
    1gap      along a direction that was found: where harmful prompts are, 0 where harmless ones are (`study/along.py`)

1. `calibrate` reads the residual once, at the prompts' content tokens and at the token where the reply is decided;
   attention sinks are left out (`sinks.py`), because one of them is longer than all other tokens together.
2. `resolve` turns a strength in any unit into raw values, one per feature.
3. `measured` writes down what a raw edit is in the other units, and `in_words` says it. A plan acts by raw values only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.activations.capture import capture
from clampdown.activations.sinks import sinks_at
from clampdown.errors import PromptSetError, StrengthError
from clampdown.models.chat import encode
from clampdown.models.loading import LanguageModel
from clampdown.steering.operators import OPERATORS
from clampdown.steering.plan import Edit
from clampdown.steering.program import View
from clampdown.types import Prompt, Site

DOUBLINGS, HALVINGS = 40, 60


class Unit(StrEnum):
    """What a strength is counted in."""

    RAW = "raw"
    MAX = "max"
    P99 = "p99"
    RESID = "resid"
    PERCENT = "%"
    GAP = "gap"


_STRENGTH = re.compile(
    r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|[-+]?nan|[-+]?inf)\s*(raw|max|p99|resid|%|gap)?", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Strength:
    """A number and its unit, as a user writes them: `12`, `1.5p99`, `5%`."""

    value: float
    unit: Unit = Unit.RAW

    @classmethod
    def parse(cls, text: str) -> Strength:
        """Raises `StrengthError` for anything else, and for numbers that are not finite."""
        match = _STRENGTH.fullmatch(text.strip())
        if match is None:
            raise StrengthError(
                f"'{text}' is not a strength",
                hint="for example 12, 1.5p99, 1.5max, 0.1resid, 5% or, along directions, 1gap",
            )
        value = float(match[1])
        if not math.isfinite(value):
            raise StrengthError(f"strength {text} is not a finite number")
        return cls(value, Unit((match[2] or "raw").lower()))

    def __str__(self) -> str:
        return f"{self.value:g}{'' if self.unit is Unit.RAW else self.unit.value}"


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the channels of one edit do on calibration prompts, token by token, before any edit."""

    view: View
    residual: Float[Tensor, "tokens d_model"]
    activations: Float[Tensor, "tokens channels"]

    @property
    def largest(self) -> tuple[float, ...]:
        return tuple(self.activations.amax(0).tolist())

    @property
    def p99(self) -> tuple[float, ...]:
        """Each channel's 99th percentile over the tokens where it is active; 0.0 for one that never was."""
        columns = self.activations.unbind(1)
        return tuple(float(c[c > 0].quantile(0.99)) if bool((c > 0).any()) else 0.0 for c in columns)

    @property
    def mean_length(self) -> float:
        return float(self.residual.norm(dim=-1).mean())

    def edit_norm(self, operator: str, strengths: Sequence[float]) -> float | None:
        """Mean ||x' - x|| / ||x|| over the tokens that the edit changes, error term kept; None if there are none."""
        raw = torch.tensor(strengths, device=self.activations.device).view(1, 1, -1)
        coefficients = OPERATORS[operator].coefficient(self.activations[None], raw)
        size = self.view.write(coefficients, self.residual[None])[0].norm(dim=-1)
        touched = size > 0
        if not bool(touched.any()):
            return None
        return float((size[touched] / self.residual.norm(dim=-1)[touched].clamp(min=1e-12)).mean())


def calibrate(
    lm: LanguageModel,
    site: Site,
    view: View,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 8192,
    include_sinks: bool = False,
) -> Calibration:
    """Read the residual at `site` on the prompts; at most `max_tokens` evenly spaced tokens are kept.

    Raises `PromptSetError` without prompts.
    """
    if not prompts:
        raise PromptSetError("no calibration prompts: strengths in these units need some", hint="give raw strengths")
    found: list[Tensor] = []
    sinks = None if include_sinks else sinks_at(lm, [site])[site]
    for batch in capture(lm, [encode(lm, prompt.messages) for prompt in prompts], site):
        read = batch.content.clone()
        read[:, -1] = True
        if sinks:
            read &= sinks.outside(batch.residuals[site])
        found.append(batch.residuals[site][read].float())
    residual = torch.cat(found)
    residual = residual[:: math.ceil(len(residual) / max_tokens)]
    with torch.no_grad():
        return Calibration(view, residual, view.read(residual[None])[0].float())


def resolve(asked: Sequence[Strength], operator: str, calibration: Calibration) -> tuple[float, ...]:
    """Raw strengths, one per channel. One asked strength serves all channels.

    Raises `StrengthError` for a unit that means nothing here: a feature that never fired has no p99, a factor or share
    has no unit but itself and `%`, and not every edit can move the residual by every amount.
    """
    if any(strength.unit is Unit.GAP for strength in asked):
        raise StrengthError("a gap is a length along a direction that was found", hint="plan make --directions 3")
    channels = calibration.activations.shape[1]
    if len(asked) not in (1, channels):
        raise StrengthError(f"{len(asked)} strengths for {channels} features", hint="give one for all, or one for each")
    if any(strength.unit is Unit.PERCENT for strength in asked):
        return _resolve_percent(asked, operator, calibration)
    each = asked if len(asked) == channels else [asked[0]] * channels
    return tuple(s.value * unit for s, unit in zip(each, _units(each, operator, calibration), strict=True))


def _units(asked: Sequence[Strength], operator: str, calibration: Calibration) -> list[float]:
    """What one of each asked unit is in raw units."""
    measured = {
        Unit.RAW: (1.0,) * len(asked),
        Unit.MAX: calibration.largest,
        Unit.P99: calibration.p99,
        Unit.RESID: (calibration.mean_length,) * len(asked),
    }
    units = [measured[strength.unit][i] for i, strength in enumerate(asked)]
    for strength, unit in zip(asked, units, strict=True):
        if strength.unit is Unit.RAW:
            continue
        if operator == "scale" or (OPERATORS[operator].dense and not OPERATORS[operator].sets):
            raise StrengthError(
                f"the strength of '{operator}' is a plain number, not {strength}", hint="raw (or % of the residual)"
            )
        if not unit > 0:
            raise StrengthError(
                f"{_silent(operator)} on the calibration prompts: {strength} has no scale",
                hint="give a raw strength, or prompts on which it fires",
            )
    return units


def _silent(operator: str) -> str:
    return "the coordinate was never above 0" if OPERATORS[operator].dense else "a feature never fired"


def _resolve_percent(asked: Sequence[Strength], operator: str, calibration: Calibration) -> tuple[float, ...]:
    """Strengths in the proportion of the features' p99 whose joint edit moves the residual by the asked share."""
    if len(asked) != 1:
        raise StrengthError("one share of the residual is for the whole edit", hint="give a single strength in %")
    if operator == "ablate_direction":
        raise StrengthError("'ablate_direction' takes a share of the projection, not of the residual")
    (channels,) = calibration.activations.shape[1:]
    proportions = (1.0,) if channels == 1 or OPERATORS[operator].dense else calibration.p99
    if not all(p > 0 for p in proportions):
        raise StrengthError(
            "a feature never fired on the calibration prompts, so several have no common scale",
            hint="give one raw strength for each",
        )
    neutral = 1.0 if operator == "scale" else 0.0
    sign = math.copysign(1.0, asked[0].value)

    def strengths(factor: float) -> tuple[float, ...]:
        return tuple(neutral + sign * factor * p for p in proportions)

    goal = abs(asked[0].value) / 100
    return strengths(_factor(lambda factor: calibration.edit_norm(operator, strengths(factor)) or 0.0, goal, asked[0]))


def _factor(moved: Callable[[float], float], goal: float, asked: Strength) -> float:
    """The factor at which `moved` reaches the goal, by doubling and halving. Raises `StrengthError` when none does."""
    least = moved(0.0)
    if least > goal:
        raise StrengthError(
            f"this edit moves the residual by at least {least:.1%}: {asked} is out of reach",
            hint="setting a feature to 0 is an edit already; ask for more",
        )
    low, high = 0.0, 1.0
    for _ in range(DOUBLINGS):
        if moved(high) >= goal:
            break
        low, high = high, 2 * high
    else:
        raise StrengthError(f"no strength moves the residual by {asked}: it stays at {moved(high):.1%}")
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if moved(middle) < goal else (low, middle)
    return high


def measured(edit: Edit, calibration: Calibration) -> Edit:
    """The edit with its features' p99 and its mean ||x' - x|| / ||x|| written down, for whoever reads the plan."""
    has_p99 = OPERATORS[edit.operator].sets or not OPERATORS[edit.operator].dense
    norm = None if edit.error_term != "keep" else calibration.edit_norm(edit.operator, edit.strengths)
    return Edit.model_validate({**edit.model_dump(), "p99": calibration.p99 if has_p99 else None, "edit_norm": norm})


_VERBS = {
    "clamp": "clamp feature {f} to {s}",
    "clamp_active": "clamp feature {f} to {s} where it is active",
    "floor": "raise feature {f} to at least {s}",
    "scale": "multiply feature {f} by {s}",
    "add": "add {s} of feature {f}",
    "add_direction": "add {s} of the vector '{f}'",
    "ablate_direction": "remove {s} of the projection on the vector '{f}'",
    "clamp_direction": "set the coordinate along the vector '{f}' to {s}",
    "floor_direction": "raise the coordinate along the vector '{f}' to at least {s}",
}


def in_words(edit: Edit) -> str:
    """One line: what the edit does where, in raw units, in multiples of p99 and as a share of the residual's length."""
    names = edit.features or (edit.vector,)
    p99 = edit.p99 or (None,) * len(names)
    parts = [
        _VERBS.get(edit.operator, edit.operator + " {f} {s}").format(f=name, s=f"{strength:.4g}")
        + _multiple(edit, strength, unit)
        for name, strength, unit in zip(names, edit.strengths, p99, strict=True)
    ]
    size = "" if edit.edit_norm is None else f"; moves the residual by {edit.edit_norm:.1%}"
    error = " without the SAE's error term" if edit.error_term != "keep" else ""
    error += f" but for what lies in {len(edit.correction)} directions" if edit.correction else ""
    return f"{', '.join(parts)} at {edit.site}, scope {edit.scope}{error}{size}"


def other_units(edit: Edit) -> str:
    """The edit's first strength in the units that it does not act by, for a sentence; empty when none was measured."""
    p99 = edit.p99[0] if edit.p99 and edit.operator != "scale" else 0.0
    parts = [f"{edit.strengths[0] / p99:.2g} times its p99"] if p99 else []
    parts += [] if edit.edit_norm is None else [f"moving the residual by {edit.edit_norm:.0%}"]
    return ", ".join(parts)


def _multiple(edit: Edit, strength: float, p99: float | None) -> str:
    if not p99 or edit.operator == "scale":
        return ""
    return f" ({strength / p99:.3g} x p99)"
