"""What holds for every plan: clamping then reading, the order of features, disjoint plans, zero."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clampdown.models.loading import LanguageModel
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit, ModelRef, Plan, SaeRef
from clampdown.types import Site
from tests.saes.files import saelens
from tests.steering.conftest import SITE, make_plan, random_sae, tiny_llama

IDS = torch.tensor([[7, 9, 12, 30, 6], [8, 8, 41, 11, 20]])
NEXT = Site.parse("blocks.2.hook_resid_pre")
OPERATORS = ("clamp", "clamp_active", "floor", "scale", "add")
VECTOR = tuple(torch.randn(32, generator=torch.Generator().manual_seed(9)).tolist())
STRENGTH = st.floats(-6, 6, width=32)
quick = settings(max_examples=25)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_llama()


def residual(lm: LanguageModel, edits: Sequence[Edit], sae: Sae) -> Tensor:
    """What the next block reads, with these edits at the SAE's site."""
    vectors = {"vectors": {"v": VECTOR}} if any(edit.vector for edit in edits) else {}
    seen: list[Tensor] = []
    with steer(lm, make_plan(*edits, **vectors) if edits else None, sae):
        handle = lm.layout.hook_point(NEXT).register(lambda x: seen.append(x))
        lm.layout.decoder(IDS)
        handle.remove()
    return seen[0]


def edit(operator: str, strengths: dict[int, float]) -> Edit:
    return Edit(site=SITE.name, operator=operator, features=tuple(strengths), strengths=tuple(strengths.values()))


def matched_sae(seed: int) -> Sae:
    """A ReLU SAE whose encoder columns are its decoder rows, of length 1: w_f . d_f = 1."""
    sae = random_sae(seed, architecture="relu")
    return Sae(sae.cfg, {**sae.tensors, "W_enc": sae.W_dec.T.clone()}, sae.name, sae.revision)


@quick
@given(feature=st.integers(0, 63), value=st.floats(0.125, 20, width=32), seed=st.integers(0, 3))
def test_reading_after_a_clamp_gives_the_clamp_where_the_encoder_permits(model, feature, value, seed) -> None:
    """With w . d = 1 the second reading is the clamp, at every token where the feature was active."""
    sae = matched_sae(seed)
    before = sae.encode(residual(model, [], sae))[..., feature]
    after = sae.encode(residual(model, [edit("clamp", {feature: value})], sae))[..., feature]
    live = before > 0
    torch.testing.assert_close(after[live], torch.full_like(after[live], value), atol=1e-4, rtol=1e-4)


@quick
@given(feature=st.integers(0, 63), value=STRENGTH, seed=st.integers(0, 3))
def test_reading_after_a_clamp_is_what_the_algebra_says(model, feature, value, seed) -> None:
    """In general the second reading is relu(pre + (c - a) w . d), which is c only where w . d permits."""
    sae = random_sae(seed, architecture="relu")
    x = residual(model, [], sae)
    pre = (x - sae.b_dec) @ sae.W_enc[:, feature] + sae.tensors["b_enc"][feature]
    gain = sae.W_enc[:, feature] @ sae.W_dec[feature]
    expected = torch.relu(pre + (value - torch.relu(pre)) * gain)
    after = sae.encode(residual(model, [edit("clamp", {feature: value})], sae))[..., feature]
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)


@quick
@given(
    strengths=st.dictionaries(st.integers(0, 63), STRENGTH, min_size=2, max_size=5),
    operator=st.sampled_from(OPERATORS),
    data=st.data(),
)
def test_the_order_of_features_does_not_matter(model, strengths, operator, data) -> None:
    sae = random_sae()
    shuffled = {f: strengths[f] for f in data.draw(st.permutations(list(strengths)))}
    one, other = (residual(model, [edit(operator, s)], sae) for s in (strengths, shuffled))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@quick
@given(
    first=st.dictionaries(st.integers(0, 31), STRENGTH, min_size=1, max_size=3),
    second=st.dictionaries(st.integers(32, 63), STRENGTH, min_size=1, max_size=3),
    operators=st.tuples(st.sampled_from(OPERATORS), st.sampled_from(OPERATORS)),
    kind=st.sampled_from(["jumprelu", "topk"]),
    dense=STRENGTH,
)
def test_the_changes_of_disjoint_plans_add_up(model, first, second, operators, kind, dense) -> None:
    """Two operators, disjoint features and a dense vector: every activation is read from the unedited residual."""
    sae = random_sae(architecture=kind, **({"k": 16} if kind == "topk" else {}))
    plain = residual(model, [], sae)
    parts = [edit(operators[0], first), edit(operators[1], second)]
    parts.append(Edit(site=SITE.name, operator="add_direction", vector="v", strengths=(dense,)))
    together = residual(model, parts, sae) - plain
    apart = sum((residual(model, [part], sae) - plain for part in parts), torch.zeros(()))
    torch.testing.assert_close(together, apart, atol=2e-4, rtol=1e-4)


@settings(max_examples=10)
@given(features=st.sets(st.integers(0, 63), min_size=1, max_size=4), seed=st.integers(0, 3))
def test_zero_is_the_identity_bit_for_bit(model, features, seed) -> None:
    sae = random_sae(seed)
    plain = residual(model, [], sae)
    neutral = [("add", 0.0), ("scale", 1.0), ("floor", 0.0)]
    for operator, value in neutral:
        assert torch.equal(residual(model, [edit(operator, dict.fromkeys(sorted(features), value))], sae), plain)
    for operator in ("add_direction", "ablate_direction"):
        dense = Edit(site=SITE.name, operator=operator, vector="v", strengths=(0.0,))
        assert torch.equal(residual(model, [dense], sae), plain)


@pytest.mark.parametrize("drop", [False, True])
def test_a_saved_sae_is_opened_by_the_plans_own_word(model: LanguageModel, drop: bool, tmp_path) -> None:
    """No SAE is passed: the plan's name is enough, and gives what passing it gives. Two sites, two SAEs."""
    saes, edits = [], []
    for layer, seed in ((1, 0), (2, 1)):
        name = f"blocks.{layer}.hook_resid_post"
        path = saelens(random_sae(seed), tmp_path / name, metadata={"sae_lens_version": "6.5.0", "hook_name": name})
        saes.append(load_sae(path))
        error = "drop" if drop else "keep"
        edits.append(Edit(site=name, operator="clamp", features=(5, 2), strengths=(4.0, 1.0), error_term=error))
    plan = Plan(
        name="two",
        model=ModelRef(name="tiny", revision="r0"),
        saes=tuple(SaeRef(site=sae.site.name, name=sae.name, revision=sae.revision) for sae in saes),
        edits=tuple(edits),
    )
    with steer(model, plan):
        opened = model.model(IDS).logits
    with steer(model, plan, saes):
        passed = model.model(IDS).logits
    assert torch.equal(opened, passed)

    def plain_way(sae: Sae):
        def hook(_m: object, _a: object, x: Tensor) -> Tensor:
            code = sae.encode(x)
            changed = code.clone()
            changed[..., 5], changed[..., 2] = 4.0, 1.0
            return sae.decode(changed) if drop else x - sae.decode(code) + sae.decode(changed)

        return model.layout.blocks[sae.site.layer].register_forward_hook(hook)

    handles = [plain_way(sae) for sae in saes]
    torch.testing.assert_close(opened, model.model(IDS).logits, atol=1e-3, rtol=1e-4)
    for handle in handles:
        handle.remove()
