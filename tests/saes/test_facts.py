"""Facts beside the tensors: what changes the meaning of an SAE's numbers is read as meant, or refused by name."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from clampdown.errors import CheckpointError, ClampdownError, SaeError
from clampdown.models.layout import find_layout
from clampdown.models.loading import LanguageModel
from clampdown.saes.checkpoints import load_feature_view, load_sae
from clampdown.saes.sae import check_fits
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Edit, ModelRef, Plan, SaeRef
from tests.models.conftest import IdTokenizer
from tests.saes import files
from tests.saes.conftest import D_IN, D_SAE, random_sae

FEATURES = [3, 17, 0, 39]


def centred(sae: Any, root: Path, **extra: object) -> Path:
    """The SAE's files, saying that the model's writing weights were centred."""
    about = {"hook_name": "blocks.1.hook_resid_post", "model_from_pretrained_kwargs": {"center_writing_weights": True}}
    return files.saelens(sae, root, metadata=about, **extra)


@pytest.mark.parametrize("normalization", ["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "gated"])
def test_a_centred_stream_is_read_less_its_mean_and_written_beside_it(kind, normalization, tmp_path, residual) -> None:
    sae = random_sae(kind, normalization)
    path, mean = centred(sae, tmp_path), residual.mean(-1, keepdim=True)
    loaded, view = load_sae(path), load_feature_view(path, FEATURES)
    code = sae.encode(residual - mean)
    assert not torch.allclose(code, sae.encode(residual), atol=1e-2) or normalization == "layer_norm"
    assert torch.allclose(loaded.encode(residual), code, atol=1e-5)
    assert torch.allclose(view.read(residual), code[..., FEATURES], atol=1e-5)
    assert torch.allclose(loaded.reconstruct(residual), sae.reconstruct(residual - mean) + mean, atol=1e-5)
    amounts = torch.ones(*residual.shape[:-1], len(FEATURES))
    plain = sae.select(FEATURES)
    assert torch.allclose(view.write(amounts, residual), plain.write(amounts, residual - mean), atol=1e-5)


def gpt2() -> tuple[Any, Any]:
    """A random GPT-2 whose residual has a mean, and the same with everything that writes to it centred."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=D_IN, n_layer=3, n_head=2, n_positions=64)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter) + (0.02 if parameter.dim() > 1 else 0.0))
        if parameter.dim() > 1:
            parameter.mul_(3)
    twin = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    twin.load_state_dict(model.state_dict())
    twin.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    for writes in (twin.transformer.wte.weight, twin.transformer.wpe.weight):
        writes.sub_(writes.mean(-1, keepdim=True))
    for block in twin.transformer.h:
        for layer in (block.attn.c_proj, block.mlp.c_proj):
            layer.weight.sub_(layer.weight.mean(-1, keepdim=True))
            layer.bias.sub_(layer.bias.mean())
    return model, twin


def clamped(model: Any, path: Path, ids: Tensor) -> Tensor:
    lm = LanguageModel(model, IdTokenizer(), find_layout(model), "gpt2", "random")
    sae = load_sae(path)
    edit = Edit(site=sae.site.name, operator="clamp", features=(3, 17), strengths=(2.5, 4.0))
    ref = SaeRef(site=sae.site.name, name=str(path), revision=sae.revision)
    plan = Plan(name="p", model=ModelRef(name="gpt2", revision="random"), saes=(ref,), edits=(edit,))
    with steer(lm, plan, sae):
        return model(ids).logits


def test_a_clamp_on_the_plain_model_is_the_clamp_on_the_centred_one(tmp_path: Path) -> None:
    """The centred model is built here by hand: the SAE without the field steers it, the one with it the other."""
    model, twin = gpt2()
    ids = torch.tensor([[1, 5, 9, 13, 20, 33, 7]])
    assert torch.allclose(model(ids).logits, twin(ids).logits, atol=1e-4), "centring changes no logits"
    sae = random_sae("jumprelu", centred=False)
    plain, said = files.saelens(sae, tmp_path / "plain"), centred(sae, tmp_path / "said")
    want = clamped(twin, plain, ids)
    assert torch.allclose(clamped(model, said, ids), want, atol=1e-4)
    assert not torch.allclose(clamped(model, plain, ids), want, atol=1e-2)


def test_a_model_that_cannot_be_centred_is_refused(tmp_path: Path) -> None:
    sae = load_sae(centred(random_sae(), tmp_path))
    check_fits(sae, D_IN, 3, layer_norm=True)
    with pytest.raises(SaeError, match="center_writing_weights"):
        check_fits(sae, D_IN, 3, layer_norm=False)


