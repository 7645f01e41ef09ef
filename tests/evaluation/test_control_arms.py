"""Every control is of the plan's own size or says why it is not, and stands behind the plan's own gate."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clampdown.errors import StrengthError
from clampdown.evaluation.condition import best_f1_threshold, condition, scores
from clampdown.evaluation.control_arms import Control, Matching, Material, control_arms, pass_through
from clampdown.evaluation.controls import FeatureTable
from clampdown.evaluation.utility import Forced, base_replies, benign_kl, mean_edit
from clampdown.models.chat import encode
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit
from clampdown.types import ArmKind, Site
from tests.evaluation.conftest import clamp, gate, prompt
from tests.steering.conftest import SITE, make_plan

PLAN = clamp(4.0, name="steered")
BELOW = Site.parse("blocks.1.hook_resid_pre")


@pytest.fixture(scope="module")
def forced(lm: LanguageModel) -> tuple[Forced, ...]:
    return base_replies(lm, [prompt(i) for i in range(3)], max_new_tokens=3)


@pytest.fixture(scope="module")
def material(lm: LanguageModel, sae: Sae) -> Material:
    rng = np.random.default_rng(0)
    rates = rng.uniform(0.05, 0.3, sae.cfg.d_sae)
    table = FeatureTable(rates, rng.normal(size=sae.cfg.d_sae), sae.W_dec.numpy().astype(float))
    vector = rng.normal(size=lm.d_model).tolist()
    sides = [prompt(i, "harmful") for i in range(6)], [prompt(i + 20) for i in range(6)]
    return Material(table, tuple(vector), condition(lm, BELOW, vector, *sides))


@pytest.fixture(scope="module")
def found(lm: LanguageModel, sae: Sae, forced: tuple[Forced, ...], material: Material) -> tuple[Control, ...]:
    return control_arms(PLAN, material, Matching("edit", mean_edit(lm, sae, forced), n_random=20))


def test_the_set_is_complete(found: tuple[Control, ...]) -> None:
    names = [control.name.split(" (")[0] for control in found]
    assert names == [
        *(f"random feature {i}" for i in range(1, 21)),
        *(
            "unrelated feature",
            "difference of means",
            "CAST-style",
            "ablated direction",
            "pass-through",
            "system prompt",
        ),
    ]
    features = [c.plan.edits[0].features for c in found[:20] if c.plan]
    assert len(set(features)) == 20
    assert all(control.arm for control in found)


def test_what_is_matched_has_the_plans_size(
    lm: LanguageModel, sae: Sae, forced: tuple[Forced, ...], found: tuple[Control, ...]
) -> None:
    measure = mean_edit(lm, sae, forced)
    goal = measure(PLAN)
    for control in found[:23]:
        assert control.plan is not None and control.goal == goal
        saes = control.plan.saes if control.name != "CAST-style" else ()
        open_plan = control.plan.model_copy(update={"gate": None, "saes": saes})
        assert measure(open_plan) == pytest.approx(goal, rel=0.02)
        assert control.reached == measure(open_plan)
    for control in found[23:]:
        assert "not matched" in control.note


def test_controls_can_be_matched_on_what_they_do_to_benign_text(
    lm: LanguageModel, sae: Sae, forced: tuple[Forced, ...], material: Material
) -> None:
    measure = benign_kl(lm, sae, forced)
    kl = control_arms(PLAN, material, Matching("kl", measure, n_random=2))
    assert {c.name: measure(c.plan) for c in kl[:2] if c.plan} == {
        c.name: pytest.approx(measure(PLAN), rel=0.02) for c in kl[:2]
    }


def test_controls_of_a_gated_plan_are_matched_as_if_open_and_stand_behind_its_gate(
    lm: LanguageModel, sae: Sae, forced: tuple[Forced, ...], material: Material
) -> None:
    shut = make_plan(*PLAN.edits, gate=gate(1, 2, threshold=1e9))
    measure = mean_edit(lm, sae, forced)
    assert measure(shut) == 0.0
    for control in control_arms(shut, material, Matching("edit", measure, n_random=1)):
        if control.plan is not None and control.name != "CAST-style":
            assert control.plan.gate == shut.gate
            assert control.plan.saes
    assert control_arms(shut, material, Matching("edit", measure, n_random=1))[0].goal == measure(PLAN)


def test_the_pass_through_is_the_saes_reconstruction(lm: LanguageModel, sae: Sae) -> None:
    through = pass_through(PLAN)
    assert through is not None
    ids = torch.tensor([encode(lm, prompt(3).messages)])
    seen: list[torch.Tensor] = []
    before = lm.model(ids, output_hidden_states=True).hidden_states[SITE.layer + 1]
    with steer(lm, through, sae):
        handle = lm.layout.blocks[SITE.layer + 1].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        lm.model(ids)
        handle.remove()
    torch.testing.assert_close(seen[0], sae.reconstruct(before))
    assert not torch.allclose(seen[0], before, atol=1e-2)


def test_the_condition_is_the_mean_cosine_over_the_prompts_own_words(lm: LanguageModel) -> None:
    vector = np.random.default_rng(1).normal(size=lm.d_model).tolist()
    found = condition(lm, BELOW, vector, [prompt(1), prompt(4)], [prompt(2)])
    prompts = [prompt(i) for i in range(5)]
    for value, asked in zip(scores(lm, found, prompts), prompts, strict=True):
        ids = torch.tensor([encode(lm, asked.messages)])
        x = lm.model(ids, output_hidden_states=True).hidden_states[BELOW.layer]
        cosines = torch.nn.functional.cosine_similarity(x, torch.tensor(vector), dim=-1)
        content = lm.chat.content_mask(ids, torch.ones_like(ids))
        assert value == pytest.approx(float(cosines[content].mean()), abs=1e-5)


values = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12).map(np.array)


@given(values, values)
def test_no_threshold_has_a_better_f1(harmful: np.ndarray, harmless: np.ndarray) -> None:
    def f1(cut: float) -> float:
        hits, false, missed = (harmful > cut).sum(), (harmless > cut).sum(), (harmful <= cut).sum()
        return 2 * hits / (2 * hits + false + missed)

    threshold, found = best_f1_threshold(harmful, harmless)
    assert found == pytest.approx(f1(threshold))
    assert found >= max(f1(cut) for cut in np.arange(-6.5, 6.5, 0.5)) - 1e-12


def test_what_cannot_be_had_is_a_row_with_its_reason_and_no_arm(
    lm: LanguageModel, sae: Sae, forced: tuple[Forced, ...], material: Material
) -> None:
    matching = Matching("edit", mean_edit(lm, sae, forced), n_random=20)
    bare = {control.name: control for control in control_arms(PLAN, Material(None, None), matching)}
    assert bare["random features"].arm is None and "no SAE feature" in bare["random features"].note
    assert bare["difference of means"].arm is None and "no prompts" in bare["difference of means"].note
    assert bare["system prompt"].arm and bare["system prompt"].arm.system_prompt
    dense = make_plan(Edit(site=SITE.name, operator="add_direction", strengths=(2.0,), vector="v"),
                      vectors={"v": tuple([1.0] * lm.d_model)})  # fmt: skip
    names = {control.name: control for control in control_arms(dense, material, matching)}
    assert names["pass-through"].arm is None
    assert names["difference of means"].arm and names["difference of means"].arm.kind is ArmKind.DIRECTION
    few = replace(matching, n_random=500)
    assert any(c.arm is None and "500" in c.note for c in control_arms(PLAN, material, few))


def test_a_plan_that_does_nothing_has_no_controls(
    lm: LanguageModel, sae: Sae, forced: tuple[Forced, ...], material: Material
) -> None:
    idle = make_plan(Edit(site=SITE.name, operator="scale", features=(3,), strengths=(1.0,)))
    with pytest.raises(StrengthError, match="nothing to match"):
        control_arms(idle, material, Matching("edit", mean_edit(lm, sae, forced)))
