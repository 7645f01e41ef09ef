"""Steering at every site of every family does what was predicted from an unsteered pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae, SaeConfig
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit, ModelRef, Plan, SaeRef
from clampdown.types import Point, Site
from tests.models.conftest import WIDTH

IDS = torch.tensor([[1, 5, 9, 20, 33, 7, 41], [1, 8, 30, 30, 12, 50, 3]])
LAYER = 1
FEATURES, VALUES = (3, 17), (2.5, -1.0)
Tiny = Callable[[str], LanguageModel]


def random_sae(site: Site) -> Sae:
    draw = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (WIDTH, 40), "W_dec": (40, WIDTH), "b_enc": (40,), "b_dec": (WIDTH,)}
    tensors = {name: torch.randn(*shape, generator=draw) * 0.3 for name, shape in shapes.items()}
    return Sae(SaeConfig("relu", WIDTH, 40, site), tensors, "random", "s0")


def clamp_at(lm: LanguageModel, sae: Sae) -> Plan:
    site = sae.site.name
    return Plan(
        name="clamp",
        model=ModelRef(name=lm.name, revision=lm.revision),
        saes=(SaeRef(site=site, name=sae.name, revision=sae.revision),),
        edits=(Edit(site=site, operator="clamp", features=FEATURES, strengths=VALUES),),
    )


def captured(lm: LanguageModel) -> dict[Point, Tensor]:
    """What each site of one block holds; hooks that are there already have acted before."""
    found: dict[Point, Tensor] = {}
    handles = [
        lm.layout.hook_point(Site(LAYER, p)).register(lambda x, p=p: found.__setitem__(p, x.clone())) for p in Point
    ]
    try:
        lm.model(IDS)
    finally:
        for handle in handles:
            handle.remove()
    return found


def edited(sae: Sae, x: Tensor) -> Tensor:
    """Encode everything, set the features, decode, keep the error: written apart from the sparse path."""
    code = sae.encode(x)
    changed = code.clone()
    changed[..., FEATURES] = torch.tensor(VALUES)
    return x - sae.decode(code) + sae.decode(changed)


@pytest.mark.parametrize("point", list(Point))
def test_a_clamp_changes_what_is_written_there_and_the_block_adds_it_up(
    tiny: Tiny, architecture: str, point: Point
) -> None:
    """What stands before the site in the block is untouched, the site holds the predicted value, and the block's output
    is still the sum of its parts, with the edited one."""
    lm, sae = tiny(architecture), random_sae(Site(LAYER, point))
    plain = captured(lm)
    with steer(lm, clamp_at(lm, sae), sae) as steering:
        steered = captured(lm)
        receipts = steering.receipts()
    predicted = edited(sae, plain[point])
    size = predicted.abs().max()
    assert torch.allclose(steered[point] / size, predicted / size, atol=1e-5)
    assert all(r is not None and r.tokens_touched == IDS.shape[1] for r in receipts)
    if point is Point.RESID_POST:
        assert all(torch.equal(steered[p], plain[p]) for p in Point if p is not point)
        return
    total = steered[Point.RESID_PRE] + steered[Point.ATTN_OUT] + steered[Point.MLP_OUT]
    assert torch.allclose(total / size, steered[Point.RESID_POST] / size, atol=1e-5)
    assert not torch.allclose(steered[Point.RESID_POST], plain[Point.RESID_POST], atol=1e-3)
