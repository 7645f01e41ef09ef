"""SAE file formats: one small reader each, in one table; a new format is a reader and a row.

A reader says what the files say (`Raw`), with tensors mapped and nothing computed, so that a few features can be taken
without reading the rest. All use one orientation: W_enc [d_in, d_sae], W_dec [d_sae, d_in].

Sources: SAELens and Gemma Scope files as their own loaders read them; sparsify and dictionary_learning as their own
`encode` and `decode` compute (tests compare with the packages). Two things that readers elsewhere get wrong: sparsify
stores W_dec a row per feature already, and subtracts b_dec from the input whatever `normalize_decoder` says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clampdown.documents import read_object
from clampdown.errors import CheckpointError, SaeError
from clampdown.saes.architectures import ARCHITECTURES, STATED_NORMALIZATIONS
from clampdown.saes.fields import (
    DICTIONARY,
    DICTIONARY_TRAINER,
    GEMMA_SCOPE_2,
    LLAMA_SCOPE,
    MODEL_PROCESSING,
    SAELENS,
    SPARSIFY,
    Allowed,
    check_fields,
    count,
    positive,
    switch,
    table,
    text,
)
from clampdown.saes.tensor_files import load_torch, map_npz, map_safetensors


@dataclass(frozen=True, slots=True)
class Raw:
    """What the files of an SAE say.

    `input_scale`: the input is multiplied by this before encoding and the reconstruction divided by it (an average norm
    measured in training). `centred`: the SAE was trained on the residual less its mean over
    d_model. `by_decoder_norm`: activations are in units of the decoder row's length.
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
    centred: bool = False
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


