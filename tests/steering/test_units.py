"""Strengths in every unit resolve to the raw values that the definition gives, computed here the long way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clampdown.errors import PromptSetError, StrengthError
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.plan import Edit
from clampdown.steering.program import Directions
from clampdown.steering.units import Calibration, Strength, Unit, calibrate, in_words, measured, resolve
from clampdown.types import Message, Prompt
from tests.steering.conftest import SITE, random_sae

FEATURES = (5, 11, 30)
TEXTS = ["w1 w2 w3", "w4", "w9 w8 w7 w6 w5", "w11 w12", "w20 w3 w17 w9", "w30 w31 w38"]
PROMPTS = [Prompt(f"p{i}", (Message("user", text),), "s") for i, text in enumerate(TEXTS)]
KINDS = {
    "jumprelu": {"architecture": "jumprelu"},
    "topk": {"architecture": "topk", "k": 24},
    "normalised": {"architecture": "relu", "normalize_activations": "layer_norm", "apply_b_dec_to_input": False},
}


def of(lm: LanguageModel, sae: Sae, features: tuple[int, ...] = FEATURES) -> Calibration:
    return calibrate(lm, SITE, sae.select(features), PROMPTS)


def edited(code: Tensor, operator: str, strengths: tuple[float, ...]) -> Tensor:
    """The operators' table of methods.md, on a full code."""
    code = code.clone()
    for feature, s in zip(FEATURES, strengths, strict=False):
        a = code[:, feature]
        code[:, feature] = {
            "clamp": torch.full_like(a, s),
            "clamp_active": torch.where(a > 0, s, a),
            "floor": a.clamp(min=s),
            "scale": a * s,
            "add": a + s,
        }[operator]
    return code


def moved(sae: Sae, x: Tensor, operator: str, strengths: tuple[float, ...]) -> float:
    """Mean ||x'-x|| / ||x|| over changed tokens, by encoding, editing and decoding everything."""
    code = sae.encode(x)
    delta = sae.decode(edited(code, operator, strengths), x) - sae.decode(code, x)
    size = delta.norm(dim=-1)
    touched = size > 1e-6 * x.norm(dim=-1)
    return float((size[touched] / x.norm(dim=-1)[touched]).mean())


@given(value=st.floats(-1e6, 1e6).map(lambda v: float(f"{v:g}")), unit=st.sampled_from(list(Unit)))
def test_a_strength_reads_back(value: float, unit: Unit) -> None:
    assert Strength.parse(str(Strength(value, unit))) == Strength(value, unit)


@pytest.mark.parametrize("text", ["", "x", "1.5 p98", "p99", "1,5", "5%%", "nan", "inf", "-infmax"])
def test_what_is_no_strength_is_refused(text: str) -> None:
    with pytest.raises(StrengthError, match=r"not a (strength|finite number)"):
        Strength.parse(text)