@pytest.mark.parametrize("name", ["fold_ln", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices"])
def test_processing_that_leaves_the_stream_alone_changes_nothing(name: str, tmp_path: Path, residual: Tensor) -> None:
    sae = random_sae()
    about = {"hook_name": "blocks.1.hook_resid_post", "model_from_pretrained_kwargs": {name: True}}
    assert torch.allclose(load_sae(files.saelens(sae, tmp_path, metadata=about)).encode(residual), sae.encode(residual))


@pytest.mark.parametrize(
    "kwargs",
    [{"revision": "step3000"}, {"checkpoint_index": 5}, {"rotate": True}, {"center_writing_weights": 1}, 5],
)
def test_processing_that_nobody_here_knows_is_refused(kwargs: object, tmp_path: Path) -> None:
    about = {"hook_name": "blocks.1.hook_resid_post", "model_from_pretrained_kwargs": kwargs}
    with pytest.raises(SaeError, match="model_from_pretrained_kwargs"):
        load_sae(files.saelens(random_sae(), tmp_path, metadata=about))


AVERAGE = {"normalize_activations": "expected_average_only_in"}


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "gated"])
@pytest.mark.parametrize("where", ["activation_scaler.json", "activations_store_state.safetensors"])
def test_a_scale_in_a_file_of_its_own_is_applied_once(where: str, kind: str, tmp_path: Path, residual: Tensor) -> None:
    sae, scale = random_sae(kind), 2.5
    path = files.saelens(sae, tmp_path, **AVERAGE)
    if where.endswith("json"):
        (path / where).write_text(json.dumps({"scaling_factor": scale, "has_whitening": False}))
    else:
        save_file({"estimated_norm_scaling_factor": torch.tensor(scale)}, path / where)
    code = sae.encode(residual * scale)
    assert torch.allclose(load_sae(path).encode(residual), code, atol=1e-4)
    assert torch.allclose(load_sae(path).reconstruct(residual), sae.decode(code) / scale, atol=1e-4)
    assert torch.allclose(load_feature_view(path, FEATURES).read(residual), code[..., FEATURES], atol=1e-4)
    before = load_sae(path).revision
    (path / where).unlink()
    assert load_sae(path).revision != before
    assert torch.allclose(load_sae(path).encode(residual), sae.encode(residual), atol=1e-5), "folded into the weights"


