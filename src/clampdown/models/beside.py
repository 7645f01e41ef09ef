"""Facts beside a model's weights that change its answers: each is honoured or an error, never passed over.

1. An adapter beside a full model, or inside its file: the library answers with the bare base model when nobody applies
   it. Merging is exact and one line, so that is what the error says.
2. A quantisation: the library loads it where its package is installed; of a method that it does not know it says a
   warning and loads something else.
3. Tensors of the file that the model has no place for, unless they are known to hold nothing.
4. Tokens that the tokenizer can make and the embedding has no row for.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clampdown.documents import read_object
from clampdown.errors import ModelError

_ADAPTERS = ("adapter_config.json", "adapter_model.*", "adapters.safetensors", "*lora*.safetensors")
_MERGE = (
    "merge it into the model once: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(...); "
    "or take the adapter's files away"
)


def refuse_adapters(directory: Path, name: str) -> None:
    """Raises `ModelError` for a directory that holds an adapter, alone or beside a model."""
    found = sorted(path.name for pattern in _ADAPTERS for path in directory.glob(pattern))
    if found:
        raise ModelError(
            f"'{name}' holds an adapter ({found[0]}), which would not be applied: the bare base model would answer",
            hint=_MERGE,
        )


# What transformers calls a method -> the packages that it needs, as one imports them and as one installs them.
_PACKAGES = {
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "gptq": ("gptqmodel", "gptqmodel"),
    "awq": ("gptqmodel", "gptqmodel"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "hqq": ("hqq", "hqq"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "torchao": ("torchao", "torchao"),
    "aqlm": ("aqlm", "aqlm"),
    "vptq": ("vptq", "vptq"),
    "eetq": ("kernels", "kernels"),
    "higgs": ("flute", "flute-kernel"),
    "spqr": ("spqr_quant", "spqr_quant"),
    "quark": ("quark", "amd-quark"),
    "auto-round": ("auto_round", "auto-round"),
}


def quantisation(directory: Path, name: str) -> str | None:
    """The method that a model was quantised with, None when it was not.

    Raises `ModelError` when its package is not installed, or when the library does not know the method and would load
    the quantised numbers as they are.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    config = read_object(directory / "config.json", ModelError)
    parts = (config, config.get("text_config"))
    stated = [part["quantization_config"] for part in parts if isinstance(part, dict) and "quantization_config" in part]
    stated = [each for each in stated if each is not None]
    if not stated:
        return None
    method = stated[0].get("quant_method", "bitsandbytes") if isinstance(stated[0], dict) else stated[0]
    package = _PACKAGES.get(method) if isinstance(method, str) else None
    if package and not _installed(package[0]):
        raise ModelError(
            f"'{name}' is quantised with {method}, which needs the package '{package[1]}'",
            hint=f"pip install {package[1]}, or take the model that was not quantised",
        )
    known = {key.removesuffix("_4bit").removesuffix("_8bit") for key in AUTO_QUANTIZATION_CONFIG_MAPPING}
    if not isinstance(method, str) or method not in known:
        raise ModelError(
            f"'{name}' is quantised with {str(method)[:60]!r}, which the library does not know",
            hint="take the model that was not quantised",
        )
    return method


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that the module would lie in
        return False


# What old checkpoints hold that a model computes anew: tables of positions, masks.
_HOLD_NOTHING = re.compile(
    r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.masked_bias$|\.attn\.bias$|attention\.bias$|position_ids$"
)


def check_loaded(info: Mapping[str, Iterable[Any]], name: str) -> None:
    """Raises `ModelError` for what the library reports beside a loaded model: tensors that are missing, left over, or
    of another shape."""
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"model '{name}' is incomplete: {len(missing)} tensors are missing, '{missing[0]}' among them",
            hint="the library would fill them with random numbers; fetch the checkpoint again",
        )
    if wrong := sorted(str(each[0]) for each in info.get("mismatched_keys", ())):
        raise ModelError(f"model '{name}': '{wrong[0]}' has another shape than config.json says")
    left = sorted(key for key in info.get("unexpected_keys", ()) if not _HOLD_NOTHING.search(key))
    if left:
        adapter = any("lora_" in key for key in left)
        raise ModelError(
            f"model '{name}' holds {len(left)} tensors that would not be used, '{left[0]}' among them",
            hint=_MERGE
            if adapter
            else "they may change its answers: save the model again without them, or load it "
            "with the code that uses them",
        )


# Stand for pictures and sounds in tokenizers of families whose text models have no row for them. Text never becomes
# one: contents are encoded as plain text.
_NO_TEXT = {"<image_soft_token>", "<audio_soft_token>"}


def check_tokens(tokenizer: Any, rows: int, name: str) -> None:
    """Raises `ModelError` for a token beyond the embedding: the first conversation that holds it would fail."""
    beyond = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= rows)
    beyond = [(index, token) for index, token in beyond if token not in _NO_TEXT]
    if beyond:
        index, token = beyond[0]
        raise ModelError(
            f"the tokenizer of '{name}' has a token '{token[:60]}' of id {index}, the model has {rows} embeddings",
            hint="tokenizer and weights are not of the same model, or the embedding was not enlarged after tokens were "
            "added",
        )
