"""The kinds of gate: what each reads of a prompt, and how that becomes a score.

    score = bias + sum_i weights[i] * channel_i        fires when score > threshold

| kind     | channel_i |
|---|---|
| feature  | one SAE feature, pooled over the prompt |
| probe    | SAE features, each under its own pooling |
| dense    | v_i . (the residual pooled over the prompt) |
| cosine   | cosine of the pooled residual with one condition vector (CAST, 2409.05907) |
| external | what a registered function says of the prompt's text, outside the model |
| ensemble | the mean, or the largest, of other gates' scores, at sites and of kinds of their own |

`max` and `mean` run over the prompt's content tokens, `assistant_start` is the prompt's last token, where the reply is
decided. Residuals have signs, so a maximum means nothing for them. A new kind is one row of `GATE_KINDS`; if it reads
something new, a reader in `program.py` as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clampdown.errors import PlanError, SteeringNotAppliedError

Reads = Literal["features", "residual", "text", "gates"]
Pooled = Float[Tensor, "rows width"]
Directions = Float[Tensor, "channels width"] | None
Readout = Callable[[Pooled, Directions], Float[Tensor, "rows channels"]]
"""From what was pooled (feature activations, or the residual) to channels; `Directions` are the plan's vectors."""

Scorer = Callable[[str], float]
"""An external classifier: the text of the prompt's messages, joined by newlines, to a score."""


@dataclass(frozen=True, slots=True)
class GateKind:
    """What a kind reads, under which poolings, and whether it has exactly one channel."""

    reads: Reads
    readout: Readout
    poolings: tuple[str, ...]
    single: bool = False


def as_pooled(pooled: Pooled, directions: Directions) -> Float[Tensor, "rows channels"]:
    return pooled


def projected(pooled: Pooled, directions: Directions) -> Float[Tensor, "rows channels"]:
    assert directions is not None, "the plan's validation makes sure that a gate on the residual has vectors"
    return pooled @ directions.T


def cosine(pooled: Pooled, directions: Directions) -> Float[Tensor, "rows channels"]:
    assert directions is not None, "the plan's validation makes sure that a gate on the residual has vectors"
    return torch.nn.functional.normalize(pooled, dim=-1) @ torch.nn.functional.normalize(directions, dim=-1).T


_OF_FEATURES = ("max", "mean", "assistant_start")
_OF_RESIDUALS = ("mean", "assistant_start")

GATE_KINDS: dict[str, GateKind] = {
    "feature": GateKind("features", as_pooled, _OF_FEATURES, single=True),
    "probe": GateKind("features", as_pooled, _OF_FEATURES),
    "dense": GateKind("residual", projected, _OF_RESIDUALS),
    "cosine": GateKind("residual", cosine, _OF_RESIDUALS, single=True),
    "external": GateKind("text", as_pooled, ()),
    "ensemble": GateKind("gates", as_pooled, ()),
}

COMBINATIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda scores: sum(scores) / len(scores),
    "max": max,
}
"""How an ensemble makes one score of its members'."""


def _pool_max(values: Float[Tensor, "rows pos width"], content: Bool[Tensor, "rows pos"]) -> Pooled:
    return values.masked_fill(~content.unsqueeze(-1), 0.0).amax(1)


def _pool_mean(values: Float[Tensor, "rows pos width"], content: Bool[Tensor, "rows pos"]) -> Pooled:
    mask = content.unsqueeze(-1)
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def _pool_assistant_start(values: Float[Tensor, "rows pos width"], content: Bool[Tensor, "rows pos"]) -> Pooled:
    return values[:, -1]


GATE_POOLINGS: dict[str, Callable[[Tensor, Tensor], Pooled]] = {
    "max": _pool_max,
    "mean": _pool_mean,
    "assistant_start": _pool_assistant_start,
}
"""What was read at the prompt's positions [rows, pos, width] and the content mask [rows, pos] -> [rows, width]."""


_SCORERS: dict[str, Scorer] = {}


def register_scorer(name: str, scorer: Scorer) -> None:
    """Make an external classifier known under the name that plans give it; a second registration replaces the first."""
    _SCORERS[name] = scorer


def scorers() -> Mapping[str, Scorer]:
    """The registered external classifiers."""
    return dict(_SCORERS)


def check_scorer(name: str) -> None:
    """Raises `PlanError` unless an external classifier of this name is registered."""
    if name not in _SCORERS:
        raise PlanError(
            f"the plan's gate wants a score from '{name}', and no scorer of that name is registered",
            hint=f"clampdown.steering.gate_kinds.register_scorer('{name}', function of the prompt's text)",
        )


def external_score(name: str, text: str) -> float:
    """What the registered scorer says. Raises `PlanError` without one, `SteeringNotAppliedError` when what it says is
    no finite number: then nobody knows whether to steer."""
    check_scorer(name)
    score = float(_SCORERS[name](text))
    if not math.isfinite(score):
        raise SteeringNotAppliedError(f"scorer '{name}' gave {score}, so the gate cannot decide")
    return score