def test_a_scale_in_decoder_norm_units_keeps_the_units_of_training(tmp_path: Path, residual: Tensor) -> None:
    sae, scale = random_sae("topk"), 2.5
    path = files.saelens(sae, tmp_path, rescale_acts_by_decoder_norm=True, **AVERAGE)
    unscaled = load_sae(path)
    (path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
    assert torch.allclose(load_sae(path).encode(residual), unscaled.encode(residual * scale), atol=1e-4)


@pytest.mark.parametrize(
    ("said", "cfg"),
    [
        ({"scaling_factor": 2.5}, {}),
        ({"scaling_factor": -1}, AVERAGE),
        ({"scaling_factor": "2"}, AVERAGE),
        ({"scaling_factor": None, "has_whitening": True}, AVERAGE),
        ({"scaling_factor": 2.5, "shift": 3}, AVERAGE),
        ([], AVERAGE),
    ],
)
def test_a_scale_that_cannot_be_honoured_is_refused(said: object, cfg: dict[str, Any], tmp_path: Path) -> None:
    path = files.saelens(random_sae(), tmp_path, **cfg)
    (path / "activation_scaler.json").write_text(json.dumps(said))
    with pytest.raises(SaeError, match="scal"):
        load_sae(path)


WRITERS: dict[str, tuple[Any, str, str]] = {
    "saelens": (files.saelens, "relu", "cfg.json"),
    "saelens-flat": (files.saelens_flat, "relu", "cfg.json"),
    "gemma-scope-2": (files.gemma_scope_2, "jumprelu", "config.json"),
    "sparsify": (files.sparsify, "topk", "cfg.json"),
    "dictionary_learning": (files.dictionary_learning, "relu", "config.json"),
    "llama-scope": (files.llama_scope, "jumprelu", "hyperparams.json"),
}
WRONG = {
    "saelens": [
        {"d_in": "x"}, {"d_in": D_IN + 0.5}, {"d_in": True}, {"d_sae": -8}, {"d_sae": None}, {"rotation": "qr"},
        {"apply_b_dec_to_input": "no"}, {"metadata": 5}, {"metadata": {"hook_name": 5}}, {"architecture": []},
        {"activation_fn_kwargs": {"temperature": 2}}, {"normalize_activations": {}}, {"normalize_activations": []},
        {"metadata": {"hook_name": "blocks.1.hook_resid_post", "hook_name_out": "blocks.1.hook_mlp_out"}},
        {"metadata": {"hook_name": "blocks.1.hook_resid_post", "hook_head_index": 3}},
        {"metadata": {"hook_name": f"blocks.{'9' * 4000}.hook_resid_post"}},
    ],
    "saelens-flat": [{"hook_point_layer": 7}, {"activation_fn_kwargs": 5}, {"hook_point_head_index": 0}],
    "gemma-scope-2": [{"architecture": "topk"}, {"affine_connection": True}, {"model_name": 5}, {"input_scale": 2},
                      {"hf_hook_point_in": "a", "hf_hook_point_out": "b"}],
    "sparsify": [{"k": 0}, {"d_in": "x"}, {"signed": True}, {"activation": "groupmax"}, {"input_norm": 3.0}],
    "dictionary_learning": [{"trainer": 5}, {"trainer": {"dict_class": []}}, {"scaler": 2}, {"buffer": {"io": "in"}}],
    "llama-scope": [
        {"act_fn": "topk"}, {"norm_activation": "token-wise"}, {"use_glu_encoder": True}, {"input_shift": 2},
        {"dataset_average_activation_norm": {"in": 0}}, {"dataset_average_activation_norm": 5}, {"d_model": "x"},
        {"apply_decoder_bias_to_pre_encoder": True}, {"use_decoder_bias": False}, {"jump_relu_threshold": None},
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), [(name, each) for name, rows in WRONG.items() for each in rows])
def test_fields_that_are_unknown_or_say_what_is_not_done_are_refused(name, changes, tmp_path: Path) -> None:
    write, kind, config = WRITERS[name]
    path = write(random_sae(kind), tmp_path)
    load_sae(path)
    stated = json.loads((path / config).read_text())
    (path / config).write_text(json.dumps(stated | changes))
    with pytest.raises(ClampdownError):
        load_sae(path)
    with pytest.raises(ClampdownError):
        load_feature_view(path, FEATURES)


def test_an_unknown_field_is_named(tmp_path: Path) -> None:
    with pytest.raises(SaeError, match="rotation"):
        load_sae(files.saelens(random_sae(), tmp_path, rotation="qr"))
    load_sae(files.saelens(random_sae(), tmp_path / "unset", rotation=None))


@pytest.mark.parametrize("name", ["saelens", "gemma-scope-2", "sparsify", "llama-scope"])
def test_tensors_that_nothing_reads_are_refused(name: str, tmp_path: Path) -> None:
    write, kind, _ = WRITERS[name]
    path = write(random_sae(kind), tmp_path)
    weights = next(path.rglob("*.safetensors"))
    save_file({**load_file(weights), "rotation": torch.eye(D_IN)}, weights)
    with pytest.raises(CheckpointError, match="rotation"):
        load_sae(path)


@pytest.mark.parametrize("more", [{"rotation": torch.eye(3)}, {"notes": "text"}, {"inner": {"a": torch.eye(3)}}])
def test_what_a_torch_file_holds_beside_its_tensors_is_refused(more: dict[str, object], tmp_path: Path) -> None:
    for write in (files.dictionary_learning, files.goodfire, files.qwen_scope):
        kind = "topk" if write is files.qwen_scope else "relu"
        path = write(random_sae(kind), tmp_path / write.__name__)
        file = path / "ae.pt" if path.is_dir() else path
        torch.save({**torch.load(file, weights_only=True), **more}, file)
        with pytest.raises(CheckpointError, match=next(iter(more))):
            load_sae(path)


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(name: str, value: float, tmp_path: Path) -> None:
    sae = random_sae("jumprelu")
    tensors = {key: tensor.clone() for key, tensor in sae.tensors.items()}
    tensors[name].view(-1)[3] = value
    path = files.saelens(replace(sae, tensors=tensors), tmp_path)
    with pytest.raises(CheckpointError, match=name):
        load_sae(path)
    with pytest.raises(CheckpointError, match=name):
        load_feature_view(path, [3, 0])


def test_weights_that_overflow_in_another_precision_are_refused(tmp_path: Path) -> None:
    sae = random_sae()
    path = files.saelens(replace(sae, tensors={**sae.tensors, "W_dec": sae.W_dec * 1e6}), tmp_path)
    load_sae(path)
    with pytest.raises(CheckpointError, match="W_dec"):
        load_sae(path, dtype=torch.float16)


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.int64])
def test_weights_of_another_kind_are_refused(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    sae = random_sae("relu")
    path = files.saelens(sae, tmp_path)
    weights = load_file(path / "sae_weights.safetensors")
    save_file({**weights, name: weights[name].to(dtype)}, path / "sae_weights.safetensors")
    for load in (load_sae, lambda path: load_feature_view(path, FEATURES)):
        with pytest.raises(CheckpointError, match=name):
            load(path)


HEADERS: dict[str, Any] = {
    "negative shape": {"shape": [-8, -4]},
    "broken numbers": {"shape": [8.7, 4.2]},
    "true for a number": {"shape": [True, 32]},
    "text for a number": {"shape": ["8", "4"]},
    "no list": {"shape": 32},
    "huge": {"shape": [1 << 62, 1 << 62]},
    "overlap": {"data_offsets": [4, 132]},
    "backwards": {"data_offsets": [128, 0]},
    "outside": {"data_offsets": [0, 1 << 40]},
    "one offset": {"data_offsets": [0]},
    "unknown type": {"dtype": "X9"},
    "a list for a type": {"dtype": []},
}


def safetensors(path: Path, header: Any) -> Path:
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(256))
    return path


