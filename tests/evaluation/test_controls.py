"""Controls are matched to what they control for: picked by stated rules, and of the measured size."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clampdown.errors import NotEnoughDataError, StrengthError
from clampdown.evaluation import controls
from clampdown.evaluation.controls import FeatureTable
from clampdown.evaluation.utility import Forced, base_replies, benign_kl, costs, mean_edit
from clampdown.models.chat import encode
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.plan import Edit
from tests.evaluation.conftest import arm, clamp, gate, prompt
from tests.steering.conftest import SITE, make_plan


def table(seed: int = 0, n: int = 200) -> FeatureTable:
    rng = np.random.default_rng(seed)
    rates = 10 ** rng.uniform(-4, -0.5, n)
    rates[::7] = 0.0
    decoder = rng.normal(size=(n, 64))
    decoder[3] = decoder[4] + 0.1 * rng.normal(size=64)
    return FeatureTable(rates, rng.normal(size=n), decoder)


def test_the_pool_is_alive_near_in_firing_rate_and_holds_no_twin() -> None:
    facts = table()
    pool = controls.pool(facts, [4])
    assert len(pool) == controls.POOL
    assert not {3, 4} & set(pool.tolist()), "the steered feature and its near-duplicate are no controls"
    distance = np.abs(np.log10(np.maximum(facts.firing_rate, 1e-30) / facts.firing_rate[4]))
    outside = np.setdiff1d(np.flatnonzero(facts.firing_rate > 0), [*pool, 3, 4])
    assert distance[pool].max() <= distance[outside].min()
    assert (facts.firing_rate[pool] > 0).all()


def test_random_features_are_seeded_distinct_and_from_the_pool() -> None:
    facts = table()
    drawn = controls.random_features(facts, [4], 20, seed=1)
    assert len(set(drawn)) == 20
    assert set(drawn) <= set(controls.pool(facts, [4], 40).tolist())
    assert drawn == controls.random_features(facts, [4], 20, seed=1)
    assert drawn != controls.random_features(facts, [4], 20, seed=2)


def test_the_unrelated_feature_points_elsewhere_and_no_finder_ranks_it() -> None:
    facts = table()
    chosen = controls.unrelated_feature(facts, [4])
    unit = facts.decoder / np.linalg.norm(facts.decoder, axis=1, keepdims=True)
    assert abs(unit[chosen] @ unit[4]) <= controls.UNRELATED_COSINE
    rivals = [f for f in controls.pool(facts, [4], 64) if abs(unit[f] @ unit[4]) <= controls.UNRELATED_COSINE]
    assert abs(facts.refusal_score[chosen]) == min(abs(facts.refusal_score[rivals]))


def test_controls_that_cannot_be_had_are_an_error_and_not_a_guess() -> None:
    facts = table()
    with pytest.raises(NotEnoughDataError, match="never fired"):
        controls.pool(facts, [0])
    with pytest.raises(NotEnoughDataError, match="500 were asked"):
        controls.random_features(facts, [4], 500, seed=0)
    aligned = FeatureTable(np.full(9, 0.1), np.zeros(9), np.ones((9, 4)) + 0.4 * np.eye(9, 4))
    with pytest.raises(NotEnoughDataError):
        controls.unrelated_feature(aligned, [0])


shapes = st.sampled_from(
    [
        lambda f: f,
        lambda f: f**2,
        lambda f: math.sqrt(f),
        lambda f: math.log1p(f),
        lambda f: 0.3 + f,
        lambda f: math.expm1(f) if f < 50 else math.nan,
        lambda f: f + 0.4 * math.sin(2 * f),
    ]
)


@given(shapes, st.floats(0.01, 100), st.floats(0.35, 3.0))
def test_search_reaches_the_goal_on_any_growing_quantity(
    shape: Callable[[float], float], scale: float, target: float
) -> None:
    goal = scale * shape(target)
    found = controls.search(lambda factor: scale * shape(factor), goal)
    assert abs(found.reached - goal) <= 0.02 * goal
    assert found.reached == scale * shape(found.factor)


@given(st.floats(1e-3, 1e3), st.floats(0.05, 0.9))
def test_a_proportional_quantity_takes_one_step(slope: float, target: float) -> None:
    """What `add` does to ||x'-x||: one measurement to see the slope, one to confirm."""
    assert controls.search(lambda factor: slope * factor, slope * target).calls <= 2


def test_a_broken_model_is_never_a_match() -> None:
    found = controls.search(lambda factor: factor if factor < 1.5 else math.nan, 1.2)
    assert found.factor == pytest.approx(1.2, rel=0.02)


@pytest.mark.parametrize("goal", [0.0, -1.0, math.nan, math.inf])
def test_a_plan_that_does_nothing_cannot_be_matched(goal: float) -> None:
    with pytest.raises(StrengthError, match="nothing to match"):
        controls.search(lambda factor: factor, goal)


