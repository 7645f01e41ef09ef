"""Reading SAE files: every format gives back the SAE that was written, whole or a few features at a time."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from clampdown.config import embedded_sae
from clampdown.errors import CheckpointError, FeatureIndexError, PickleCheckpointError, SaeError, SiteError
from clampdown.saes.checkpoints import load_feature_view, load_sae
from clampdown.saes.sae import Sae
from clampdown.types import Point, Site
from tests.saes import files
from tests.saes.conftest import D_IN, D_SAE, NORMALIZATIONS, K, random_sae

FEATURES = [3, 17, 0, 39]
cases = pytest.mark.parametrize(("name", "kind"), files.CASES)


def written(name: str, kind: str, root: Path) -> tuple[Sae, Path]:
    """A random SAE of a kind, and its files in a format."""
    write, _, centred = files.FORMATS[name]
    sae = random_sae(kind, centred=centred)
    if kind == "batchtopk":
        threshold = torch.full((D_SAE,), files.TOPK_SCALAR)
        sae = replace(sae, tensors={**sae.tensors, "threshold": threshold})
    return sae, write(sae, root)


@cases
def test_a_file_gives_back_the_sae(name: str, kind: str, tmp_path: Path, residual: Tensor) -> None:
    sae, path = written(name, kind, tmp_path)
    loaded = load_sae(path)
    assert torch.allclose(loaded.encode(residual), sae.encode(residual), atol=1e-6)
    assert torch.allclose(loaded.reconstruct(residual), sae.reconstruct(residual), atol=1e-5)
    assert loaded.site == Site(files.LAYER)
    assert (loaded.cfg.d_in, loaded.cfg.d_sae) == (D_IN, D_SAE)
    assert loaded.cfg.k == (K if kind in ("topk", "batchtopk") else loaded.cfg.k)


@cases
def test_a_few_features_are_the_same_read_alone(name: str, kind: str, tmp_path: Path, residual: Tensor) -> None:
    _, path = written(name, kind, tmp_path)
    alone, selected = load_feature_view(path, FEATURES), load_sae(path).select(FEATURES)
    assert torch.equal(alone.directions, selected.directions)
    assert torch.allclose(alone.read(residual), selected.read(residual), atol=1e-6)
    with pytest.raises(FeatureIndexError):
        load_feature_view(path, [D_SAE])


@pytest.mark.parametrize("write", [files.saelens, files.saelens_flat])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_normalisation_and_bias_convention_come_from_the_config(write, normalization, tmp_path, residual) -> None:
    for centred in (True, False):
        sae = random_sae("gated", normalization, centred)
        loaded = load_sae(write(sae, tmp_path / str(centred)))
        assert loaded.cfg.normalize_activations == normalization
        assert torch.allclose(loaded.reconstruct(residual), sae.reconstruct(residual), atol=1e-5)


def test_llama_scope_scales_input_output_and_threshold(tmp_path: Path, residual: Tensor) -> None:
    """With s = sqrt(d) / average norm: encode as if x were s x with s times the threshold, decode back by 1 / s."""
    sae = random_sae("jumprelu", centred=False)
    path = files.llama_scope(sae, tmp_path)
    threshold = torch.full((D_SAE,), files.TOPK_SCALAR * files.SCALE)
    plain = replace(sae, tensors={**sae.tensors, "threshold": threshold})
    code = plain.encode(residual * files.SCALE)
    loaded = load_sae(path)
    assert torch.allclose(loaded.encode(residual), code, atol=1e-5)
    assert torch.allclose(loaded.reconstruct(residual), plain.decode(code) / files.SCALE, atol=1e-5)
    view = load_feature_view(path, FEATURES)
    assert torch.allclose(view.read(residual), code[..., FEATURES], atol=1e-5)
    assert torch.allclose(view.directions, sae.W_dec[FEATURES] / files.SCALE)


def test_topk_in_units_of_the_decoder_norm(tmp_path: Path, residual: Tensor) -> None:
    """The k largest are chosen among activations times the decoder rows' lengths, which decoding divides out."""
    sae = random_sae("topk")
    path = files.saelens(sae, tmp_path, rescale_acts_by_decoder_norm=True)
    norm = sae.W_dec.norm(dim=-1)
    pre = ((residual - sae.b_dec) @ sae.W_enc + sae.tensors["b_enc"]) * norm
    code = torch.where(pre >= pre.topk(K).values[..., -1:], pre.clamp(min=0), torch.zeros(()))
    loaded = load_sae(path)
    assert torch.allclose(loaded.encode(residual), code, atol=1e-5)
    assert torch.allclose(loaded.reconstruct(residual), (code / norm) @ sae.W_dec + sae.b_dec, atol=1e-5)
    assert torch.allclose(load_feature_view(path, FEATURES).read(residual), code[..., FEATURES], atol=1e-5)