@pytest.mark.parametrize("changes", HEADERS.values(), ids=HEADERS)
def test_absurd_headers_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    path = files.saelens(random_sae("relu"), tmp_path)
    entry = {"dtype": "F32", "shape": [8, 4], "data_offsets": [0, 128]}
    other = {"dtype": "F32", "shape": [8, 4], "data_offsets": [128, 256]}
    safetensors(path / "sae_weights.safetensors", {"a": {**entry, **changes}, "b": other})
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_sae(path)


shapes = st.integers(-3, 40) | st.floats() | st.booleans() | st.none() | st.text(max_size=3)
entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F16", "I32", "?", 5]), "shape": st.lists(shapes, max_size=3) | shapes},
    optional={"data_offsets": st.lists(st.integers(-5, 300) | shapes, max_size=3)},
)
headers = st.dictionaries(st.sampled_from(["W_enc", "W_dec", "b_dec", "b_enc"]), entries | shapes) | entries | shapes


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(headers)
def test_any_header_is_an_sae_or_a_typed_error(tmp_path: Path, header: Any) -> None:
    path = tmp_path if (tmp_path / "cfg.json").exists() else files.saelens(random_sae("relu"), tmp_path)
    safetensors(path / "sae_weights.safetensors", header)
    with pytest.raises(SaeError):
        load_sae(path)


GEMMA = ("gemma-scope-2b-pt-res", "layer_20", "width_16k", "average_l0_71")


def gemma(path: Path) -> Path:
    path.mkdir(parents=True)
    names = {"W_enc": (8, 16), "W_dec": (16, 8), "b_enc": (16,), "b_dec": (8,), "threshold": (16,)}
    np.savez(path / "params.npz", **{name: np.zeros(shape, "f4") for name, shape in names.items()})  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    "above",
    ["layer_3_probe", "layer_3", "gemma-scope-9b-it-mlp/layer_3", "x/layer_7/gemma-scope-27b-pt-res/layer_1"],
)
def test_an_address_is_read_from_the_innermost_folders(above: str, tmp_path: Path) -> None:
    sae = load_sae(gemma(tmp_path / above / Path(*GEMMA)))
    assert sae.site.name == "blocks.20.hook_resid_post"
    assert sae.cfg.model_name == "google/gemma-2-2b"


def test_a_folder_above_a_release_is_not_its_layer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="do not say where it sits"):
        load_sae(gemma(tmp_path / "layer_3" / "gemma-scope-2b-pt-res" / "embedding"))
    for kind in ("att", "transcoders"):
        with pytest.raises(SaeError, match="not an SAE of the residual"):
            load_sae(gemma(tmp_path / f"gemma-scope-2b-pt-{kind}" / "layer_3"))


def test_folders_further_out_do_not_speak_for_the_other_formats(tmp_path: Path) -> None:
    sae = random_sae("topk", centred=False)
    path = files.qwen_scope(sae, tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_100" / "layer9")
    assert (load_sae(path).cfg.k, load_sae(path).cfg.model_name) == (sae.cfg.k, "Qwen/Qwen3-8B-Base")
    inner = files.gemma_scope_2(random_sae(centred=False), tmp_path / "transcoder_notes" / "mlp_out" / "layer_3_w")
    assert load_sae(inner).site.name == "blocks.1.hook_resid_post"
    assert load_sae(files.sparsify(sae, tmp_path / "layers.7.mlp")).site.name == "blocks.1.hook_resid_post"


def test_two_layers_in_one_config_are_refused(tmp_path: Path) -> None:
    path = files.dictionary_learning(random_sae("relu"), tmp_path)
    stated = json.loads((path / "config.json").read_text())
    stated["trainer"]["layer"] = 4
    (path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(SaeError, match="layer is said to be 4"):
        load_sae(path)


def test_long_decoder_rows_keep_the_units_of_the_file(tmp_path: Path, residual: Tensor) -> None:
    sae = random_sae("relu")
    sae = replace(sae, tensors={**sae.tensors, "W_dec": sae.W_dec * torch.linspace(1, 12, D_SAE)[:, None]})
    loaded = load_sae(files.saelens(sae, tmp_path))
    assert torch.equal(loaded.W_dec, sae.W_dec)
    assert torch.allclose(loaded.encode(residual), sae.encode(residual), atol=1e-6)
