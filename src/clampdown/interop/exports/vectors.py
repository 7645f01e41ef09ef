"""Files of one vector per layer: control vectors of llama.cpp and repeng (GGUF), and CAST's `.svec` (JSON).

`direction.L` of a GGUF file is added to the output of block L. Block 0 is out of reach: llama.cpp counts from 1. CAST
adds the vector of layer L to the block's input, which is the output of the block before it, and never to the last
block's output. Both add to every token, also to the first one. The strength is in the vectors: whoever loads them
scales them by 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.documents import read_object
from clampdown.errors import SteeringFileError, translated
from clampdown.extras import extra
from clampdown.interop.exports.forms import Bound, Words, offsets, output_of
from clampdown.models.loading import LanguageModel
from clampdown.store import write_atomic
from clampdown.types import Point, Site

ADDED = frozenset({"add", "add_direction"})
ARCHITECTURE = "controlvector"
_LARGEST = 1 << 30
"""Bytes of a control vector: 1,000 layers of 100,000 numbers are 0.4 GB."""

Directions = dict[Site, Float[Tensor, " d_model"]]


# ---- GGUF --------------------------------------------------------------------------------------------------------


def _no_place_in_gguf(site: Site, _lm: LanguageModel) -> str | None:
    block = output_of(site)
    if block is None:
        return "a control vector is added to the output of a block, and this site is not one"
    return "llama.cpp's control vectors begin at block 1" if block == 0 else None


CONTROL_VECTOR = Words(ADDED, place=_no_place_in_gguf)


def write_control_vector(bound: Bound, path: Path) -> None:
    """Write a control vector as repeng and llama.cpp read it. Raises `MissingPackageError` without the package gguf."""
    gguf = _gguf()
    directions: dict[int, Tensor] = {}
    for site, vector in offsets(bound).items():
        block = output_of(site)
        assert block is not None, site
        directions[block] = directions.get(block, torch.zeros_like(vector)) + vector
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", str(bound.lm.model.config.model_type))
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
    for block in sorted(directions):
        writer.add_tensor(f"direction.{block}", directions[block].float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_control_vector(path: Path) -> Directions:
    """The directions of a control vector. Raises `SteeringFileError`."""
    gguf = _gguf()
    _refuse_large(path)
    with translated(SteeringFileError, f"{path} is not a GGUF file"):
        reader = gguf.GGUFReader(path)
        field = reader.get_field("general.architecture")
        architecture = None if field is None else field.contents()
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        if architecture != ARCHITECTURE:
            raise SteeringFileError(f"{path} is no control vector: its architecture is {architecture!r}")
        found: Directions = {}
        for name, tensor in tensors.items():
            block = name.removeprefix("direction.")
            if block == name or not block.isdecimal() or tensor.tensor_type.name != "F32" or len(tensor.shape) != 1:
                raise SteeringFileError(f"{path}: '{name[:60]}' is not a direction: one float32 vector a block")
            found[Site(int(block))] = torch.from_numpy(tensor.data.copy())
    return found


def _gguf():  # noqa: ANN202 - a module
    with extra("gguf", "a control vector"):
        import gguf

    return gguf


def _refuse_large(path: Path) -> None:
    if not path.is_file():
        raise SteeringFileError(f"cannot read {path}: no such file")
    if path.stat().st_size > _LARGEST:
        raise SteeringFileError(f"{path} is larger than any control vector")


# ---- .svec -------------------------------------------------------------------------------------------------------


def _input_of(site: Site) -> int | None:
    """The block whose input a site is; None for sites inside a block."""
    if site.point is Point.RESID_PRE:
        return site.layer
    return site.layer + 1 if site.point is Point.RESID_POST else None


def _no_place_in_svec(site: Site, lm: LanguageModel) -> str | None:
    block = _input_of(site)
    if block is None:
        return "CAST adds to the input of a block, and this site is not one"
    return "CAST adds to the input of a block, and no block follows this site" if block >= lm.n_layers else None


SVEC = Words(ADDED, place=_no_place_in_svec)


def write_svec(bound: Bound, path: Path) -> None:
    """Write CAST's behaviour vector."""
    directions: dict[int, Tensor] = {}
    for site, vector in offsets(bound).items():
        block = _input_of(site)
        assert block is not None, site
        directions[block] = directions.get(block, torch.zeros_like(vector)) + vector
    content = {
        "model_type": str(bound.lm.model.config.model_type),
        "directions": {str(block): directions[block].tolist() for block in sorted(directions)},
        "explained_variances": {str(block): 1.0 for block in sorted(directions)},
    }
    write_atomic(path, json.dumps(content))


def read_svec(path: Path) -> Directions:
    """The directions of a `.svec` file. Raises `SteeringFileError`."""
    content = read_object(path, SteeringFileError)
    directions = content.get("directions")
    if not isinstance(directions, Mapping) or not directions:
        raise SteeringFileError(f"{path} is no .svec file: it has no `directions`")
    return {_input_site(path, key): _vector(path, key, value) for key, value in directions.items()}


def _input_site(path: Path, key: str) -> Site:
    if not key.isdecimal():
        raise SteeringFileError(f"{path}: '{key[:60]}' is not the number of a layer")
    return Site(int(key), Point.RESID_PRE)


def _vector(path: Path, key: str, value: object) -> Float[Tensor, " d_model"]:
    if not isinstance(value, list) or not value or not all(type(one) in (int, float) for one in value):
        raise SteeringFileError(f"{path}: the direction of layer {key} is not a list of numbers")
    return torch.tensor(value, dtype=torch.float32)
