"""SAE file formats: one small reader each, in one table; a new format is a reader and a row.

A reader says what the files say (`Raw`), with tensors mapped and nothing computed, so that a few features can be taken
without reading the rest. All use one orientation: W_enc [d_in, d_sae], W_dec [d_sae, d_in].

Sources: SAELens and Gemma Scope files as their own loaders read them; sparsify and dictionary_learning as their own
`encode` and `decode` compute (tests compare with the packages). Two things that readers elsewhere get wrong: sparsify
stores W_dec a row per feature already, and subtracts b_dec from the input whatever `normalize_decoder` says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clampdown.documents import read_object
from clampdown.errors import CheckpointError, SaeError
from clampdown.saes.architectures import ARCHITECTURES, NORMALIZATIONS
from clampdown.saes.tensor_files import load_torch, map_npz, map_safetensors


@dataclass(frozen=True, slots=True)
class Raw:
    """What the files of an SAE say.

    `input_scale`: the input is multiplied by this before encoding and the reconstruction divided by it (an average norm
    measured in training). `by_decoder_norm`: activations are in units of the decoder row's length.
    """

    architecture: str
    tensors: Mapping[str, Tensor]
    hook_name: str | None = None
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    k: int = 0
    model_name: str = ""
    neuronpedia_id: str | None = None
    input_scale: float = 1.0
    by_decoder_norm: bool = False
    shape: tuple[int, int] | None = None  # (d_in, d_sae), when the config states it


Reader = Callable[[Path, bool], Raw]  # (path, whether only a few features will be taken)


@dataclass(frozen=True, slots=True)
class Format:
    """A row of the table. `files`: relative names whose presence means this format; the first holds the weights."""

    name: str
    files: tuple[str, ...]
    read: Reader
    optional: tuple[str, ...] = ()
    single_file: re.Pattern[str] | None = field(default=None)

    def matches(self, path: Path) -> bool:
        if path.is_file():
            return self.single_file is not None and self.single_file.search(path.name) is not None
        return bool(self.files) and all((path / name).is_file() for name in self.files)


def _json(path: Path) -> dict[str, Any]:
    return read_object(path, CheckpointError)


def _pick(tensors: Mapping[str, Tensor], path: Path, *names: str) -> Tensor:
    """The first of these tensors that the file has. Raises `CheckpointError` when it has none."""
    for name in names:
        if name in tensors:
            return tensors[name]
    raise CheckpointError(f"{path} has no tensor '{names[0]}'", hint=f"found: {', '.join(sorted(tensors))}")


def _field(raw: Mapping[str, Any], name: str, where: Path | str) -> Any:
    if name not in raw:
        raise CheckpointError(f"{where} does not say '{name}'", hint=f"found: {', '.join(sorted(raw))}")
    return raw[name]


def _supported(architecture: str, where: str) -> str:
    if architecture not in ARCHITECTURES:
        raise SaeError(
            f"{where}: '{architecture}' is not a kind of SAE that can be steered here",
            hint=f"supported: {', '.join(ARCHITECTURES)}; transcoders and cross-layer SAEs write to another site",
        )
    return architecture


_SAELENS_NAMES = {"standard": "relu", "matryoshka_batchtopk": "batchtopk"}


def read_saelens(path: Path, few: bool) -> Raw:
    """SAELens: version 6 (facts about the model under `metadata`) and the flat config before it."""
    cfg = _json(path / "cfg.json")
    return from_saelens_config(cfg, map_safetensors(path / "sae_weights.safetensors", few), str(path / "cfg.json"))


def from_saelens_config(cfg: Mapping[str, Any], weights: dict[str, Tensor], where: str) -> Raw:
    """What a SAELens config and its weights say. `where` names them in errors."""
    about = {**cfg, **(cfg.get("metadata") or {})}
    function = cfg.get("activation_fn") or cfg.get("activation_fn_str") or "relu"
    name = "topk" if function == "topk" else cfg.get("architecture") or "standard"
    architecture = _supported(_SAELENS_NAMES.get(name, name), where)
    if function not in ("relu", "topk"):
        raise SaeError(f"{where}: activation function '{function}' is not supported")
    if cfg.get("reshape_activations", "none") != "none":
        raise SaeError(f"{where}: an SAE of attention heads (hook_z) cannot steer the residual stream")
    tensors = _without_unit_scale(weights, where)
    if "topk_threshold" in tensors:  # a batch-top-k SAE saved in the middle of training
        tensors["threshold"] = tensors.pop("topk_threshold").expand(_field(cfg, "d_sae", where))
    rescaled = cfg.get("rescale_acts_by_decoder_norm", architecture == "batchtopk")
    return Raw(
        architecture=architecture,
        tensors=tensors,
        hook_name=about.get("hook_name") or about.get("hook_point"),
        apply_b_dec_to_input=cfg.get("apply_b_dec_to_input", True),
        normalize_activations=_normalization(cfg.get("normalize_activations"), where),
        k=int(cfg.get("k") or (cfg.get("activation_fn_kwargs") or {}).get("k") or 0),
        model_name=about.get("model_name") or "",
        neuronpedia_id=about.get("neuronpedia_id"),
        by_decoder_norm=bool(rescaled),
        shape=(_field(cfg, "d_in", where), _field(cfg, "d_sae", where)),
    )


def _without_unit_scale(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Old files carry a per-feature `scaling_factor` that is one unless the SAE was fine-tuned."""
    scale = tensors.pop("scaling_factor", None)
    if scale is not None and not torch.allclose(scale.float(), torch.ones(())):
        raise SaeError(f"{where}: an SAE with a fine-tuned scaling factor is not supported")
    return tensors


