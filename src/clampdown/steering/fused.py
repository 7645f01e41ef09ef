"""The edit of one site while decoding, when nothing about it changes from token to token.

Between two tokens the strengths, the scope and the gate stay as they are. So, once per turn:

1. The decoder bias goes into the encoder's: (x - b_dec) W + b_enc = x W + (b_enc - b_dec W).
2. A row factor that is 1 everywhere is left out; one that is 0 everywhere means that there is nothing to do at all.
3. What is left is x' = x + operator(rectify(x W + b), strength) D: six kernels instead of seventeen.

Whatever does not fit (several operators or scopes, top-k, input normalisation, 16-bit residuals) takes the general way
of `program.py`; a test holds both to the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.saes.sae import FeatureView
from clampdown.steering.operators import OPERATORS, Coefficient
from clampdown.steering.program import Directions, Reach, Residual, SiteProgram, View

Step = Callable[[Residual], Residual | None]
"""x -> x', or None for "unchanged"."""


def idle(_x: Residual) -> None:
    """Nothing to do: no scope covers the generated tokens, or no row's gate fired."""


@dataclass(frozen=True, slots=True)
class _Reader:
    """activation = pre where pre > threshold else 0, with pre = x @ encoder + bias. No threshold: pre itself."""

    encoder: Float[Tensor, "d_model n"]
    bias: Float[Tensor, " n"] | None
    threshold: Float[Tensor, " n"] | None

    def read(self, x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows n"]:
        pre = x @ self.encoder if self.bias is None else torch.addmm(self.bias, x, self.encoder)
        return pre if self.threshold is None else pre * (pre > self.threshold)


@dataclass(frozen=True, slots=True)
class FusedEdit:
    """One operator on some channels, for residuals [rows, 1, d_model] in float32."""

    reader: _Reader
    directions: Float[Tensor, "n d_model"]
    coefficient: Coefficient
    strengths: Float[Tensor, "rows 1 n"]
    factor: Float[Tensor, "rows 1 n"] | None

    def __call__(self, x: Residual) -> Residual:
        flat = x.squeeze(1)
        amounts = self.coefficient(self.reader.read(flat).unsqueeze(1), self.strengths)
        if self.factor is not None:
            amounts = amounts * self.factor
        return torch.addmm(flat, amounts.squeeze(1), self.directions).unsqueeze(1)


def decoding_step(program: SiteProgram, weights: Mapping[Reach, Float[Tensor, "rows 1"]]) -> Step | None:
    """What to do at a site while decoding, or None when only the general way can say.

    `weights` are the reaches' row factors for generated tokens. Looks at their values: once per turn, not per token.
    """
    if not any(bool(weights[reach].any()) for reach in program.reaches):
        return idle
    if program.dropped or len(program.banks) != 1 or len(program.banks[0].groups) != 1:
        return None
    bank, group = program.banks[0], program.banks[0].groups[0]
    reader = _reader(bank.view)
    if reader is None or len(group.channels) != bank.size:
        return None
    factor = group.member * weights[group.reach].unsqueeze(-1)
    return FusedEdit(
        reader=reader,
        directions=bank.view.rows if isinstance(bank.view, Directions) else _directions(bank.view),
        coefficient=OPERATORS[group.operator].coefficient,
        strengths=group.strengths,
        factor=None if bool((factor == 1).all()) else factor,
    )


def _directions(view: View) -> Tensor:
    assert isinstance(view, FeatureView), "every view with a reader is one of the two kinds"
    return view.directions


def _reader(view: View) -> _Reader | None:
    if isinstance(view, Directions):
        return _Reader(view.rows.T, None, None)
    if not isinstance(view, FeatureView) or not view.architecture.rectifies or view.directions.dtype != torch.float32:
        return None
    if view.cfg.normalize_activations not in ("none", "expected_average_only_in"):
        return None
    bias = view.vectors["b_enc"]
    if view.cfg.apply_b_dec_to_input:
        bias = bias - view.b_dec @ view.encoder
    threshold = view.vectors.get("threshold", torch.zeros_like(bias))
    return _Reader(view.encoder, bias, threshold.clamp(min=0))
