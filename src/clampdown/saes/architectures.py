"""What each kind of SAE does between its encoder's matrix product and its feature activations.

Every encoder starts with the same product p = (norm(x) - b) W_enc; the kinds differ in what follows, per feature f:
    relu       max(p + b_enc, 0)
    jumprelu   (p + b_enc) if p + b_enc > max(threshold, 0) else 0          strict, as in SAELens
    batchtopk  as jumprelu: at inference the stored threshold replaces the batch's top k
    gated      max(p exp(r_mag) + b_mag, 0) if p + b_gate > 0 else 0
    topk       max(p + b_enc, 0) for the k features where p + b_enc is largest, else 0
All but topk act on each feature alone (`pointwise`), so a few features can be read without the others (methods.md 2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Vectors = Mapping[str, Float[Tensor, " features"]]
Activate = Callable[[Float[Tensor, "... features"], Vectors, int], Float[Tensor, "... features"]]


@dataclass(frozen=True, slots=True)
class Architecture:
    """One kind of SAE: the per-feature vectors that its encoder needs, and its activation.

    `activate(product, vectors, k)` maps the encoder's matrix product to feature activations. When `pointwise`, it may
    be called with any subset of the features. `rectifies`: with pre = product + b_enc the activation is pre where
    pre > max(threshold, 0) and 0 elsewhere, so that a decoding step can do it in three kernels.
    """

    vectors: tuple[str, ...]
    activate: Activate
    pointwise: bool = True
    rectifies: bool = False


def _relu(product: Tensor, vectors: Vectors, _k: int) -> Tensor:
    return torch.relu(product + vectors["b_enc"])


def _jumprelu(product: Tensor, vectors: Vectors, _k: int) -> Tensor:
    pre = product + vectors["b_enc"]
    return torch.relu(pre) * (pre > vectors["threshold"])


def _gated(product: Tensor, vectors: Vectors, _k: int) -> Tensor:
    magnitude = torch.relu(product * vectors["r_mag"].exp() + vectors["b_mag"])
    return magnitude * (product + vectors["b_gate"] > 0)


def _topk(product: Tensor, vectors: Vectors, k: int) -> Tensor:
    top = torch.topk(product + vectors["b_enc"], min(k, product.shape[-1]), dim=-1)
    return torch.zeros_like(product).scatter(-1, top.indices, torch.relu(top.values))


ARCHITECTURES: dict[str, Architecture] = {
    "relu": Architecture(("b_enc",), _relu, rectifies=True),
    "jumprelu": Architecture(("b_enc", "threshold"), _jumprelu, rectifies=True),
    "batchtopk": Architecture(("b_enc", "threshold"), _jumprelu, rectifies=True),
    "gated": Architecture(("b_gate", "r_mag", "b_mag"), _gated),
    "topk": Architecture(("b_enc",), _topk, pointwise=False),
}


class InputNorm(NamedTuple):
    """What happens to x before the encoder, undone after the decoder: out = decoded * scale + shift.

    A named tuple, because `torch.compile` traces through it also where checks of types wrap every dataclass."""

    normed: Float[Tensor, "... d_in"]
    scale: Float[Tensor, "... 1"] | None
    shift: Float[Tensor, "... 1"] | None

    def undo(self, decoded: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        scaled = self.scaled(decoded)
        return scaled if self.shift is None else scaled + self.shift

    def scaled(self, delta: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        """What a difference in the decoder's output becomes: differences are scaled, not shifted."""
        return delta if self.scale is None else delta * self.scale


def _identity(x: Tensor) -> InputNorm:
    return InputNorm(x, None, None)


def _constant_norm(x: Tensor) -> InputNorm:
    # Padding can be exactly zero, and NaN times a mask of 0 is still NaN.
    scale = x.norm(dim=-1, keepdim=True).clamp(min=1e-12) / x.shape[-1] ** 0.5
    return InputNorm(x / scale, scale, None)


def _layer_norm(x: Tensor, eps: float = 1e-5) -> InputNorm:
    mean = x.mean(dim=-1, keepdim=True)
    centred = x - mean
    std = centred.std(dim=-1, keepdim=True)
    return InputNorm(centred / (std + eps), std, mean)


def _centred(x: Tensor) -> InputNorm:
    mean = x.mean(dim=-1, keepdim=True)
    return InputNorm(x - mean, None, mean)


def _centred_constant_norm(x: Tensor) -> InputNorm:
    mean = x.mean(dim=-1, keepdim=True)
    return _constant_norm(x - mean)._replace(shift=mean)


NORMALIZATIONS: dict[str, Callable[[Tensor], InputNorm]] = {
    "none": _identity,
    # The average norm is folded into the weights before they are saved, so nothing is left to do at run time.
    "expected_average_only_in": _identity,
    "constant_norm_rescale": _constant_norm,
    "layer_norm": _layer_norm,
    # The same on a model whose residual stream was centred in training: its mean comes off first and back on last.
    "centred": _centred,
    "centred_constant_norm_rescale": _centred_constant_norm,
}

CENTRED = {
    "none": "centred",
    "expected_average_only_in": "centred",
    "constant_norm_rescale": "centred_constant_norm_rescale",
    "layer_norm": "layer_norm",  # takes the mean off by itself
}
STATED_NORMALIZATIONS = tuple(CENTRED)
"""What files say; `CENTRED` is what each means when the model was centred as well."""