@pytest.mark.parametrize("kind", KINDS)
def test_max_and_p99_are_the_features_own_over_tokens_where_they_are_active(lm: LanguageModel, kind: str) -> None:
    sae = random_sae(**KINDS[kind])  # type: ignore[arg-type]
    found = of(lm, sae)
    code = sae.encode(found.residual)[:, list(FEATURES)].double().numpy()
    assert len(code) > sum(len(text.split()) for text in TEXTS)  # contents, and where each reply is decided
    for i, column in enumerate(code.T):
        active = torch.tensor(column[column > 0])
        assert found.largest[i] == pytest.approx(float(active.max()), rel=1e-5)
        assert found.p99[i] == pytest.approx(float(active.quantile(0.99)), rel=1e-4)
    asked = [Strength(2.0, Unit.P99), Strength(0.5, Unit.MAX), Strength(7.0)]
    raw = resolve(asked, "clamp", found)
    assert raw == pytest.approx((2 * found.p99[0], 0.5 * found.largest[1], 7.0))
    mean_length = float(found.residual.norm(dim=-1).mean())
    assert resolve([Strength(0.1, Unit.RESID)], "add", found) == pytest.approx((0.1 * mean_length,) * 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operator", ["clamp", "clamp_active", "floor", "scale", "add"])
@pytest.mark.parametrize("share", [60.0, 250.0])
def test_a_share_of_the_residual_is_what_encoding_editing_and_decoding_moves(
    lm: LanguageModel, kind: str, operator: str, share: float
) -> None:
    sae = random_sae(**KINDS[kind])  # type: ignore[arg-type]
    found = of(lm, sae)
    raw = resolve([Strength(share, Unit.PERCENT)], operator, found)
    assert moved(sae, found.residual, operator, raw) == pytest.approx(share / 100, rel=1e-3)
    neutral = 1.0 if operator == "scale" else 0.0
    proportions = torch.tensor(raw) - neutral
    assert torch.allclose(proportions / proportions[0], torch.tensor(found.p99) / found.p99[0], rtol=1e-4)


def test_a_plan_remembers_all_three_units(lm: LanguageModel, sae: Sae) -> None:
    found = of(lm, sae, (5,))
    raw = resolve([Strength(1.5, Unit.P99)], "clamp", found)
    edit = measured(Edit(site=SITE.name, operator="clamp", features=(5,), strengths=raw), found)
    assert edit.strengths == raw and edit.p99 == found.p99
    assert edit.edit_norm == pytest.approx(moved(sae, found.residual, "clamp", raw), rel=1e-4)
    said = in_words(edit)
    assert f"clamp feature 5 to {raw[0]:.4g} (1.5 x p99)" in said
    assert f"moves the residual by {edit.edit_norm:.1%}" in said


def test_a_direction_is_measured_as_a_share_too(lm: LanguageModel) -> None:
    vector = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    found = calibrate(lm, SITE, Directions(vector), PROMPTS)
    (raw,) = resolve([Strength(-20, Unit.PERCENT)], "add_direction", found)
    expected = (vector.norm() / found.residual.norm(dim=-1)).mean() * abs(raw)
    assert raw < 0 and float(expected) == pytest.approx(0.2, rel=1e-4)
    with pytest.raises(StrengthError, match="plain number"):
        resolve([Strength(1, Unit.P99)], "add_direction", found)


@pytest.mark.parametrize(
    ("asked", "operator", "message"),
    [
        (["1", "2"], "clamp", "2 strengths for 3 features"),
        (["1%", "2%", "3%"], "clamp", "whole edit"),
        (["2p99"], "scale", "plain number"),
        (["-5%"], "floor", "no strength moves"),
        (["0.0001%"], "clamp", "out of reach"),
    ],
)
def test_units_that_mean_nothing_here_are_refused(
    lm: LanguageModel, sae: Sae, asked: list[str], operator: str, message: str
) -> None:
    with pytest.raises(StrengthError, match=message):
        resolve([Strength.parse(text) for text in asked], operator, of(lm, sae))


def test_a_feature_that_never_fires_has_no_scale(lm: LanguageModel, sae: Sae) -> None:
    silent = Sae(sae.cfg, {**sae.tensors, "threshold": torch.full((64,), 1e9)}, sae.name, sae.revision)
    found = of(lm, silent)
    assert found.p99 == found.largest == (0.0, 0.0, 0.0)
    with pytest.raises(StrengthError, match="never fired"):
        resolve([Strength(1, Unit.P99)], "clamp", found)
    with pytest.raises(StrengthError, match="never fired"):
        resolve([Strength(5, Unit.PERCENT)], "clamp", found)
    assert resolve([Strength(3)], "clamp", found) == (3.0, 3.0, 3.0)
    assert found.edit_norm("clamp", (0.0, 0.0, 0.0)) is None
    with pytest.raises(PromptSetError, match="no calibration prompts"):
        calibrate(lm, SITE, sae.select([5]), [])