def test_an_unmatched_control_is_an_error() -> None:
    with pytest.raises(StrengthError, match="no strength measures 5"):
        controls.search(lambda factor: 1 - math.exp(-factor), 5.0)


def test_the_same_edits_on_other_features() -> None:
    edits = [
        Edit(site=SITE.name, operator="clamp", features=(1, 2), strengths=(3.0, 4.0), p99=(1.0, 1.0)),
        Edit(site=SITE.name, operator="scale", features=(5,), strengths=(0.5,), scope="assistant"),
    ]
    plan = make_plan(*edits, gate=gate(1))
    found = controls.with_features(plan, [7, 8, 9], "control")
    assert [e.features for e in found.edits] == [(7, 8), (9,)]
    assert [(e.strengths, e.scope, e.operator) for e in found.edits] == [
        ((3.0, 4.0), "all", "clamp"),
        ((0.5,), "assistant", "scale"),
    ]
    assert (found.name, found.gate, found.edits[0].p99) == ("control", None, None)
    assert controls.with_features(found, [1, 2, 5], "test").edits[1] == edits[1]


def test_strengths_are_scaled_from_where_the_operator_does_nothing() -> None:
    plan = make_plan(
        Edit(site=SITE.name, operator="clamp", features=(1,), strengths=(3.0,)),
        Edit(site=SITE.name, operator="scale", features=(5,), strengths=(0.5,)),
    )
    assert [e.strengths for e in controls.scaled(plan, 2.0).edits] == [(6.0,), (0.0,)]
    assert [e.strengths for e in controls.scaled(plan, 0.0).edits] == [(0.0,), (1.0,)]
    with pytest.raises(StrengthError):
        controls.with_strengths(plan, [math.inf, 1.0])


@pytest.fixture(scope="module")
def forced(lm: LanguageModel) -> tuple[Forced, ...]:
    return base_replies(lm, [prompt(i) for i in range(6)], max_new_tokens=8)


def edit_by_hand(lm: LanguageModel, sae: Sae, forced: tuple[Forced, ...], feature: int, strength: float) -> float:
    """Mean ||x'-x|| / ||x|| of a clamp at all positions, from single unpadded passes and the full encoder."""
    ratios = []
    for text in forced:
        reply = text.reply if text.ended else text.reply[:-1]
        ids = torch.tensor([[*encode(lm, text.prompt.messages), *reply]])
        x = lm.model(ids, output_hidden_states=True).hidden_states[SITE.layer + 1]
        delta = (strength - sae.encode(x)[..., feature, None]) * sae.W_dec[feature]
        ratios.append((delta.norm(dim=-1) / x.norm(dim=-1)).flatten())
    return float(torch.cat(ratios).mean())


def test_a_control_has_the_edit_size_of_what_it_controls_for(
    lm: LanguageModel, sae: Sae, forced: tuple[Forced, ...]
) -> None:
    measure = mean_edit(lm, sae, forced)
    goal = measure(clamp(4.0, feature=3))
    assert goal == pytest.approx(edit_by_hand(lm, sae, forced, 3, 4.0), rel=1e-4)
    found = controls.matched_plan(controls.with_features(clamp(4.0), [11], "control"), measure, goal)
    (strength,) = found.plan.edits[0].strengths
    assert edit_by_hand(lm, sae, forced, 11, strength) == pytest.approx(goal, rel=0.021)


def test_a_direction_is_matched_on_edit_size_or_on_kl(lm: LanguageModel, sae: Sae, forced: tuple[Forced, ...]) -> None:
    steered = clamp(4.0)
    vector = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(5)).tolist()
    direction = controls.direction_plan(steered, vector, "difference of means")
    assert (direction.edits[0].site, direction.edits[0].scope, direction.gate) == (SITE.name, "all", None)
    for measure in (mean_edit(lm, sae, forced), benign_kl(lm, sae, forced)):
        goal = measure(steered)
        found = controls.matched_plan(direction, measure, goal)
        assert measure(found.plan) == pytest.approx(goal, rel=0.02)
        assert found.reached == measure(found.plan)


def test_the_system_prompt_arm_steers_nothing_and_is_read(
    lm: LanguageModel, sae: Sae, forced: tuple[Forced, ...]
) -> None:
    asked = controls.system_prompt_arm("w9 w9 w9")
    assert asked.plan is None
    assert [m.role for m in asked.messages(prompt(0))] == ["system", "user"]
    found = costs(lm, sae, [asked, arm(clamp(0.1))], forced)
    assert (found["system prompt"].kl or 0) > 0
    assert found["system prompt"].edit_norm == 0.0