def _only(tensors: Mapping[str, Tensor], path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors, when the file has no others. Raises `CheckpointError` naming those that nothing here would read."""
    unread = sorted(tensors.keys() - set(names))
    if unread:
        raise CheckpointError(
            f"{path} holds tensors that are not read here: {', '.join(name[:60] for name in unread[:8])}",
            hint=f"they may change what the SAE computes; its kind has {', '.join(names)}",
        )
    return dict(tensors)


_JUMPRELU = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def _pick(tensors: Mapping[str, Tensor], path: Path, *names: str) -> Tensor:
    """The first of these tensors that the file has. Raises `CheckpointError` when it has none."""
    for name in names:
        if name in tensors:
            return tensors[name]
    raise CheckpointError(f"{path} has no tensor '{names[0]}'", hint=f"found: {', '.join(sorted(tensors))}")


def _supported(architecture: str, where: str) -> str:
    if architecture not in ARCHITECTURES:
        raise SaeError(
            f"{where}: '{architecture}' is not a kind of SAE that can be steered here",
            hint=f"supported: {', '.join(ARCHITECTURES)}; transcoders and cross-layer SAEs write to another site",
        )
    return architecture


_SAELENS_NAMES = {"standard": "relu", "matryoshka_batchtopk": "batchtopk"}


SCALERS = ("activation_scaler.json", "activation_whitening.safetensors", "activations_store_state.safetensors")
"""Where SAELens keeps what the input was multiplied by, until training ends and it goes into the weights."""

_SCALER = frozenset({"scaling_factor", "has_whitening"})


def read_saelens(path: Path, few: bool) -> Raw:
    """SAELens: version 6 (facts about the model under `metadata`) and the flat config before it."""
    cfg = read_object(path / "cfg.json", CheckpointError)
    raw = from_saelens_config(cfg, map_safetensors(path / "sae_weights.safetensors", few), str(path / "cfg.json"))
    scale = _scale_beside(path)
    if scale is None:
        return raw
    if raw.normalize_activations != "expected_average_only_in":
        raise SaeError(
            f"{path}: a file beside the weights says that the input was scaled by {scale:g}, cfg.json says "
            f"normalize_activations '{raw.normalize_activations}'",
            hint="one of them is wrong: it may be a checkpoint from the middle of training; take the finished one",
        )
    return replace(raw, input_scale=scale)


def _scale_beside(path: Path) -> float | None:
    """The factor of the input that is not in the weights yet. None when it is, or there never was one."""
    scaler, whitening, stream = (path / name for name in SCALERS)
    found: list[float] = []
    if scaler.is_file():
        said = read_object(scaler, CheckpointError)
        check_fields(said, _SCALER, str(scaler), {"has_whitening": (False, None)})
        found += [positive(said, "scaling_factor", str(scaler))] if said.get("scaling_factor") is not None else []
    elif whitening.is_file():
        raise SaeError(
            f"{whitening}: an SAE whose input is whitened is not supported", hint="take a finished checkpoint"
        )
    if stream.is_file():
        estimated = map_safetensors(stream, True).get("estimated_norm_scaling_factor")
        found += [] if estimated is None else [positive({"factor": float(estimated)}, "factor", str(stream))]
    if len(set(found)) > 1:
        raise SaeError(f"{path}: {scaler.name} and {stream.name} say different factors of the input: {found}")
    return found[0] if found else None


_OFF = {"hook_head_index": (None,), "hook_point_head_index": (None,), "hook_head_index_out": (None,)}


def from_saelens_config(cfg: Mapping[str, Any], weights: dict[str, Tensor], where: str) -> Raw:
    """What a SAELens config and its weights say. `where` names them in errors."""
    about = {**cfg, **table(cfg, "metadata", where)}
    function = text(cfg, "activation_fn", where) or text(cfg, "activation_fn_str", where) or "relu"
    name = "topk" if function == "topk" else text(cfg, "architecture", where) or "standard"
    architecture = _supported(_SAELENS_NAMES.get(name, name), where)
    if function not in ("relu", "topk"):
        raise SaeError(f"{where}: activation function '{function}' is not supported")
    if cfg.get("reshape_activations", "none") != "none":
        raise SaeError(f"{where}: an SAE of attention heads (hook_z) cannot steer the residual stream")
    check_fields(about, SAELENS, where, _OFF)
    settings = table(cfg, "activation_fn_kwargs", where)
    check_fields(settings, frozenset({"k"}), f"{where}: activation_fn_kwargs")
    top = cfg if cfg.get("k") is not None else settings
    tensors = _without_unit_scale(weights, where)
    if "topk_threshold" in tensors:  # a batch-top-k SAE saved in the middle of training
        tensors["threshold"] = tensors.pop("topk_threshold").expand(count(cfg, "d_sae", where))
    if "log_threshold" in tensors and "threshold" not in tensors:  # as SAELens saved it before the end of training
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    return Raw(
        architecture=architecture,
        tensors=tensors,
        hook_name=_saelens_hook(about, where),
        apply_b_dec_to_input=switch(cfg, "apply_b_dec_to_input", where, absent=True),
        normalize_activations=_normalization(cfg.get("normalize_activations"), where),
        k=count(top, "k", where) if top.get("k") is not None else 0,
        model_name=text(about, "model_name", where) or "",
        neuronpedia_id=text(about, "neuronpedia_id", where),
        by_decoder_norm=switch(cfg, "rescale_acts_by_decoder_norm", where, absent=architecture == "batchtopk"),
        centred=_centred(about, where),
        shape=(count(cfg, "d_in", where), count(cfg, "d_sae", where)),
    )


def _saelens_hook(about: Mapping[str, Any], where: str) -> str | None:
    """The site, said once and not otherwise elsewhere in the same config."""
    hook = text(about, "hook_name", where) or text(about, "hook_point", where)
    out, layer = text(about, "hook_name_out", where), about.get("hook_layer", about.get("hook_point_layer"))
    if out and out != hook:
        raise SaeError(f"{where}: a transcoder reads one site and writes another; it is not an SAE")
    if hook and isinstance(layer, int) and hook.startswith("blocks.") and not hook.startswith(f"blocks.{layer}."):
        raise SaeError(f"{where}: hook_name is {hook[:80]}, but its layer is said to be {str(layer)[:20]}")
    return hook


def _centred(about: Mapping[str, Any], where: str) -> bool:
    """Whether the model's residual stream was centred: TransformerLens can take the mean over d_model out of all that
    writes to it. Raises `SaeError` for other ways of loading a model that are not known to leave the stream alone."""
    processing = table(about, "model_from_pretrained_kwargs", where)
    inside = f"{where}: model_from_pretrained_kwargs"
    check_fields(processing, MODEL_PROCESSING, inside)
    return switch(processing, "center_writing_weights", inside, absent=False)


def _without_unit_scale(tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Old files carry a per-feature `scaling_factor` that is one unless the SAE was fine-tuned."""
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        scale = tensors.pop(name, None)
        if scale is not None and not torch.allclose(scale.float(), torch.ones(())):
            raise SaeError(f"{where}: an SAE with a fine-tuned scaling factor is not supported")
    return tensors


def _normalization(value: Any, where: str) -> str:
    """None and False mean none; True is an old spelling of the average norm."""
    name = "expected_average_only_in" if value is True else value or "none"
    if name not in STATED_NORMALIZATIONS or not isinstance(value, str | bool | None):
        raise SaeError(
            f"{where}: input normalisation {str(value)[:60]!r} is not supported", hint=", ".join(STATED_NORMALIZATIONS)
        )
    return name


def innermost(pattern: str, parts: Sequence[str]) -> tuple[re.Match[str] | None, Sequence[str]]:
    """The last of a path's parts that is what the pattern says, and the parts below it: folders further out belong to
    somebody else."""
    for at in range(len(parts) - 1, -1, -1):
        if match := re.fullmatch(pattern, parts[at]):
            return match, parts[at + 1 :]
    return None, parts


_GEMMA_POINTS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "resid_post": "hook_resid_post"}
_GEMMA_POINTS |= {"resid_post_all": "hook_resid_post", "mlp_out": "hook_mlp_out", "mlp_out_all": "hook_mlp_out"}


