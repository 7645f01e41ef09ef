"""Random SAEs of every kind."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clampdown.saes.sae import Sae, SaeConfig
from clampdown.types import Site

D_IN, D_SAE, K = 12, 40, 5
KINDS = ("relu", "jumprelu", "topk", "batchtopk", "gated")
NORMALIZATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
VARIANTS = list(itertools.product(KINDS, NORMALIZATIONS, (True, False)))


def random_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Every tensor that any kind needs, at scales where some features are on and some off."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    return {
        "W_enc": normal(D_IN, D_SAE) * 0.4,
        "W_dec": normal(D_SAE, D_IN) * 0.5,
        "b_enc": normal(D_SAE) * 0.3,
        "b_dec": normal(D_IN) * 0.5,
        "threshold": normal(D_SAE).abs() * 0.4,
        "b_gate": normal(D_SAE) * 0.3,
        "b_mag": normal(D_SAE) * 0.3,
        "r_mag": normal(D_SAE) * 0.3,
    }


def random_sae(kind: str = "jumprelu", normalization: str = "none", centred: bool = True, seed: int = 0) -> Sae:
    cfg = SaeConfig(
        architecture=kind,  # type: ignore[arg-type]
        d_in=D_IN,
        d_sae=D_SAE,
        site=Site(1),
        apply_b_dec_to_input=centred,
        normalize_activations=normalization,  # type: ignore[arg-type]
        k=K,
    )
    return Sae(cfg, random_tensors(seed), f"{kind}/{normalization}")


@pytest.fixture
def residual() -> Tensor:
    """Residual-like vectors [batch, pos, d_in], of several lengths."""
    draw = torch.Generator().manual_seed(1)
    return torch.randn(3, 7, D_IN, generator=draw) * torch.tensor([0.3, 1.0, 4.0])[:, None, None] + 0.2


SaeOf = Callable[..., Sae]
