"""Our SAEs against SAELens's, sparsify's and dictionary_learning's own code, on files that they wrote themselves.

SAELens and sparsify come with the `dev` extra. dictionary_learning, which needs torchvision, does not: its files are
compared as SAELens reads them, and with its own classes where somebody has installed it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clampdown.saes.checkpoints import load_feature_view, load_sae
from tests.saes import files
from tests.saes.conftest import D_IN, D_SAE, NORMALIZATIONS, K, random_sae

# One group, so that with several processes one alone pays for importing SAELens; its warnings are not ours to mend.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("peers")]

FEATURES = [3, 17, 0, 39]
CLAMP = 2.5
HOOK = f"blocks.{files.LAYER}.hook_resid_post"
METADATA = {"model_name": "toy", "hook_name": HOOK, "prepend_bos": True}


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights at scales where some features are on and some off; thresholds positive."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        value = torch.randn(parameter.shape, generator=draw) * 0.4
        parameter.data = value.abs() if "threshold" in name else value


def clamped_by_saelens(sae: Any, x: Tensor) -> Tensor:
    """Encode, set the features, decode, add back the error: each decode needs its own encode, which stores the norm."""
    code = sae.encode(x)
    plain = sae.decode(code)
    sae.encode(x)
    edited = code.clone()
    edited[..., FEATURES] = CLAMP
    return x - plain + sae.decode(edited)


def clamped_by_us(path: Path, x: Tensor) -> Tensor:
    view = load_feature_view(path, FEATURES)
    return x + view.write(CLAMP - view.read(x), x)


def assert_same(path: Path, theirs: Any, x: Tensor) -> None:
    ours = load_sae(path)
    code = theirs.encode(x)
    assert 0 < (code > 0).float().mean() < 1
    assert torch.allclose(ours.encode(x), code, atol=1e-5)
    assert torch.allclose(ours.reconstruct(x), theirs.decode(code), atol=1e-5)
    assert torch.allclose(clamped_by_us(path, x), clamped_by_saelens(theirs, x), atol=1e-5)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
@torch.no_grad()
def test_what_saelens_saves(architecture, centred, normalization, tmp_path: Path, residual: Tensor) -> None:
    import sae_lens

    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": centred,
        "normalize_activations": normalization,
        "metadata": METADATA,
    }
    if architecture == "topk":
        cfg |= {"k": K, "rescale_acts_by_decoder_norm": centred}
    theirs = sae_lens.SAE.from_dict(cfg)
    randomise(theirs)
    theirs.save_model(tmp_path)
    assert_same(tmp_path, sae_lens.SAE.load_from_disk(tmp_path), residual)


@pytest.mark.parametrize("normalization", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("architecture", ["jumprelu", "gated", "topk", "batchtopk"])
@torch.no_grad()
def test_what_saelens_saves_after_training(architecture, centred, normalization, tmp_path, residual: Tensor) -> None:
    """The inference files that training writes, and for batch top-k the files from the middle of training too."""
    import sae_lens

    registry = sae_lens.registry.SAE_TRAINING_CLASS_REGISTRY
    sae_class, cfg_class = registry[architecture]
    more: dict[str, Any] = {"k": K} if architecture in ("topk", "batchtopk") else {}
    more |= {"apply_b_dec_to_input": centred, "normalize_activations": normalization}
    cfg = cfg_class(d_in=D_IN, d_sae=D_SAE, metadata=sae_lens.saes.sae.SAEMetadata(**METADATA), **more)
    theirs = sae_class(cfg)
    randomise(theirs)
    if architecture == "batchtopk":
        theirs.topk_threshold.fill_(0.6)
        theirs.save_model(tmp_path / "training")
    theirs.save_inference_model(tmp_path / "done")
    reference = sae_lens.SAE.load_from_disk(tmp_path / "done")
    assert_same(tmp_path / "done", reference, residual)
    if architecture == "batchtopk":
        middle = load_sae(tmp_path / "training")
        assert torch.allclose(middle.encode(residual), reference.encode(residual), atol=1e-5)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "gated"])
@torch.no_grad()
def test_the_flat_config_before_version_6(kind: str, tmp_path: Path, residual: Tensor) -> None:
    import sae_lens

    path = files.saelens_flat(random_sae(kind), tmp_path)
    assert_same(path, sae_lens.SAE.load_from_disk(path), residual)


def hub(monkeypatch: pytest.MonkeyPatch, loader: str, root: Path, folder: str, repo: str) -> Any:
    """The SAE that one of SAELens's hub loaders makes of local files."""
    import sae_lens
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def local(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        path = root / (subfolder or "") / filename
        if not path.exists():
            raise loaders.EntryNotFoundError(str(path))
        return str(path)

    def shapes(_repo: str, filename: str) -> dict[str, list[int]]:
        return {key: list(t.shape) for key, t in loaders.load_safetensors_weights(root / filename).items()}

    monkeypatch.setattr(loaders, "hf_hub_download", local)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    overrides = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}
    cfg, state, _ = loaders.NAMED_PRETRAINED_SAE_LOADERS[loader](
        repo_id=repo, folder_name=folder, device="cpu", force_download=False, cfg_overrides=overrides
    )
    cfg = loaders.handle_config_defaulting(cfg)
    sae = sae_lens.SAE.from_dict(cfg)
    sae.load_state_dict(state)
    return sae


