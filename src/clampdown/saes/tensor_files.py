"""Tensors of a file, mapped into memory instead of read: a page of the file is read when one of its numbers is.

Serving one feature needs one decoder row and one encoder column. The usual encoder is stored [d_in, d_sae] row by row,
so a column is one number in every row. Mapped with the kernel's default read-ahead, a cold 65,536 x 4,096 encoder in
16 bit is read whole for one column (528 MB measured, 0.35-0.47 s); told that access is random, it is one page a row
(16 MB, 0.18 s). A whole file is read faster the default way, so the caller says which it will be.

Nothing mapped may outlive loading: a mapped file that somebody rewrites in place ends the process. Pickles are never
executed: `torch.load` gets `weights_only=True`, numpy `allow_pickle=False`.
"""

from __future__ import annotations

import itertools
import math
import mmap
import pickle
import struct
import warnings
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from clampdown.documents import parse_json
from clampdown.errors import CheckpointError, PickleCheckpointError, translated

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}
_NUMPY_DTYPES = {"<f4": torch.float32, "<f8": torch.float64, "<f2": torch.float16, "<i8": torch.int64}
_MAX_HEADER = 100_000_000  # as the safetensors format allows
_ZIP_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


class _Mapped:
    """A file as one copy-on-write memory map (torch refuses read-only buffers without a warning)."""

    def __init__(self, path: Path, few: bool) -> None:
        with _opened(path) as handle:
            self._map = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        if few and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_RANDOM)

    def tensor(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start).view(shape)


def _opened(path: Path) -> IO[bytes]:
    try:
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path} is empty")
        return path.open("rb")
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def map_safetensors(path: Path, few: bool) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, mapped. `few`: only a few numbers of it will be read.

    Raises `CheckpointError` for anything malformed.
    """
    with _opened(path) as handle:
        size = path.stat().st_size
        length = int.from_bytes(handle.read(8), "little")
        if not 0 < length <= min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{path} is not a safetensors file")
        header = handle.read(length)
    try:
        entries: dict[str, Any] = parse_json(header, f"the header of {path}", CheckpointError)
        entries.pop("__metadata__", None)
        _check_apart(entries)
        mapped = _Mapped(path, few)
        return {name: _entry(mapped, entry, 8 + length, size) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def _entry(mapped: _Mapped, entry: dict[str, Any], base: int, size: int) -> Tensor:
    """One tensor of a safetensors header; `ValueError` when its place and its shape do not agree."""
    dtype, shape = _SAFETENSORS_DTYPES[entry["dtype"]], tuple(map(_whole, entry["shape"]))
    start, end = (base + _whole(offset) for offset in entry["data_offsets"])
    if not base <= start <= end <= size or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor lies outside the file")
    return mapped.tensor(start, dtype, shape)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{str(value)[:40]} is no size and no place")
    return value


def _check_apart(entries: dict[str, Any]) -> None:
    """Tensors that share bytes would both follow an edit of one."""
    places = sorted((*map(_whole, entry["data_offsets"]), name) for name, entry in entries.items())
    for (_, end, name), (start, _, other) in itertools.pairwise(places):
        if start < end:
            raise ValueError(f"'{name}' and '{other}' overlap")


def map_npz(path: Path, few: bool) -> dict[str, Tensor]:
    """Every array of an `.npz`: mapped when stored plainly (as `np.savez` does), read when compressed.

    Raises `CheckpointError` for anything malformed, `PickleCheckpointError` for arrays of objects.
    """
    with translated(CheckpointError, f"{path} is not an .npz file"), ExitStack() as opened:
        handle = opened.enter_context(_opened(path))
        archive = opened.enter_context(zipfile.ZipFile(handle))
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("it holds two arrays of one name")
        mapped = _Mapped(path, few)
        return {name: _array(handle, archive, info, mapped) for name, info in members.items()}


def _array(handle: IO[bytes], archive: zipfile.ZipFile, info: zipfile.ZipInfo, mapped: _Mapped) -> Tensor:
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        data_offset = stream.tell()
    if dtype.hasobject:
        raise PickleCheckpointError(f"'{info.filename}' holds pickled objects: reading them would run code")
    if info.compress_type != zipfile.ZIP_STORED or fortran or dtype.str not in _NUMPY_DTYPES:
        with archive.open(info) as stream:
            return torch.from_numpy(np.lib.format.read_array(stream, allow_pickle=False))
    handle.seek(info.header_offset)
    *_, name_length, extra_length = _ZIP_LOCAL_HEADER.unpack(handle.read(_ZIP_LOCAL_HEADER.size))
    start = info.header_offset + _ZIP_LOCAL_HEADER.size + name_length + extra_length + data_offset
    return mapped.tensor(start, _NUMPY_DTYPES[dtype.str], tuple(shape))


def load_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a `torch.save` file, mapped where its format allows, without executing anything in it.

    Raises `PickleCheckpointError` when it holds more than tensors and plain values.
    """
    with _opened(path):
        pass
    with translated(CheckpointError, f"{path} is not a file of tensors"), warnings.catch_warnings():
        # Of a plain pickle's protocol, just before it is refused.
        warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise PickleCheckpointError(
                f"{path} holds more than tensors: reading it would run code from the file",
                hint="convert it to safetensors once, where you trust it",
            ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, expected named tensors")
    numbers = {name: torch.tensor(value) for name, value in loaded.items() if isinstance(value, int | float)}
    named = {str(name): value for name, value in {**loaded, **numbers}.items() if isinstance(value, Tensor)}
    if len(named) < len(loaded):
        others = sorted(str(name)[:60] for name in loaded if str(name) not in named)
        raise CheckpointError(f"{path} holds more than tensors: {', '.join(others[:8])}", hint="they are not read here")
    return named
