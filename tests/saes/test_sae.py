"""The SAE's mathematics: the sparse path against the full one, for every kind, normalisation and bias convention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clampdown.errors import CheckpointError, FeatureIndexError, SaeError, SiteError, WidthMismatchError
from clampdown.saes.sae import Sae, check_fits
from clampdown.types import Site
from tests.saes.conftest import D_IN, D_SAE, KINDS, VARIANTS, K, random_sae, random_tensors

variants = pytest.mark.parametrize(("kind", "normalization", "centred"), VARIANTS)
FEATURES = [3, 17, 0, 39, 8]


@variants
def test_reading_a_few_features_equals_encoding_all(kind, normalization, centred, residual: Tensor) -> None:
    sae = random_sae(kind, normalization, centred)
    full = sae.encode(residual)
    assert 0 < (full > 0).float().mean() < 1
    assert torch.allclose(sae.select(FEATURES).read(residual), full[..., FEATURES], atol=1e-5)


@variants
def test_writing_a_few_features_equals_editing_the_code_and_decoding(kind, normalization, centred, residual) -> None:
    """x + write(c) is encode, edit, decode, with the SAE's error kept: x - decode(f) + decode(f + c)."""
    sae = random_sae(kind, normalization, centred)
    coefficients = torch.randn(*residual.shape[:-1], len(FEATURES))
    code = sae.encode(residual)
    edited = code.clone()
    edited[..., FEATURES] += coefficients
    expected = residual - sae.decode(code, residual) + sae.decode(edited, residual)
    delta = sae.select(FEATURES).write(coefficients, residual)
    assert torch.allclose(residual + delta, expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@given(
    features=st.lists(st.integers(0, D_SAE - 1), min_size=1, max_size=6, unique=True),
    scale=st.floats(0.01, 100.0),
    seed=st.integers(0, 3),
)
def test_the_sparse_path_holds_for_any_features_and_any_scale(kind, features, scale, seed) -> None:
    sae = random_sae(kind, seed=seed)
    x = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(seed)) * scale
    read, full = sae.select(features).read(x), sae.encode(x)[..., features]
    assert torch.allclose(read, full, atol=1e-4 * scale, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_is_the_identity_bit_for_bit(kind, residual: Tensor) -> None:
    view = random_sae(kind).select(FEATURES)
    delta = view.write(torch.zeros(*residual.shape[:-1], len(FEATURES)), residual)
    assert torch.equal(residual + delta, residual)


def test_one_coefficient_for_every_position(residual: Tensor) -> None:
    view = random_sae().select([4, 2])
    assert torch.allclose(view.write(torch.tensor([2.0, -1.0]), residual), 2 * view.directions[0] - view.directions[1])


def test_jumprelu_is_strict() -> None:
    """A pre-activation equal to the threshold is off, as in SAELens; just above, it passes unshifted."""
    sae = _one_feature("jumprelu", threshold=0.5)
    assert sae.encode(torch.tensor([[0.5], [0.5000001], [0.4], [2.0]])).flatten().tolist() == pytest.approx(
        [0.0, 0.5000001, 0.0, 2.0]
    )


def test_a_negative_threshold_does_not_let_negative_values_through() -> None:
    assert _one_feature("jumprelu", threshold=-1.0).encode(torch.tensor([[-0.5]])).item() == 0.0


def test_a_batch_topk_sae_keeps_what_exceeds_its_stored_threshold(residual: Tensor) -> None:
    sae = random_sae("batchtopk")
    pre = (residual - sae.b_dec) @ sae.W_enc + sae.tensors["b_enc"]
    kept = torch.where(pre > sae.tensors["threshold"].clamp(min=0), pre, torch.zeros(()))
    assert torch.allclose(sae.encode(residual), kept, atol=1e-5)


def test_a_gated_sae_takes_its_size_from_one_branch_and_its_gate_from_the_other() -> None:
    sae = _one_feature("gated", b_gate=-1.0, b_mag=0.25, r_mag=2.0)
    x = torch.tensor([[0.9], [1.1]])
    expected = [0.0, 1.1 * torch.tensor(2.0).exp().item() + 0.25]
    assert sae.encode(x).flatten().tolist() == pytest.approx(expected)


def test_topk_keeps_exactly_the_k_largest(residual: Tensor) -> None:
    sae = random_sae("topk")
    pre = (residual - sae.b_dec) @ sae.W_enc + sae.tensors["b_enc"]
    code = sae.encode(residual)
    assert ((code > 0).sum(-1) <= K).all()
    kth = pre.topk(K).values[..., -1:]
    assert torch.allclose(code, torch.where(pre >= kth, pre.clamp(min=0), torch.zeros(())), atol=1e-6)


def test_a_topk_view_knows_about_the_competition(residual: Tensor) -> None:
    """A feature with a positive pre-activation that is not among the k largest reads zero."""
    sae = random_sae("topk")
    alone = torch.relu((residual - sae.b_dec) @ sae.W_enc[:, [3]] + sae.tensors["b_enc"][3])
    read = sae.select([3]).read(residual)
    assert ((alone > 0) & (read == 0)).any()


def test_normalisation_is_undone_after_decoding(residual: Tensor) -> None:
    """Scaling the input scales the reconstruction by the same factor when the norm is constant."""
    sae = random_sae("relu", "constant_norm_rescale")
    assert torch.allclose(sae.reconstruct(residual * 7), sae.reconstruct(residual) * 7, rtol=1e-4, atol=1e-4)
    assert torch.allclose(sae.encode(residual * 7), sae.encode(residual), rtol=1e-4, atol=1e-4)


def test_layer_norm_is_undone_with_its_mean(residual: Tensor) -> None:
    sae = random_sae("relu", "layer_norm")
    assert torch.allclose(sae.encode(residual + 3), sae.encode(residual), atol=1e-4)
    assert torch.allclose(sae.reconstruct(residual + 3), sae.reconstruct(residual) + 3, atol=1e-4)


def test_decoding_without_the_input_that_sets_the_scale_is_an_error() -> None:
    sae = random_sae("relu", "layer_norm")
    with pytest.raises(SaeError, match="needs the input"):
        sae.decode(torch.zeros(1, D_SAE))


def test_sixteen_bit_residuals_are_read_in_the_saes_precision(residual: Tensor) -> None:
    sae, x = random_sae(), residual.to(torch.bfloat16)
    read = sae.select(FEATURES).read(x)
    assert read.dtype == torch.float32
    assert torch.allclose(read, sae.encode(x.float())[..., FEATURES], atol=1e-6)


def test_casting_casts_everything(residual: Tensor) -> None:
    half = random_sae("gated").to(dtype=torch.float64)
    view = half.select([1]).to(dtype=torch.float16)
    assert (half.dtype, half.encode(residual).dtype) == (torch.float64, torch.float64)
    assert (view.directions.dtype, view.read(residual).dtype) == (torch.float16, torch.float16)


@pytest.mark.parametrize("features", [[D_SAE], [-1], [0, 1000]])
def test_features_outside_the_sae_are_named(features: list[int]) -> None:
    with pytest.raises(FeatureIndexError, match=f"{features[-1]} does not exist.*{D_SAE} features"):
        random_sae().select(features)


def test_vectors_of_another_width_are_refused() -> None:
    with pytest.raises(WidthMismatchError, match="reads vectors of 12 values, got 13"):
        random_sae().encode(torch.zeros(2, 13))


def test_an_sae_for_another_model_does_not_fit() -> None:
    sae = random_sae()
    check_fits(sae, D_IN, 2)
    with pytest.raises(WidthMismatchError, match=r"reads 12 values per token.* has 64"):
        check_fits(sae, 64, 2)
    with pytest.raises(SiteError, match=r"blocks.1.hook_resid_post.* 1 blocks"):
        check_fits(sae, D_IN, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_tensor_is_named(kind: str) -> None:
    sae = random_sae(kind)
    for name in ("W_enc", "W_dec", "b_dec", *sae.architecture.vectors):
        with pytest.raises(CheckpointError, match=f"needs '{name}'"):
            Sae(sae.cfg, {key: value for key, value in random_tensors().items() if key != name})


def test_a_tensor_of_the_wrong_shape_is_named() -> None:
    tensors = {**random_tensors(), "W_dec": torch.zeros(D_IN, D_SAE)}
    with pytest.raises(CheckpointError, match=r"'W_dec' has shape \(12, 40\), expected \(40, 12\)"):
        Sae(random_sae().cfg, tensors)


def test_a_topk_sae_that_keeps_nothing_is_refused() -> None:
    sae = random_sae("topk")
    with pytest.raises(CheckpointError, match="how many features"):
        Sae(replace(sae.cfg, k=0), sae.tensors)


def _one_feature(kind: str, **vectors: float) -> Sae:
    base = {"b_enc": 0.0, "threshold": 0.0, "b_gate": 0.0, "b_mag": 0.0, "r_mag": 0.0} | vectors
    matrices = {"W_enc": torch.ones(1, 1), "W_dec": torch.ones(1, 1), "b_dec": torch.zeros(1)}
    cfg = type(random_sae().cfg)(kind, 1, 1, Site(0))  # type: ignore[arg-type]
    return Sae(cfg, matrices | {name: torch.tensor([value]) for name, value in base.items()})
