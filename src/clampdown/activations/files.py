"""Files of a pass: who may use a directory, shards, and the matrices made of them.

    DIR/manifest.json               schema, resume key, and what was asked for
    DIR/prompts.jsonl               the prompts, one per line, in the order of all rows
    DIR/shards/000123.safetensors   one batch each, while the pass runs
    DIR/matrices/*.npy              the result: data, indices and indptr of each sparse series, one array per dense one

A shard is written whole or not at all, so a kill at any moment costs the batch in flight. When all are there, their
rows are put into prompt order as plain arrays, the directory appears in one rename, and the shards are deleted. The
batches depend on the resume key alone: an interrupted pass, one that was split over machines and one in a single go
write the same bytes (with the same number of threads, which can change the last bit of a product).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from scipy.sparse import csr_array

from clampdown.activations.stream import Pass, Series, Shard
from clampdown.documents import parse_rows, read_json, read_lines, row_of
from clampdown.errors import StoreError
from clampdown.store import content_hash, to_jsonable, what_differs, write_atomic, write_json
from clampdown.types import Prompt

SCHEMA, KIND = 1, "activations"


def claim(job: Pass, directory: Path) -> None:
    """Make the directory this pass's own. Raises `StoreError` when it belongs to another."""
    digest = content_hash(job.key)
    if (directory / "manifest.json").exists():
        if read_manifest(directory)["resume_key"] != digest:
            raise StoreError(
                f"{directory} holds another pass (other model, SAE, prompts, template or poolings)",
                hint="choose an empty directory, or repeat the exact command to resume",
            )
        return
    lines = [json.dumps(to_jsonable(prompt), ensure_ascii=False) + "\n" for prompt in job.prompts]
    write_atomic(directory / "prompts.jsonl", "".join(lines))
    widths = {r.name: (r.sae.cfg.d_sae if r.sae else 0) for r in job.readings}
    head = {"schema": SCHEMA, "kind": KIND, "resume_key": digest, "n_prompts": len(job.prompts)}
    series = [{"series": s, "d_sae": widths[s.reading]} for s in job.series]
    write_json(directory / "manifest.json", {**head, "series": series, "key": job.key})


def is_finished(directory: Path) -> bool:
    return (directory / "matrices").is_dir()


def shard_path(directory: Path, number: int) -> Path:
    return directory / "shards" / f"{number:06d}.safetensors"


def missing_shards(directory: Path, batches: int) -> list[int]:
    """Which of so many batches are not on disk yet."""
    return [number for number in range(batches) if not shard_path(directory, number).exists()]


def write_shard(job: Pass, directory: Path, number: int, shard: Shard) -> None:
    """Write one batch's results, whole or not at all."""
    tensors: dict[str, np.ndarray] = {"rows": shard.rows}
    for i, series in enumerate(job.series):
        if series.kind == "dense":
            tensors[f"{i}.dense"] = np.ascontiguousarray(shard.dense[series])
        else:
            values = shard.features[series]
            tensors |= {f"{i}.data": values.data, f"{i}.indices": values.indices, f"{i}.indptr": values.indptr}
    write_atomic(shard_path(directory, number), save(tensors))


def finish(directory: Path, batches: int) -> None:
    """Put the rows of all shards into prompt order, as arrays that can be mapped, and delete the shards. The manifest
    says what they hold: no model is needed."""
    manifest = read_manifest(directory)
    partial = directory / "matrices.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        shards = [shard_path(directory, number) for number in range(batches)]
        for i, row in enumerate(manifest["series"]):
            gather = _gather_dense if row["series"]["kind"] == "dense" else _gather_sparse
            gather(shards, partial, i, manifest["n_prompts"])
        os.replace(partial, directory / "matrices")
    except OSError as error:
        raise StoreError(f"cannot write {partial}: {error.strerror or error}") from error
    shutil.rmtree(directory / "shards", ignore_errors=True)


def _gather_sparse(shards: Sequence[Path], files: Path, i: int, n_prompts: int) -> None:
    counts = np.zeros(n_prompts, dtype=np.int64)
    for path in shards:
        counts[_load(path, "rows")] = np.diff(_load(path, f"{i}.indptr"))
    starts = np.concatenate([[0], np.cumsum(counts)])
    # scipy wants both index arrays of one type, and copies when they differ.
    index = np.int32 if starts[-1] < 2**31 else np.int64
    np.save(files / f"{i}.indptr.npy", starts.astype(index))
    data = _create(files / f"{i}.data.npy", np.float32, (int(starts[-1]),))
    indices = _create(files / f"{i}.indices.npy", index, (int(starts[-1]),))
    for path in shards:
        rows, local = _load(path, "rows"), _load(path, f"{i}.indptr")
        places = np.repeat(starts[rows] - local[:-1], np.diff(local)) + np.arange(local[-1])
        data[places], indices[places] = _load(path, f"{i}.data"), _load(path, f"{i}.indices")
    data.flush()
    indices.flush()


def _gather_dense(shards: Sequence[Path], files: Path, i: int, n_prompts: int) -> None:
    width = _load(shards[0], f"{i}.dense").shape[1]
    values = _create(files / f"{i}.dense.npy", np.float32, (n_prompts, width))
    for path in shards:
        values[_load(path, "rows")] = _load(path, f"{i}.dense")
    values.flush()


def _create(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """A new array file, mapped for writing. An empty one cannot be mapped; one entry stands in, and is never read."""
    return open_memmap(path, mode="w+", dtype=dtype, shape=(max(shape[0], 1), *shape[1:]))


def _load(path: Path, name: str) -> np.ndarray:
    try:
        with safe_open(path, framework="numpy") as tensors:
            return tensors.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} is damaged: {error}", hint="delete it and repeat the command") from error


def _map(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise StoreError(f"cannot read {path}: {error}") from error


def open_series(directory: Path, i: int, series: Series, d_sae: int) -> csr_array | np.ndarray:
    """One result of a finished pass, mapped: sparse for features, an array for residuals."""
    files = directory / "matrices"
    if series.kind == "dense":
        return _map(files / f"{i}.dense.npy")
    starts = np.asarray(_map(files / f"{i}.indptr.npy"))
    stop = int(starts[-1])
    data, indices = (_map(files / f"{i}.{part}.npy")[:stop] for part in ("data", "indices"))
    return csr_array((data, indices, starts), shape=(len(starts) - 1, d_sae), copy=False)


def take_over(part: Path, directory: Path, numbers: Iterable[int]) -> None:
    """Copy a part's batches into a directory of the same pass, with its manifest and prompts. Raises `StoreError`."""
    theirs = read_manifest(part)
    if (directory / "manifest.json").exists():
        ours = read_manifest(directory)
        if ours["resume_key"] != theirs["resume_key"]:
            raise StoreError(
                f"{part} holds another pass than {directory}: {what_differs(ours['key'], theirs['key'])}",
                hint="parts of one pass come from one command on one kind of device",
            )
    for name in ("prompts.jsonl", "manifest.json"):
        if not (directory / name).exists():
            write_atomic(directory / name, _bytes(part / name))
    for number in numbers:
        if shard_path(part, number).exists():
            write_atomic(shard_path(directory, number), _bytes(shard_path(part, number)))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from error


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a pass. Raises `StoreError` for anything else."""
    manifest = read_json(directory / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND or manifest.get("schema") != SCHEMA:
        raise StoreError(f"{directory} does not hold a pass of schema {SCHEMA}")
    return manifest


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a pass. Raises `StoreError`."""
    lines = [line for line in read_lines(path).whole if line]
    return tuple(parse_rows(path, lines, row_of(Prompt), "a prompt"))