def read_gemma_scope(path: Path, few: bool) -> Raw:
    """Gemma Scope: `params.npz` in `.../gemma-scope-9b-it-res/.../layer_20/width_16k/average_l0_91/`.

    MLP-output SAEs read after the post-norm, which is what `hook_mlp_out` means.
    """
    repo, below = innermost(r".*gemma-scope-(\w+-(?:pt|it))-([a-z]+)(?:-canonical)?", path.resolve().parts)
    if repo and repo[2] not in _GEMMA_POINTS:
        raise SaeError(f"{path}: Gemma Scope's '{repo[2]}' is not an SAE of the residual stream or of an MLP's output")
    layer, _ = innermost(r"layer_(\d{1,6})", below)
    hook = f"blocks.{layer[1]}.{_GEMMA_POINTS[repo[2]]}" if layer and repo else None
    model = f"google/gemma-2-{repo[1].removesuffix('-pt')}" if repo else ""
    tensors = _only(map_npz(path / "params.npz", few), path, _JUMPRELU)
    return Raw("jumprelu", tensors, hook, apply_b_dec_to_input=False, model_name=model)


def read_gemma_scope_2(path: Path, few: bool) -> Raw:
    """Gemma Scope 2: `params.safetensors`, lower-case keys, in `resid_post/layer_17_width_16k_l0_medium/`."""
    tensors = map_safetensors(path / "params.safetensors", few)
    folder, where = path.resolve().parent.name, str(path / "config.json")
    if "affine_skip_connection" in tensors or "transcoder" in folder or "clt" in path.name or "crosscoder" in folder:
        raise SaeError(f"{path}: a transcoder reads one site and writes another; it is not an SAE")
    renamed = _only({re.sub(r"^w_", "W_", name): tensor for name, tensor in tensors.items()}, path, _JUMPRELU)
    cfg = read_object(path / "config.json", CheckpointError) if (path / "config.json").is_file() else {}
    check_fields(cfg, GEMMA_SCOPE_2, where, {"architecture": ("jump_relu",), "affine_connection": (False, None)})
    if cfg.get("hf_hook_point_out", cfg.get("hf_hook_point_in")) != cfg.get("hf_hook_point_in"):
        raise SaeError(f"{path}: a transcoder reads one site and writes another; it is not an SAE")
    layer, point = re.match(r"layer_(\d{1,6})(?:_|$)", path.resolve().name), _GEMMA_POINTS.get(folder)
    hook = f"blocks.{layer[1]}.{point}" if layer and point else None
    model = (text(cfg, "model_name", where) or "").replace("-v3", "-3")
    return Raw("jumprelu", renamed, hook, apply_b_dec_to_input=False, model_name=model)


