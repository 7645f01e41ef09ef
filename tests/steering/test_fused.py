"""The quick way of a decoding step adds what the general way adds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.fused import FusedEdit, decoding_step, idle
from clampdown.steering.operators import OPERATORS
from clampdown.steering.plan import Edit, Plan
from clampdown.steering.program import Reach, SiteProgram, site_programs

PlanOf = Callable[..., Plan]
VECTORS = {"v": tuple(torch.randn(32, generator=torch.Generator().manual_seed(1)).tolist())}


def edit_of(site: str, operator: str, scope: str = "all", **fields: object) -> Edit:
    channels = (
        {"vector": "v", "strengths": (1.5,)}
        if OPERATORS[operator].dense
        else {"features": (9, 5), "strengths": (4.0, 0.5)}
    )
    return Edit(site=site, operator=operator, scope=scope, **channels, **fields)  # type: ignore[arg-type]


def program_of(lm: LanguageModel, sae: Sae, plans: list[Plan | None]) -> SiteProgram:
    (program,) = site_programs(plans, lm, {sae.site.name: sae})
    return program


@pytest.mark.parametrize("architecture", ["relu", "jumprelu"])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("operator", list(OPERATORS))
def test_the_quick_way_equals_the_general_way(
    lm: LanguageModel,
    sae_of: Callable[..., Sae],
    site: str,
    plan_of: PlanOf,
    operator: str,
    centred: bool,
    architecture: str,
) -> None:
    sae = sae_of(architecture=architecture, apply_b_dec_to_input=centred)
    x = torch.randn(4, 1, 32, generator=torch.Generator().manual_seed(2))
    plan = plan_of(edit_of(site, operator), vectors=VECTORS)
    for plans, factors in (([plan] * 4, [1, 1, 1, 1]), ([plan, None, plan, plan], [1, 1, 0, 1])):
        program = program_of(lm, sae, plans)
        weights = {Reach("all", 0): torch.tensor(factors).float().unsqueeze(1)}
        step = decoding_step(program, weights)
        assert isinstance(step, FusedEdit)
        changed = step(x)
        torch.testing.assert_close(changed, x + program.delta(x, weights), atol=1e-5, rtol=1e-5)
        assert not torch.equal(changed, x)
        out_of_reach = [row for row in range(4) if plans[row] is None or factors[row] == 0]
        assert torch.equal(changed[out_of_reach], x[out_of_reach])


def test_where_nothing_is_in_reach_nothing_is_done(lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf) -> None:
    program = program_of(lm, sae, [plan_of(edit_of(site, "clamp", "prompt"), edit_of(site, "add", "all"))])
    assert decoding_step(program, {Reach("prompt", 0): torch.zeros(1, 1), Reach("all", 0): torch.zeros(1, 1)}) is idle
    dropping = program_of(lm, sae, [plan_of(edit_of(site, "clamp", error_term="drop"))])
    assert decoding_step(dropping, {Reach("all", 0): torch.ones(1, 1)}) is None


def test_what_the_quick_way_cannot_say_is_left_to_the_general_one(
    lm: LanguageModel, sae_of: Callable[..., Sae], site: str, plan_of: PlanOf
) -> None:
    clamp, weights = plan_of(edit_of(site, "clamp")), {Reach("all", 0): torch.ones(1, 1)}
    for sae in (sae_of(architecture="topk", k=4), sae_of(normalize_activations="layer_norm")):
        assert decoding_step(program_of(lm, sae, [clamp]), weights) is None


def test_a_crowd_of_operators_and_scopes_is_one_step(lm: LanguageModel, sae: Sae, site: str, plan_of: PlanOf) -> None:
    """Every operator beside every other, two edits of one channel that add up, and rows out of reach."""
    single = [plan_of(edit_of(site, operator), vectors=VECTORS) for operator in OPERATORS]
    double = [
        plan_of(edit_of(site, "clamp"), edit_of(site, "add", "generated"), edit_of(site, "floor"), vectors=VECTORS),
        plan_of(
            edit_of(site, "clamp"), edit_of(site, "clamp", "generated"), edit_of(site, "add_direction"), vectors=VECTORS
        ),
    ]
    plans = [*single, None, *double, *single]
    program = program_of(lm, sae, plans)
    weights = {Reach("all", 0): torch.ones(len(plans), 1), Reach("generated", 0): torch.ones(len(plans), 1)}
    weights[Reach("all", 0)][-2:] = 0
    x = 3 * torch.randn(len(plans), 1, 32, generator=torch.Generator().manual_seed(2))
    step = decoding_step(program, weights)
    assert isinstance(step, FusedEdit)
    changed, expected = step(x), x + program.delta(x, weights)
    torch.testing.assert_close(changed, expected, atol=1e-5, rtol=1e-5)
    still = [i for i in range(len(plans)) if torch.equal(expected[i], x[i])]
    assert torch.equal(changed[still], x[still]) and {len(single), len(plans) - 2, len(plans) - 1} <= set(still)


@pytest.mark.parametrize("name", [name for name, operator in OPERATORS.items() if operator.line])
def test_an_operators_line_is_its_coefficient(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    activation, strength = torch.randn(50, 7, 3, generator=draw), torch.randn(50, 1, 3, generator=draw)
    line = OPERATORS[name].line
    assert line is not None
    slope, offset = line(strength)
    assert torch.equal(slope * activation + offset, OPERATORS[name].coefficient(activation, strength))
