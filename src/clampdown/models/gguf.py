"""A GGUF file as an ordinary model directory: de-quantised once into a cache, then a directory like any other.

1. The sha256 of the file names its directory in the cache; one that is there is finished: it is moved there whole.
2. `gguf` reads the file (numbers and text; nothing in it is executed), `transformers` maps its tensors to the family's.
3. config, tokenizer with its chat template, generation config and safetensors are written. Files of 16 or 32 bit keep
   their precision; quantised ones become bfloat16, whose rounding is small beside the quantisation's.

What the mapping would drop in silence is refused: positions that the file stretches (`rope.scaling`, `rope_freqs`).
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from rich.file_proxy import FileProxy

from clampdown.config import cache_directory
from clampdown.errors import ModelError
from clampdown.extras import extra

SUFFIX = ".gguf"
_BLOCK = 1 << 22
_KEPT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STRETCHED = ("rope_freqs", "rope_factors_long", "rope_factors_short")


def is_gguf(name: str | Path) -> bool:
    """Whether a name means a GGUF file."""
    return str(name).lower().endswith(SUFFIX)


def file_hash(path: Path) -> str:
    """The sha256 of a file. Raises `ModelError` when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as handle:
            while block := handle.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def directory_of(path: Path, origin: str = "") -> tuple[Path, str]:
    """The model directory of a GGUF file, made when it is not there, and the file's sha256.

    `origin` is written into the config as the model's name. Raises `ModelError` for a file that cannot be read, is of a
    family that cannot be mapped or whose mapping would change it, `MissingPackageError` without the package gguf.
    """
    if not path.is_file():
        raise ModelError(f"no model at '{path}': no such file")
    sha256 = file_hash(path)
    target = cache_directory() / "gguf" / sha256
    if not target.is_dir():
        _convert(path, target, origin or path.name)
    return target, sha256


def _convert(path: Path, target: Path, origin: str) -> None:
    dtype = _dtype_to_keep(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as room:
            written = Path(room) / "model"
            _write(path, written, dtype, origin)
            _move_whole(written, target)
    except OSError as error:
        raise ModelError(
            f"{path} cannot be de-quantised into {target.parent}: {error.strerror or error}",
            hint="CLAMPDOWN_CACHE names another directory for it",
        ) from error


def _move_whole(written: Path, target: Path) -> None:
    """Another process may have finished the same directory first; theirs is as good."""
    try:
        os.rename(written, target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(written)


def _dtype_to_keep(path: Path) -> torch.dtype:
    """What the weights are written in. Raises `ModelError` for what is no GGUF file and for stretched positions."""
    with extra("gguf", "reading a GGUF file"):
        from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not a GGUF file: {error}") from error
    stretched = [tensor.name for tensor in reader.tensors if tensor.name.startswith(_STRETCHED)]
    stretched += [name for name, field in reader.fields.items() if _scales_positions(name, field)]
    if stretched:
        raise ModelError(
            f"{path} stretches its positions ({stretched[0]}), which would be lost in de-quantising",
            hint="load this model by its hub id or from a directory of safetensors",
        )
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    return _KEPT[kinds.pop()] if len(kinds) == 1 and kinds <= _KEPT.keys() else torch.bfloat16


def _scales_positions(name: str, field: Any) -> bool:
    if name.endswith(".rope.scaling.type"):
        return field.contents() != "none"
    return name.endswith((".rope.scaling.factor", ".rope.scale_linear")) and float(field.contents()) != 1.0


def _write(path: Path, directory: Path, dtype: torch.dtype, origin: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _bars_on_a_terminal():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
            model: Any = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=dtype, local_files_only=True
            )
    except OSError:
        raise
    except Exception as error:  # readers raise nearly anything for a family or a tokenizer that they do not know
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"the model in {path} cannot be mapped: {reason}", hint="load it by its hub id") from error
    # De-quantised, it is an ordinary model; saving refuses while it still says that it is quantised.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = origin
    with _bars_on_a_terminal():
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for file in directory.iterdir():
        file.chmod(0o644)


@contextmanager
def _bars_on_a_terminal() -> Iterator[None]:
    """Let the library show its progress where it can be seen; beside our own bar, or in a file, it would be noise."""
    shown = sys.stderr.isatty() and not isinstance(sys.stderr, FileProxy)
    with nullcontext() if shown else redirect_stderr(io.StringIO()):
        yield