_SPARSIFY_OFF = {"transcode": (False,), "skip_connection": (False,), "signed": (False,), "activation": ("topk",)}
_SPARSIFY_POINTS = {"": "hook_resid_post", ".mlp": "hook_mlp_out", ".self_attn": "hook_attn_out"}


def read_sparsify(path: Path, few: bool) -> Raw:
    """EleutherAI's sparsify: `layers.20/{cfg.json,sae.safetensors}`; the hook point is the directory's name."""
    cfg, where = read_object(path / "cfg.json", CheckpointError), str(path / "cfg.json")
    check_fields(cfg, SPARSIFY, where, _SPARSIFY_OFF)
    stored = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
    tensors = _only(map_safetensors(path / "sae.safetensors", few), path, stored)
    d_in = count(cfg, "d_in", where)
    d_sae = count(cfg, "num_latents", where) if cfg.get("num_latents") else d_in * count(cfg, "expansion_factor", where)
    point = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d{1,6})(\.mlp|\.self_attn|)", path.resolve().name)
    return Raw(
        architecture="topk",
        tensors={
            "W_enc": _pick(tensors, path, "encoder.weight").T,
            "b_enc": _pick(tensors, path, "encoder.bias"),
            "W_dec": _pick(tensors, path, "W_dec"),
            "b_dec": _pick(tensors, path, "b_dec"),
        },
        hook_name=f"blocks.{point[1]}.{_SPARSIFY_POINTS[point[2]]}" if point else None,
        k=count(cfg, "k", where),
        shape=(d_in, d_sae),
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
_DICTIONARY_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "encoder.weight", "encoder.bias", "decoder.weight")
_DICTIONARY_NAMES += ("bias", "decoder_bias", "decoder.bias", "threshold", "k", "group_sizes")
_DICTIONARY_VECTORS = {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}


