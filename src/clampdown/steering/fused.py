"""The edit of one site while decoding, when nothing about it changes from token to token.

Between two tokens the strengths, the scope and the gate stay as they are. So, once per turn:

1. The decoder bias goes into the encoder's: (x - b_dec) W + b_enc = x W + (b_enc - b_dec W).
2. Row factors go into the strengths. Where all of them are 0 there is nothing to do at all.
3. Most operators are lines in the activation a, and a sum of lines is a line: however many plans, operators and scopes
   a batch mixes, x' = x + (slope * a + offset) D with a = rectify(x W + b), which is five kernels.

Whatever does not fit (dropped error terms, top-k, input normalisation, 16-bit residuals) takes the general way of
`program.py`; a test holds both to the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.saes.sae import FeatureView
from clampdown.steering.operators import OPERATORS, Coefficient
from clampdown.steering.program import Bank, Directions, Reach, Residual, SiteProgram, View

Step = Callable[[Residual], Residual | None]
"""x -> x', or None for "unchanged"."""


def idle(_x: Residual) -> None:
    """Nothing to do: no scope covers the generated tokens, or no row's gate fired."""


@dataclass(frozen=True, slots=True)
class Reader:
    """activation = pre where pre > threshold else 0, with pre = x @ encoder + bias. No threshold: pre itself."""

    encoder: Float[Tensor, "d_model n"]
    bias: Float[Tensor, " n"] | None
    threshold: Float[Tensor, " n"] | None

    def read(self, x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows n"]:
        pre = x @ self.encoder if self.bias is None else torch.addmm(self.bias, x, self.encoder)
        return pre if self.threshold is None else pre * (pre > self.threshold)


@dataclass(frozen=True, slots=True)
class _Bent:
    """A group whose operator is no line: its coefficients at every channel of the bank, times 0 where it has none."""

    coefficient: Coefficient
    strengths: Float[Tensor, "rows n"]
    factor: Float[Tensor, "rows n"]

    def amounts(self, activation: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        return self.coefficient(activation.unsqueeze(1), self.strengths.unsqueeze(1)).squeeze(1) * self.factor


@dataclass(frozen=True, slots=True)
class _FusedBank:
    """The groups of one bank: the sum of those that are lines in the activation is one line, the others follow."""

    reader: Reader
    directions: Float[Tensor, "n d_model"]
    slope: Float[Tensor, "rows n"] | None
    offset: Float[Tensor, "rows n"]
    bent: tuple[_Bent, ...]

    def amounts(self, x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows n"]:
        if self.slope is None and not self.bent:
            return self.offset
        activation = self.reader.read(x)
        if self.slope is None:
            total, rest = self.bent[0].amounts(activation), self.bent[1:]
            return sum((bent.amounts(activation) for bent in rest), total + self.offset)
        total = torch.addcmul(self.offset, self.slope, activation)
        return sum((bent.amounts(activation) for bent in self.bent), total)


@dataclass(frozen=True, slots=True)
class FusedEdit:
    """Everything that happens at a site, for residuals [rows, 1, d_model] in float32."""

    banks: tuple[_FusedBank, ...]
    limit: Float[Tensor, "rows 1"] | None = None

    def __call__(self, x: Residual) -> Residual:
        flat = changed = x.squeeze(1)
        for bank in self.banks:
            changed = torch.addmm(changed, bank.amounts(flat), bank.directions)
        if self.limit is not None:
            changed = torch.where(torch.linalg.vector_norm(flat, dim=-1, keepdim=True) <= self.limit, changed, flat)
        return changed.unsqueeze(1)


def decoding_step(program: SiteProgram, weights: Mapping[Reach, Float[Tensor, "rows 1"]]) -> Step | None:
    """What to do at a site while decoding, or None when only the general way can say.

    `weights` are the reaches' row factors for generated tokens. Looks at their values: once per turn, not per token.
    """
    if not any(bool(weights[reach].any()) for reach in program.reaches):
        return idle
    if program.errors:
        return None
    banks = [_fused_bank(bank, weights) for bank in program.banks]
    found = tuple(bank for bank in banks if bank is not None)
    return FusedEdit(found, program.limit) if len(found) == len(banks) else None


def _fused_bank(bank: Bank, weights: Mapping[Reach, Float[Tensor, "rows 1"]]) -> _FusedBank | None:
    reader = reader_of(bank.view)
    if reader is None:
        return None
    n_rows = len(bank.groups[0].strengths)
    slope, offset = torch.zeros(2, n_rows, bank.size, device=bank.groups[0].strengths.device)
    bent: list[_Bent] = []
    for group in bank.groups:
        operator, strengths = OPERATORS[group.operator], group.strengths.squeeze(1)
        factor = group.member.squeeze(1) * weights[group.reach]
        if operator.line is not None:
            line = operator.line(strengths)
            slope.index_add_(1, group.channels, line.slope * factor)
            offset.index_add_(1, group.channels, line.offset * factor)
        elif bool(factor.any()):
            spread = torch.zeros(2, n_rows, bank.size, device=strengths.device)
            spread[:, :, group.channels] = torch.stack([strengths, factor])
            bent.append(_Bent(operator.coefficient, spread[0], spread[1]))
    directions = bank.view.rows if isinstance(bank.view, Directions) else _directions(bank.view)
    return _FusedBank(reader, directions, slope if bool(slope.any()) else None, offset, tuple(bent))


def _directions(view: View) -> Tensor:
    assert isinstance(view, FeatureView), "every view with a reader is one of the two kinds"
    return view.directions


def reader_of(view: View) -> Reader | None:
    if isinstance(view, Directions):
        return Reader(view.rows.T, None, None)
    if not isinstance(view, FeatureView) or not view.architecture.rectifies or view.directions.dtype != torch.float32:
        return None
    if view.cfg.normalize_activations not in ("none", "expected_average_only_in"):
        return None
    bias = view.vectors["b_enc"]
    if view.cfg.apply_b_dec_to_input:
        bias = bias - view.b_dec @ view.encoder
    threshold = view.vectors.get("threshold", torch.zeros_like(bias))
    return Reader(view.encoder, bias, threshold.clamp(min=0))