@torch.no_grad()
def test_gemma_scope(monkeypatch, tmp_path: Path, residual: Tensor) -> None:
    path = files.gemma_scope(random_sae(centred=False), tmp_path)
    folder = "gemma-scope-9b-it-res/layer_1/width_16k/average_l0_91"
    theirs = hub(monkeypatch, "gemma_2", tmp_path, folder, "google/gemma-scope-9b-it-res")
    assert_same(path, theirs, residual)
    assert theirs.cfg.metadata.hook_name == load_sae(path).site.name
    assert "google/" + theirs.cfg.metadata.model_name == load_sae(path).cfg.model_name


@torch.no_grad()
def test_gemma_scope_2(monkeypatch, tmp_path: Path, residual: Tensor) -> None:
    path = files.gemma_scope_2(random_sae(centred=False), tmp_path)
    folder = "resid_post/layer_1_width_16k_l0_medium"
    theirs = hub(monkeypatch, "gemma_3", tmp_path, folder, "google/gemma-scope-2-4b-it")
    assert_same(path, theirs, residual)
    assert theirs.cfg.metadata.hook_name == load_sae(path).site.name
    assert theirs.cfg.metadata.model_name == load_sae(path).cfg.model_name


@torch.no_grad()
def test_llama_scope(monkeypatch, tmp_path: Path, residual: Tensor) -> None:
    """SAELens folds the average norm in a second step, with a factor from its own list of releases."""
    path = files.llama_scope(random_sae(centred=False), tmp_path)
    theirs = hub(monkeypatch, "llama_scope", tmp_path, path.name, "fnlp/Llama3_1-8B-Base-LXR-8x")
    theirs.fold_activation_norm_scaling_factor(files.SCALE)
    assert_same(path, theirs, residual)
    assert theirs.cfg.metadata.hook_name == load_sae(path).site.name


@pytest.mark.parametrize("kind", ["relu", "gated", "topk", "batchtopk"])
@torch.no_grad()
def test_dictionary_learning_as_saelens_reads_it(kind: str, monkeypatch, tmp_path: Path, residual: Tensor) -> None:
    path = files.dictionary_learning(random_sae(kind), tmp_path)
    theirs = hub(monkeypatch, "dictionary_learning_1", tmp_path, "resid_post_layer_1/trainer_0", "org/repo")
    assert_same(path, theirs, residual)