def test_the_site_can_be_given(tmp_path: Path) -> None:
    path = files.saelens(random_sae(), tmp_path)
    assert load_sae(path, site=Site(4, Point.MLP_OUT)).site == Site(4, Point.MLP_OUT)


def test_a_file_that_does_not_say_where_it_sits_needs_a_site(tmp_path: Path) -> None:
    path = files.gemma_scope(random_sae(centred=False), tmp_path)
    moved = path.rename(tmp_path / "somewhere")
    with pytest.raises(CheckpointError, match="do not say where it sits"):
        load_sae(moved)
    assert load_sae(moved, site=Site(2)).site == Site(2)


def test_facts_about_the_model_are_kept(tmp_path: Path) -> None:
    cfg = load_sae(files.saelens(random_sae(), tmp_path)).cfg
    assert (cfg.model_name, cfg.neuronpedia_id) == ("toy", "toy/1-res")
    assert load_sae(files.goodfire(random_sae("relu"), tmp_path / "g")).cfg.model_name == "Llama-3.1-8B-Instruct"


def test_compressed_arrays_are_read_too(tmp_path: Path, residual: Tensor) -> None:
    sae = random_sae(centred=False)
    path = files.gemma_scope(sae, tmp_path, compressed=True)
    assert torch.allclose(load_sae(path).encode(residual), sae.encode(residual), atol=1e-6)


def test_the_revision_names_the_exact_weights(tmp_path: Path) -> None:
    first = load_sae(files.saelens(random_sae(seed=0), tmp_path / "a")).revision
    assert load_sae(files.saelens(random_sae(seed=0), tmp_path / "b")).revision == first
    assert load_sae(files.saelens(random_sae(seed=1), tmp_path / "c")).revision != first
    recentred = load_sae(files.saelens(random_sae(seed=0, centred=False), tmp_path / "d")).revision
    assert recentred != first, "the config decides too"


def test_serving_one_feature_reads_one_page_a_row(tmp_path: Path) -> None:
    """Of a 32 MB SAE outside the page cache, one feature costs a page of each encoder row and its decoder row."""
    if not hasattr(os, "posix_fadvise") or not Path("/proc/self/io").exists():
        pytest.skip("needs a kernel that tells how much was read")
    d_in, d_sae = 128, 32_768
    sae = Sae(replace(random_sae().cfg, d_in=d_in, d_sae=d_sae), _large(d_in, d_sae))
    path = files.saelens(sae, tmp_path)
    weights = path / "sae_weights.safetensors"
    _forget(weights)
    before = _bytes_read()
    view = load_feature_view(path, [777])
    assert torch.equal(view.directions[0], sae.W_dec[777])
    read = _bytes_read() - before
    if read == 0:
        pytest.skip("the file system keeps files in memory")
    assert read < weights.stat().st_size / 4


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_nothing_loaded_depends_on_the_file_any_more(kind: str, tmp_path: Path, residual: Tensor) -> None:
    """Weights are mapped while loading only: rewriting a mapped file in place would end the process."""
    path = files.saelens(random_sae(kind), tmp_path)
    sae, view = load_sae(path), load_feature_view(path, FEATURES)
    before = sae.encode(residual), view.read(residual)
    weights = path / "sae_weights.safetensors"
    with weights.open("r+b") as handle:
        handle.write(b"\0" * weights.stat().st_size)
        handle.truncate(0)
    assert torch.equal(sae.encode(residual), before[0])
    assert torch.equal(view.read(residual), before[1])


def _large(d_in: int, d_sae: int) -> dict[str, Tensor]:
    vectors = {name: torch.zeros(d_sae) for name in ("b_enc", "threshold")}
    return {"W_enc": torch.randn(d_in, d_sae), "W_dec": torch.randn(d_sae, d_in), "b_dec": torch.zeros(d_in), **vectors}