def _normalization(value: Any, where: str) -> str:
    """None and False mean none; True is an old spelling of the average norm."""
    name = {None: "none", False: "none", True: "expected_average_only_in"}.get(value, value)
    if name not in NORMALIZATIONS:
        raise SaeError(f"{where}: input normalisation '{name}' is not supported", hint=", ".join(NORMALIZATIONS))
    return name


_GEMMA_POINTS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "resid_post": "hook_resid_post"}
_GEMMA_POINTS |= {"resid_post_all": "hook_resid_post", "mlp_out": "hook_mlp_out", "mlp_out_all": "hook_mlp_out"}


def read_gemma_scope(path: Path, few: bool) -> Raw:
    """Gemma Scope: `params.npz` in `.../gemma-scope-9b-it-res/.../layer_20/width_16k/average_l0_91/`.

    MLP-output SAEs read after the post-norm, which is what `hook_mlp_out` means.
    """
    where = str(path.resolve())
    layer, repo = re.search(r"layer_(\d+)", where), re.search(r"gemma-scope-(\w+-(?:pt|it))-(res|mlp)", where)
    hook = f"blocks.{layer[1]}.{_GEMMA_POINTS[repo[2]]}" if layer and repo else None
    model = f"google/gemma-2-{repo[1].removesuffix('-pt')}" if repo else ""
    return Raw("jumprelu", map_npz(path / "params.npz", few), hook, apply_b_dec_to_input=False, model_name=model)


def read_gemma_scope_2(path: Path, few: bool) -> Raw:
    """Gemma Scope 2: `params.safetensors`, lower-case keys, in `resid_post/layer_17_width_16k_l0_medium/`."""
    tensors = map_safetensors(path / "params.safetensors", few)
    if "affine_skip_connection" in tensors or "transcoder" in str(path) or "clt" in path.name:
        raise SaeError(f"{path}: a transcoder reads one site and writes another; it is not an SAE")
    renamed = {re.sub(r"^w_", "W_", name): tensor for name, tensor in tensors.items()}
    cfg = _json(path / "config.json") if (path / "config.json").is_file() else {}
    layer, point = re.search(r"layer_(\d+)", path.name), _GEMMA_POINTS.get(path.parent.name)
    hook = f"blocks.{layer[1]}.{point}" if layer and point else None
    model = str(cfg.get("model_name", "")).replace("-v3", "-3")
    return Raw("jumprelu", renamed, hook, apply_b_dec_to_input=False, model_name=model)


_SPARSIFY_POINTS = {"": "hook_resid_post", ".mlp": "hook_mlp_out", ".self_attn": "hook_attn_out"}