@torch.no_grad()
def test_goodfire(monkeypatch, tmp_path: Path, residual: Tensor) -> None:
    sae = random_sae("relu", centred=False)
    path = files.goodfire(sae, tmp_path)
    named = path.rename(tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth")
    theirs = hub(monkeypatch, "goodfire", tmp_path, named.name, "Goodfire/Llama-3.1-8B-Instruct-SAE-l19")
    assert_same(named, theirs, residual)
    assert theirs.cfg.metadata.hook_name == load_sae(named).site.name


@torch.no_grad()
def test_qwen_scope(monkeypatch, tmp_path: Path, residual: Tensor) -> None:
    path = files.qwen_scope(random_sae("topk", centred=False), tmp_path)
    repo = "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50"
    theirs = hub(monkeypatch, "qwen_scope", path.parent, path.name, repo)
    theirs.cfg.k = K
    theirs.activation_fn = theirs.get_activation_fn()
    assert_same(path, theirs, residual)
    assert theirs.cfg.metadata.hook_name == load_sae(path).site.name


# dictionary_learning's own class, its file, and what the config of its trainer says
_DICTIONARY: dict[str, Callable[[Any, Any], Any]] = {
    "AutoEncoder": lambda d, _t: d.AutoEncoder(D_IN, D_SAE),
    "AutoEncoderNew": lambda d, _t: d.AutoEncoderNew(D_IN, D_SAE),
    "GatedAutoEncoder": lambda d, _t: d.GatedAutoEncoder(D_IN, D_SAE),
    "JumpReluAutoEncoder": lambda d, _t: d.JumpReluAutoEncoder(D_IN, D_SAE),
    "AutoEncoderTopK": lambda _d, t: t.top_k.AutoEncoderTopK(D_IN, D_SAE, K),
    "BatchTopKSAE": lambda _d, t: t.batch_top_k.BatchTopKSAE(D_IN, D_SAE, K),
    "MatryoshkaBatchTopKSAE": lambda _d, _t: importlib.import_module(
        "dictionary_learning.trainers.matryoshka_batch_top_k"
    ).MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [D_SAE // 2, D_SAE - D_SAE // 2]),
}


@pytest.mark.parametrize("kind", _DICTIONARY)
@torch.no_grad()
def test_what_dictionary_learning_computes(kind: str, tmp_path: Path, residual: Tensor) -> None:
    pytest.importorskip("dictionary_learning", exc_type=ImportError)
    from dictionary_learning import dictionary, trainers

    theirs = _DICTIONARY[kind](dictionary, trainers)
    randomise(theirs)
    if hasattr(theirs, "k"):
        theirs.threshold.fill_(0.5)
    path = tmp_path / "resid_post_layer_1" / "trainer_0"
    path.mkdir(parents=True)
    torch.save(theirs.state_dict(), path / "ae.pt")
    (path / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind, "layer": 1, "k": K}}))
    ours, flat = load_sae(path), residual.flatten(0, 1)
    code = theirs.encode(flat)
    assert torch.allclose(ours.encode(flat), code, atol=1e-5)
    assert torch.allclose(ours.reconstruct(flat), theirs.decode(code), atol=1e-5)
    assert ours.site.name == HOOK


def trained_by_sparsify(normalize_decoder: bool) -> tuple[Any, Tensor]:
    """sparsify's own coder, trained for a moment on sparse mixtures of random directions."""
    import sparsify

    torch.manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, D_IN), dim=-1)
    code = torch.rand(2048, 24) * (torch.rand(2048, 24) < 0.08)
    data = code @ directions + 0.3
    cfg = sparsify.SparseCoderConfig(num_latents=D_SAE, k=K, normalize_decoder=normalize_decoder)
    coder = sparsify.SparseCoder(D_IN, cfg)
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        coder(data).fvu.backward()
        optimizer.step()
        if normalize_decoder:
            coder.set_decoder_norm_to_unit_norm()
    return coder, data


@pytest.mark.parametrize("normalize_decoder", [True, False])
def test_sparsify_stores_a_decoder_row_per_feature(normalize_decoder: bool, tmp_path: Path) -> None:
    """Settled by reconstruction: read as we read it, a trained coder explains its data; read the other way round (as
    SAELens does, which then cannot load it), it explains nothing. And b_dec is always subtracted from the input."""
    import sae_lens

    coder, data = trained_by_sparsify(normalize_decoder)
    path = tmp_path / f"layers.{files.LAYER}"
    coder.save_to_disk(path)
    ours = load_sae(path)
    with torch.no_grad():
        theirs = coder(data)
        assert torch.allclose(ours.reconstruct(data), theirs.sae_out, atol=1e-5)
        assert theirs.fvu < 0.2
        centred = data - data.mean(0)
        fvu = (ours.reconstruct(data) - data).pow(2).sum() / centred.pow(2).sum()
        assert torch.allclose(fvu, theirs.fvu, atol=1e-4)
        transposed = ours.encode(data) @ ours.W_dec.T.reshape(D_SAE, D_IN) + ours.b_dec
        assert (transposed - data).pow(2).sum() / centred.pow(2).sum() > 0.8
    from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader

    with pytest.raises(RuntimeError, match="W_dec"):
        sae_lens.SAE.load_from_disk(path, converter=sparsify_disk_loader)