def read_dictionary_learning(path: Path, _few: bool) -> Raw:
    """dictionary_learning: `ae.pt` (a state dict) and `config.json`."""
    where = str(path / "config.json")
    config = read_object(path / "config.json", CheckpointError)
    check_fields(config, DICTIONARY, where)
    trainer, stream = table(config, "trainer", where), table(config, "buffer", where)
    check_fields(trainer, DICTIONARY_TRAINER, f"{where}: trainer")
    check_fields({"io": stream.get("io")}, frozenset({"io"}), f"{where}: buffer", {"io": ("out", None)})
    kind = text(trainer, "dict_class", where)
    if kind not in _DICTIONARY_CLASSES:
        raise SaeError(f"{path}: dictionary class '{kind}' is not supported", hint=", ".join(_DICTIONARY_CLASSES))
    architecture, centred = _DICTIONARY_CLASSES[kind]
    tensors = load_torch(path / "ae.pt")
    _only(tensors, path, (*_DICTIONARY_NAMES, *_DICTIONARY_VECTORS.values()))
    named = text(trainer, "submodule_name", where) or path.resolve().parent.name
    point = re.match(r"(resid_post|mlp_out|attn_out)", named)
    layer, inside = trainer.get("layer"), re.fullmatch(r"(?:resid_post|mlp_out|attn_out)_layer_(\d{1,6})", named)
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < 1 << 20):
        raise CheckpointError(f"{where}: layer should be a whole number, it is {str(layer)[:60]!r}")
    if layer is not None and inside and int(inside[1]) != layer:
        raise SaeError(f"{where}: the layer is said to be {layer}, and {inside[1]} in '{named}'")
    has_layer = point is not None and layer is not None
    top = trainer if trainer.get("k") is not None else {"k": int(tensors["k"])} if "k" in tensors else {}
    return Raw(
        architecture=architecture,
        tensors=_dictionary_tensors(tensors, architecture, path),
        hook_name=f"blocks.{layer}.hook_{point[1]}" if has_layer and point else None,
        apply_b_dec_to_input=centred,
        k=count(top, "k", where) if top and architecture in ("topk", "batchtopk") else 0,
        model_name=text(trainer, "lm_name", where) or "",
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


_LLAMA_SCOPE_VALUES: Allowed = {
    "act_fn": ("jumprelu",),
    "norm_activation": ("dataset-wise",),
    "use_decoder_bias": (True,),
    "apply_decoder_bias_to_pre_encoder": (False,),
    "use_glu_encoder": (False,),
}


def read_llama_scope(path: Path, few: bool) -> Raw:
    """Llama Scope: `hyperparams.json`, `checkpoints/final.safetensors`, one threshold for all features.

    The threshold is stated for the unscaled input; scaling the input scales the pre-activations with it.
    """
    where = str(path / "hyperparams.json")
    cfg = read_object(path / "hyperparams.json", CheckpointError)
    check_fields(cfg, LLAMA_SCOPE, where, _LLAMA_SCOPE_VALUES)
    norms = table(cfg, "dataset_average_activation_norm", where)
    scale = count(cfg, "d_model", where) ** 0.5 / positive(norms, "in", where)
    tensors = _linear_pair(map_safetensors(path / "checkpoints" / "final.safetensors", few), path, "encoder", "decoder")
    threshold = positive(cfg, "jump_relu_threshold", where) * scale
    if cfg.get("hook_point_out", cfg.get("hook_point_in")) != cfg.get("hook_point_in"):
        raise SaeError(f"{path}: a transcoder reads one site and writes another; it is not an SAE")
    return Raw(
        architecture="jumprelu",
        tensors={**tensors, "threshold": torch.tensor(threshold).expand(tensors["W_dec"].shape[0])},
        hook_name=text(cfg, "hook_point_in", where),
        apply_b_dec_to_input=False,
        model_name="meta-llama/Llama-3.1-8B",
        input_scale=scale,
    )


def read_goodfire(path: Path, _few: bool) -> Raw:
    """Goodfire: one `.pth` named like `Llama-3.1-8B-Instruct-SAE-l19.pth`, ReLU."""
    tensors = load_torch(path)
    name = re.fullmatch(r"(.+)-SAE-l(\d{1,6})\.pth?", path.name)
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
    """Two `nn.Linear`s and nothing else: weights [out, in], both the other way round from ours."""
    _only(tensors, path, tuple(f"{layer}.{part}" for layer in (encoder, decoder) for part in ("weight", "bias")))
    return {
        "W_enc": _pick(tensors, path, f"{encoder}.weight").T,
        "b_enc": _pick(tensors, path, f"{encoder}.bias"),
        "W_dec": _pick(tensors, path, f"{decoder}.weight").T,
        "b_dec": _pick(tensors, path, f"{decoder}.bias"),
    }


def read_qwen_scope(path: Path, _few: bool) -> Raw:
    """Qwen Scope: `layer20.sae.pt` in a repository named `SAE-Res-Qwen3-8B-Base-W64K-L0_50`, top 50."""
    tensors = load_torch(path)
    _only(tensors, path, ("W_enc", "W_dec", "b_enc", "b_dec"))
    layer = re.fullmatch(r"layer(\d{1,6})\.sae\.pt", path.name)
    repo, _ = innermost(r"(?:.*--)?SAE-Res-(.+)-W\d+K-L0_(\d{1,6})", path.resolve().parts)
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
    Format("saelens", ("sae_weights.safetensors", "cfg.json"), read_saelens, optional=SCALERS),
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