def read_sparsify(path: Path, few: bool) -> Raw:
    """EleutherAI's sparsify: `layers.20/{cfg.json,sae.safetensors}`; the hook point is the directory's name."""
    cfg = _json(path / "cfg.json")
    refused = [name for name in ("transcode", "skip_connection", "signed") if cfg.get(name)]
    if refused or cfg.get("activation", "topk") != "topk":
        raise SaeError(f"{path / 'cfg.json'}: sparsify's {refused or cfg['activation']} is not supported")
    tensors = map_safetensors(path / "sae.safetensors", few)
    point = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)(\.mlp|\.self_attn|)", path.resolve().name)
    return Raw(
        architecture="topk",
        tensors={
            "W_enc": _pick(tensors, path, "encoder.weight").T,
            "b_enc": _pick(tensors, path, "encoder.bias"),
            "W_dec": _pick(tensors, path, "W_dec"),
            "b_dec": _pick(tensors, path, "b_dec"),
        },
        hook_name=f"blocks.{point[1]}.{_SPARSIFY_POINTS[point[2]]}" if point else None,
        k=int(_field(cfg, "k", path / "cfg.json")),
    )


# dictionary_learning's class -> (architecture, b_dec subtracted from the input)
_DICTIONARY_CLASSES = {
    "AutoEncoder": ("relu", True),
    "AutoEncoderNew": ("relu", False),
    "GatedAutoEncoder": ("gated", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
    "AutoEncoderTopK": ("topk", True),
    "BatchTopKSAE": ("batchtopk", True),
    "MatryoshkaBatchTopKSAE": ("batchtopk", True),
}
_DICTIONARY_VECTORS = {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}


def read_dictionary_learning(path: Path, _few: bool) -> Raw:
    """dictionary_learning: `ae.pt` (a state dict) and `config.json`."""
    trainer = _field(_json(path / "config.json"), "trainer", path / "config.json")
    kind = trainer.get("dict_class")
    if kind not in _DICTIONARY_CLASSES:
        raise SaeError(f"{path}: dictionary class '{kind}' is not supported", hint=", ".join(_DICTIONARY_CLASSES))
    architecture, centred = _DICTIONARY_CLASSES[kind]
    tensors = load_torch(path / "ae.pt")
    point = re.match(r"(resid_post|mlp_out|attn_out)", str(trainer.get("submodule_name") or path.parent.name))
    has_layer = point is not None and trainer.get("layer") is not None
    return Raw(
        architecture=architecture,
        tensors=_dictionary_tensors(tensors, architecture, path),
        hook_name=f"blocks.{trainer['layer']}.hook_{point[1]}" if has_layer and point else None,
        apply_b_dec_to_input=centred,
        k=int(trainer.get("k") or tensors.get("k") or 0),
        model_name=trainer.get("lm_name") or "",
    )


def _dictionary_tensors(tensors: Mapping[str, Tensor], architecture: str, path: Path) -> dict[str, Tensor]:
    stored = "W_enc" in tensors
    found = {
        "W_enc": tensors["W_enc"] if stored else _pick(tensors, path, "encoder.weight").T,
        "W_dec": tensors["W_dec"] if stored else _pick(tensors, path, "decoder.weight").T,
        "b_dec": _pick(tensors, path, "b_dec", "bias", "decoder_bias", "decoder.bias"),
    }
    for vector in ARCHITECTURES[architecture].vectors:
        if vector == "b_enc":
            found[vector] = _pick(tensors, path, "b_enc", "encoder.bias")
        elif vector == "threshold":  # a scalar for batch top-k
            found[vector] = _pick(tensors, path, "threshold").expand(found["W_dec"].shape[0])
        else:
            found[vector] = _pick(tensors, path, _DICTIONARY_VECTORS[vector])
    return found


def read_llama_scope(path: Path, few: bool) -> Raw:
    """Llama Scope: `hyperparams.json`, `checkpoints/final.safetensors`, one threshold for all features.

    The threshold is stated for the unscaled input; scaling the input scales the pre-activations with it.
    """
    cfg_path = path / "hyperparams.json"
    cfg = _json(cfg_path)
    norms = _field(cfg, "dataset_average_activation_norm", cfg_path)
    scale = int(_field(cfg, "d_model", cfg_path)) ** 0.5 / float(_field(norms, "in", cfg_path))
    tensors = _linear_pair(map_safetensors(path / "checkpoints" / "final.safetensors", few), path, "encoder", "decoder")
    threshold = float(_field(cfg, "jump_relu_threshold", cfg_path)) * scale
    if cfg.get("hook_point_out", cfg.get("hook_point_in")) != cfg.get("hook_point_in"):
        raise SaeError(f"{path}: a transcoder reads one site and writes another; it is not an SAE")
    return Raw(
        architecture="jumprelu",
        tensors={**tensors, "threshold": torch.tensor(threshold).expand(tensors["W_dec"].shape[0])},
        hook_name=cfg.get("hook_point_in"),
        apply_b_dec_to_input=False,
        model_name="meta-llama/Llama-3.1-8B",
        input_scale=scale,
    )


def read_goodfire(path: Path, _few: bool) -> Raw:
    """Goodfire: one `.pth` named like `Llama-3.1-8B-Instruct-SAE-l19.pth`, ReLU."""
    tensors = load_torch(path)
    name = re.fullmatch(r"(.+)-SAE-l(\d+)\.pth?", path.name)
    encoder, decoder = ("encoder_linear", "decoder_linear") if "encoder_linear.weight" in tensors else _PLAIN
    return Raw(
        architecture="relu",
        tensors=_linear_pair(tensors, path, encoder, decoder),
        hook_name=f"blocks.{name[2]}.hook_resid_post" if name else None,
        apply_b_dec_to_input=False,
        model_name=name[1] if name else "",
    )


_PLAIN = ("encoder", "decoder")


def _linear_pair(tensors: Mapping[str, Tensor], path: Path, encoder: str, decoder: str) -> dict[str, Tensor]:
    """Two `nn.Linear`s: weights [out, in], both the other way round from ours."""
    return {
        "W_enc": _pick(tensors, path, f"{encoder}.weight").T,
        "b_enc": _pick(tensors, path, f"{encoder}.bias"),
        "W_dec": _pick(tensors, path, f"{decoder}.weight").T,
        "b_dec": _pick(tensors, path, f"{decoder}.bias"),
    }


def read_qwen_scope(path: Path, _few: bool) -> Raw:
    """Qwen Scope: `layer20.sae.pt` in a repository named `SAE-Res-Qwen3-8B-Base-W64K-L0_50`, top 50."""
    tensors = load_torch(path)
    layer, repo = re.match(r"layer(\d+)", path.name), re.search(r"SAE-Res-(.+)-W\d+K-L0_(\d+)", str(path.resolve()))
    return Raw(
        architecture="topk",
        tensors={
            "W_enc": _pick(tensors, path, "W_enc").T,
            "b_enc": _pick(tensors, path, "b_enc"),
            "W_dec": _pick(tensors, path, "W_dec").T,
            "b_dec": _pick(tensors, path, "b_dec"),
        },
        hook_name=f"blocks.{layer[1]}.hook_resid_post" if layer else None,
        apply_b_dec_to_input=False,
        k=int(repo[2]) if repo else 0,
        model_name=f"Qwen/{repo[1]}" if repo else "",
    )


FORMATS: tuple[Format, ...] = (
    Format("saelens", ("sae_weights.safetensors", "cfg.json"), read_saelens),
    Format("gemma-scope", ("params.npz",), read_gemma_scope),
    Format("gemma-scope-2", ("params.safetensors",), read_gemma_scope_2, optional=("config.json",)),
    Format("sparsify", ("sae.safetensors", "cfg.json"), read_sparsify),
    Format("dictionary_learning", ("ae.pt", "config.json"), read_dictionary_learning),
    Format("llama-scope", ("checkpoints/final.safetensors", "hyperparams.json"), read_llama_scope),
    Format("qwen-scope", (), read_qwen_scope, single_file=re.compile(r"^layer\d+\.sae\.pt$")),
    Format("goodfire", (), read_goodfire, single_file=re.compile(r"\.pth?$")),
)


def detect(path: Path) -> Format:
    """The format of an SAE directory or file. Raises `CheckpointError` when no row of the table matches."""
    for candidate in FORMATS:
        if candidate.matches(path):
            return candidate
    if not path.exists():
        raise CheckpointError(f"no SAE at '{path}': no such file or directory")
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) if path.is_dir() else path.name
    known = "; ".join(f"{f.name}: {' + '.join(f.files) or 'one .pt or .pth file'}" for f in FORMATS)
    raise CheckpointError(f"'{path}' is not an SAE of a known format (found: {found or 'nothing'})", hint=known)