def _forget(path: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


class Bomb:
    """Unpickling this leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["dictionary_learning", "goodfire", "qwen-scope", "gemma-scope"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_and_never_executed(name: str, zipped: bool, tmp_path: Path) -> None:
    _, path = written(name, files.FORMATS[name][1][0], tmp_path)
    mark = tmp_path / "executed"
    target = path if path.is_file() else next(p for p in path.iterdir() if p.suffix in (".pt", ".npz"))
    if name == "gemma-scope":
        np.savez(target, W_enc=np.array([Bomb(mark)], dtype=object))
    else:
        torch.save({"bomb": Bomb(mark)}, target, _use_new_zipfile_serialization=zipped)
    with pytest.raises(PickleCheckpointError):
        load_sae(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the payload does run when unpickled"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: (p / "cfg.json").unlink(), "known format"),
        (lambda p: (p / "cfg.json").write_text("{"), "not JSON"),
        (lambda p: (p / "cfg.json").write_text("[]"), "JSON object"),
        (lambda p: _edit(p, d_in=None), "does not say 'd_in'"),
        (lambda p: _edit(p, d_in=13), "shape"),
        (lambda p: _edit(p, metadata={}), "where it sits"),
        (lambda p: (p / "sae_weights.safetensors").write_bytes(b""), "empty"),
        (lambda p: (p / "sae_weights.safetensors").write_bytes(b"nonsense, and more of it"), "not a safetensors"),
        (lambda p: (p / "sae_weights.safetensors").write_bytes(_header({"W": {"dtype": "F32"}})), "not a safetensors"),
        (lambda p: (p / "sae_weights.safetensors").write_bytes(_header({"W": _OUTSIDE})), "not a safetensors"),
        (lambda p: (p / "sae_weights.safetensors").write_bytes(_header([1, 2])), "not a safetensors"),
        (lambda p: _truncate(p / "sae_weights.safetensors"), "not a safetensors"),
        (lambda p: _without(p / "sae_weights.safetensors", "threshold"), "needs 'threshold'"),
        (lambda p: _without(p / "sae_weights.safetensors", "W_dec"), "needs 'W_dec'"),
    ],
)
def test_broken_files_are_readable_errors(damage, says: str, tmp_path: Path) -> None:
    path = files.saelens(random_sae(), tmp_path / "sae")
    damage(path)
    with pytest.raises(CheckpointError, match=says):
        load_sae(path)


_OUTSIDE = {"dtype": "F32", "shape": [4], "data_offsets": [1_000_000, 1_000_016]}


def _header(value: object) -> bytes:
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text


def _edit(path: Path, **changes: object) -> None:
    cfg = json.loads((path / "cfg.json").read_text()) | changes
    (path / "cfg.json").write_text(json.dumps({key: value for key, value in cfg.items() if value is not None}))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _without(path: Path, name: str) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items() if key != name}
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "transcoder"}, "'transcoder' is not a kind"),
        ({"activation_fn": "tanh-relu"}, "tanh-relu"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
    ],
)
def test_kinds_that_cannot_be_steered_are_named(changes: dict[str, str], says: str, tmp_path: Path) -> None:
    path = files.saelens(random_sae(), tmp_path, **changes)
    with pytest.raises(SaeError, match=says):
        load_sae(path)


def test_a_place_that_is_no_site_is_named(tmp_path: Path) -> None:
    path = files.saelens(random_sae(), tmp_path, metadata={"hook_name": "blocks.3.attn.hook_z"})
    with pytest.raises(SiteError, match=r"blocks\.3\.attn\.hook_z"):
        load_sae(path)


@pytest.mark.parametrize("changes", [{"transcode": True}, {"activation": "groupmax"}, {"signed": True}])
def test_sparsify_variants_that_are_not_saes_are_refused(changes: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(SaeError, match="not supported"):
        load_sae(files.sparsify(random_sae("topk"), tmp_path, **changes))


def test_a_finetuned_scale_is_refused(tmp_path: Path) -> None:
    path = files.saelens_flat(random_sae(), tmp_path)
    tensors = load_file(path / "sae_weights.safetensors")
    save_file({**tensors, "scaling_factor": tensors["scaling_factor"] * 2}, path / "sae_weights.safetensors")
    with pytest.raises(SaeError, match="scaling factor"):
        load_sae(path)


def test_a_directory_of_something_else_says_what_it_found(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"found: notes\.txt"):
        load_sae(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/sae", "organism:x99", "nonsense"])
def test_a_name_that_is_nothing_is_an_error_with_a_hint(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_sae(name)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["organism", "organism:x8"])
def test_the_embedded_saes_load_by_the_same_path(name: str) -> None:
    path = embedded_sae(name)
    if path is None or not path.is_dir():
        pytest.skip("the embedded model is not built")
    sae = load_sae(name)
    assert sae.revision == load_sae(path).revision
    assert torch.equal(load_feature_view(name, [5]).directions[0], sae.W_dec[5])
