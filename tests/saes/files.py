"""Writing one SAE in every file format, so that readers are tested on files and not on their own assumptions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from clampdown.saes.sae import Sae

LAYER = 1
SCALE = 2.0  # Llama Scope's sqrt(d_in) / average norm
TOPK_SCALAR = 0.35  # the single threshold of batch top-k files


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _needed(sae: Sae) -> dict[str, Tensor]:
    return {name: sae.tensors[name] for name in ("W_enc", "W_dec", "b_dec", *sae.architecture.vectors)}


def saelens(sae: Sae, root: Path, **extra: Any) -> Path:
    """Version 6."""
    name = "standard" if sae.cfg.architecture == "relu" else sae.cfg.architecture
    cfg = {
        "architecture": name,
        "d_in": sae.cfg.d_in,
        "d_sae": sae.cfg.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input,
        "normalize_activations": sae.cfg.normalize_activations,
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.5.0",
            "model_name": "toy",
            "hook_name": f"blocks.{LAYER}.hook_resid_post",
            "hook_head_index": None,
            "prepend_bos": True,
            "neuronpedia_id": "toy/1-res",
        },
    }
    if name == "topk":
        cfg |= {"k": sae.cfg.k, "rescale_acts_by_decoder_norm": False}
    _write_json(root / "cfg.json", cfg | extra)
    _save(_needed(sae), root / "sae_weights.safetensors")
    return root


def saelens_flat(sae: Sae, root: Path, **extra: Any) -> Path:
    """Before version 6: no metadata, older names, a scaling factor of ones among the weights."""
    topk = sae.cfg.architecture == "topk"
    cfg = {
        "architecture": {"relu": "standard", "topk": "standard"}.get(sae.cfg.architecture, sae.cfg.architecture),
        "d_in": sae.cfg.d_in,
        "d_sae": sae.cfg.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "model_name": "toy",
        "hook_point": f"blocks.{LAYER}.hook_resid_post",
        "hook_point_layer": LAYER,
        "hook_point_head_index": None,
        "activation_fn_str": "topk" if topk else "relu",
        "activation_fn_kwargs": {"k": sae.cfg.k} if topk else {},
        "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input,
        "finetuning_scaling_factor": False,
        "normalize_activations": {"none": None}.get(sae.cfg.normalize_activations, sae.cfg.normalize_activations),
        "context_size": 128,
        "prepend_bos": True,
        "dataset_path": "x",
        "sae_lens_training_version": None,
    }
    _write_json(root / "cfg.json", cfg | extra)
    _save({**_needed(sae), "scaling_factor": torch.ones(sae.cfg.d_sae)}, root / "sae_weights.safetensors")
    return root


def gemma_scope(sae: Sae, root: Path, *, compressed: bool = False) -> Path:
    path = root / "gemma-scope-9b-it-res" / f"layer_{LAYER}" / "width_16k" / "average_l0_91"
    path.mkdir(parents=True)
    arrays = {name: tensor.numpy() for name, tensor in _needed(sae).items()}
    (np.savez_compressed if compressed else np.savez)(path / "params.npz", **arrays)
    return path


def gemma_scope_2(sae: Sae, root: Path) -> Path:
    path = root / "resid_post" / f"layer_{LAYER}_width_16k_l0_medium"
    _save({name.replace("W_", "w_"): tensor for name, tensor in _needed(sae).items()}, path / "params.safetensors")
    _write_json(path / "config.json", {"architecture": "jump_relu", "model_name": "google/gemma-3-4b-it"})
    return path


def sparsify(sae: Sae, root: Path, **extra: Any) -> Path:
    path = root / f"layers.{LAYER}"
    weights = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.tensors["b_enc"], "W_dec": sae.W_dec}
    _save({**weights, "b_dec": sae.b_dec}, path / "sae.safetensors")
    cfg = {"d_in": sae.cfg.d_in, "num_latents": sae.cfg.d_sae, "expansion_factor": 32, "k": sae.cfg.k}
    _write_json(
        path / "cfg.json", {**cfg, "normalize_decoder": True, "transcode": False, "activation": "topk", **extra}
    )
    return path


_CLASSES = {"gated": "GatedAutoEncoder", "jumprelu": "JumpReluAutoEncoder", "topk": "AutoEncoderTopK"}
_CLASSES |= {"relu": "AutoEncoder", "batchtopk": "BatchTopKSAE"}


def dictionary_learning(sae: Sae, root: Path) -> Path:
    path = root / f"resid_post_layer_{LAYER}" / "trainer_0"
    path.mkdir(parents=True)
    kind, t = sae.cfg.architecture, sae.tensors
    linear = {"encoder.weight": t["W_enc"].T.contiguous(), "decoder.weight": t["W_dec"].T.contiguous()}
    scalars = {"k": torch.tensor(sae.cfg.k), "threshold": torch.tensor(TOPK_SCALAR)}
    gated = {"decoder_bias": t["b_dec"], "gate_bias": t["b_gate"], "mag_bias": t["b_mag"], "r_mag": t["r_mag"]}
    state = {
        "relu": {**linear, "encoder.bias": t["b_enc"], "bias": t["b_dec"]},
        "gated": {**linear, **gated},
        "jumprelu": {name: t[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")},
        "topk": {**linear, "encoder.bias": t["b_enc"], "b_dec": t["b_dec"], **scalars},
        "batchtopk": {**linear, "encoder.bias": t["b_enc"], "b_dec": t["b_dec"], **scalars},
    }[kind]
    torch.save(state, path / "ae.pt")
    trainer = {"dict_class": _CLASSES[kind], "activation_dim": sae.cfg.d_in, "dict_size": sae.cfg.d_sae}
    trainer |= {"layer": LAYER, "lm_name": "toy", "submodule_name": f"resid_post_layer_{LAYER}", "k": sae.cfg.k}
    _write_json(path / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 128}})
    return path


def llama_scope(sae: Sae, root: Path) -> Path:
    """Weights as they are before the average norm is folded in."""
    path = root / f"Llama3_1-8B-Base-L{LAYER}R-8x"
    _save(_linear_pair(sae, "encoder", "decoder"), path / "checkpoints" / "final.safetensors")
    cfg = {"d_model": sae.cfg.d_in, "d_sae": sae.cfg.d_sae, "jump_relu_threshold": TOPK_SCALAR}
    cfg |= {"hook_point_in": f"blocks.{LAYER}.hook_resid_post", "hook_point_out": f"blocks.{LAYER}.hook_resid_post"}
    norm = sae.cfg.d_in**0.5 / SCALE
    _write_json(path / "hyperparams.json", {**cfg, "dataset_average_activation_norm": {"in": norm, "out": norm}})
    return path


def goodfire(sae: Sae, root: Path) -> Path:
    path = root / f"Llama-3.1-8B-Instruct-SAE-l{LAYER}.pth"
    root.mkdir(parents=True, exist_ok=True)
    torch.save(_linear_pair(sae, "encoder_linear", "decoder_linear"), path)
    return path


def qwen_scope(sae: Sae, root: Path) -> Path:
    path = root / f"SAE-Res-Qwen3-8B-Base-W64K-L0_{sae.cfg.k}" / f"layer{LAYER}.sae.pt"
    path.parent.mkdir(parents=True)
    state = {"W_enc": sae.W_enc.T.contiguous(), "W_dec": sae.W_dec.T.contiguous()}
    torch.save({**state, "b_enc": sae.tensors["b_enc"], "b_dec": sae.b_dec}, path)
    return path


def _linear_pair(sae: Sae, encoder: str, decoder: str) -> dict[str, Tensor]:
    return {
        f"{encoder}.weight": sae.W_enc.T.contiguous(),
        f"{encoder}.bias": sae.tensors["b_enc"],
        f"{decoder}.weight": sae.W_dec.T.contiguous(),
        f"{decoder}.bias": sae.b_dec,
    }


Writer = Callable[[Sae, Path], Path]
# format -> (writer, the kinds that it stores, whether b_dec is subtracted from the input)
FORMATS: dict[str, tuple[Writer, tuple[str, ...], bool]] = {
    "saelens": (saelens, ("relu", "jumprelu", "topk", "gated"), True),
    "saelens-flat": (saelens_flat, ("relu", "jumprelu", "topk", "gated"), True),
    "gemma-scope": (gemma_scope, ("jumprelu",), False),
    "gemma-scope-2": (gemma_scope_2, ("jumprelu",), False),
    "sparsify": (sparsify, ("topk",), True),
    "dictionary_learning": (dictionary_learning, ("relu", "gated", "topk", "batchtopk"), True),
    "goodfire": (goodfire, ("relu",), False),
    "qwen-scope": (qwen_scope, ("topk",), False),
}
CASES = [(name, kind) for name, (_, kinds, _) in FORMATS.items() for kind in kinds]
