"""Files between the stages: atomic writes, append-only records, and the resume key.

1. A run directory holds `manifest.json` (schema, resume key, what was run) and `records.jsonl`.
2. A record is one line, written whole and flushed to disk before the next is computed. A kill can only cut the
   last line; on opening, a cut last line is dropped, so nothing is lost but the work that was in flight.
3. The resume key is a hash of everything that could change a result. A directory made with another key is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import struct
import sys
import tempfile
from array import array
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from clampdown.errors import FeatureSetError, StoreError
from clampdown.types import (
    FeatureScore,
    FeatureSet,
    Prompt,
    Provenance,
    Receipt,
    Record,
    ScoreColumns,
    ScoreSource,
    Split,
    Verdict,
)

SCHEMA = 1
FEATURES_SCHEMA = 2


def to_jsonable(value: Any) -> Any:
    """Dataclasses, enums, paths and mappings as plain JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((to_jsonable(item) for item in value), key=json.dumps)
    if isinstance(value, list | tuple):
        return [to_jsonable(item) for item in value]
    return value


def content_hash(value: Any) -> str:
    """Short stable hash of any value that `to_jsonable` can express."""
    canonical = json.dumps(to_jsonable(value), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def prompts_hash(prompts: Iterable[Prompt]) -> str:
    """Hash of prompts with their ground truth, in order."""
    return content_hash(list(prompts))


_BLOCK, _SAMPLES = 1 << 20, 64


def files_revision(paths: Iterable[Path]) -> str:
    """Short hash of files' names and contents; files that do not exist are skipped.

    Files above 64 MiB are sampled (their size and 64 evenly spaced blocks of 1 MiB, the first and last among them), so
    that naming a 16 GB checkpoint takes a second instead of a minute.
    """
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}:".encode())
            with path.open("rb") as handle:
                for position in _samples(size):
                    handle.seek(position)
                    digest.update(handle.read(_BLOCK))
    return digest.hexdigest()[:16]


def _samples(size: int) -> Iterable[int]:
    """Where to read blocks of a file: all of it when it is small."""
    if size <= _BLOCK * _SAMPLES:
        return range(0, size, _BLOCK)
    return [(size - _BLOCK) * i // (_SAMPLES - 1) for i in range(_SAMPLES)]


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never half. Raises `StoreError`."""
    payload = data.encode() if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(payload)
                handle.flush()
                os.fsync(handle.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(to_jsonable(value), indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file. Raises `StoreError` naming the file and line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is not JSON: {error}") from error


def record_from_json(row: Mapping[str, Any]) -> Record:
    receipt = row.get("receipt")
    return Record(
        **{
            **row,
            "split": Split(row["split"]),
            "verdict": Verdict(row["verdict"]),
            "receipt": Receipt(**receipt) if receipt else None,
        }
    )


class RecordLog:
    """Append-only `records.jsonl` of one run directory, resumable after a kill at any moment."""

    def __init__(self, directory: Path, key: Any) -> None:
        """Open or create. `key` is everything that could change a result; another key's directory is refused."""
        self.directory = directory
        self.path = directory / "records.jsonl"
        self._claim(directory / "manifest.json", key)
        self._records = {(r.arm, r.suite, r.prompt_id): r for r in self._recover()}
        # Unbuffered: what a full disk refused must not linger in a buffer and be written by a later call.
        self._handle = self.path.open("ab", buffering=0)

    def _claim(self, manifest: Path, key: Any) -> None:
        digest = content_hash(key)
        if manifest.exists():
            found = read_json(manifest)
            if found.get("schema") != SCHEMA or found.get("resume_key") != digest:
                raise StoreError(
                    f"{self.directory} holds another run (other model, prompts, arms or settings)",
                    hint="choose an empty --out directory, or repeat the exact command to resume",
                )
        else:
            write_json(manifest, {"schema": SCHEMA, "resume_key": digest, "key": key})

    def _recover(self) -> Iterable[Record]:
        """Parse what is there; cut a half-written last line off the file."""
        if not self.path.exists():
            return []
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) != len(raw):
            with self.path.open("r+b") as handle:
                handle.truncate(len(whole))
        return [self._parse(number, line) for number, line in enumerate(whole.split(b"\n")[:-1], 1)]

    def _parse(self, number: int, line: bytes) -> Record:
        try:
            return record_from_json(json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{self.path} line {number} is not a record: {error}") from error

    def __contains__(self, key: tuple[str, str, str]) -> bool:
        return key in self._records

    @property
    def records(self) -> tuple[Record, ...]:
        return tuple(self._records.values())

    def append(self, records: Sequence[Record]) -> None:
        """Write records that are not there yet, and wait until they are on disk."""
        keyed = {(r.arm, r.suite, r.prompt_id): r for r in reversed(records)}
        fresh = {key: keyed[key] for key in reversed(keyed) if key not in self._records}
        lines = "".join(json.dumps(to_jsonable(r), ensure_ascii=False) + "\n" for r in fresh.values()).encode()
        before = self.path.stat().st_size
        try:
            while lines:
                lines = lines[self._handle.write(lines) :]
            os.fsync(self._handle.fileno())
        except OSError as error:
            os.ftruncate(self._handle.fileno(), before)
            raise StoreError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._records.update(fresh)

    def close(self) -> None:
        self._handle.close()

    def __enter__(self) -> RecordLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_records(path: Path) -> tuple[Record, ...]:
    """All whole records of a file, for reports. A cut last line is ignored."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return tuple(record_from_json(json.loads(line)) for line in lines)
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is not a file of records: {error}") from error


def write_feature_set(path: Path, found: FeatureSet) -> None:
    """Write `STEM.json` (what was kept, and provenance) and, when there are columns, `STEM.HASH.safetensors` beside it.

    The columns' file is named by its content and written first, so whatever interrupts this, the JSON file that readers
    find names columns that are there. Columns that it no longer names are removed.
    """
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.name != "columns"}
    payload = pack_columns(found.columns)
    name = f"{path.stem}.{hashlib.sha256(payload).hexdigest()[:16]}.safetensors" if found.columns else None
    if name:
        write_atomic(path.with_name(name), payload)
    write_json(path, {"schema": FEATURES_SCHEMA, "kind": "feature_set", "columns": name, **to_jsonable(fields)})
    for other in path.parent.iterdir():
        if other.name != name and re.fullmatch(rf"{re.escape(path.stem)}\.[0-9a-f]{{16}}\.safetensors", other.name):
            other.unlink(missing_ok=True)


def read_feature_set(path: Path, *, with_columns: bool = True) -> FeatureSet:
    """Read what `write_feature_set` wrote; `with_columns=False` leaves the scores of all other features out.

    Raises `FeatureSetError` for other files, other schema versions, and columns that are missing or were changed.
    """
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("kind") != "feature_set":
        raise FeatureSetError(f"{path} is not a feature set")
    if raw.get("schema") != FEATURES_SCHEMA:
        raise FeatureSetError(
            f"{path} is a feature set of schema {raw.get('schema')}, this clampdown reads {FEATURES_SCHEMA}",
            hint="run `clampdown discover` again",
        )
    try:
        return FeatureSet(
            raw["finder"],
            raw["site"],
            raw["ranked_by"],
            tuple(_feature_score(row) for row in raw["features"]),
            Provenance(**raw["provenance"]),
            raw["settings"],
            _read_columns(path, raw["columns"]) if with_columns and raw["columns"] else ScoreColumns(),
            {name: _score_source(row) for name, row in raw["sources"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FeatureSetError(f"{path} is not a feature set: {error!r}") from error


def _read_columns(path: Path, name: str) -> ScoreColumns:
    file = path.parent / Path(name).name
    try:
        payload = file.read_bytes()
    except OSError as error:
        raise FeatureSetError(
            f"cannot read {file}, the scores that {path} names: {error.strerror or error}",
            hint="move both files together, or run `clampdown discover` again",
        ) from error
    if hashlib.sha256(payload).hexdigest()[:16] not in file.name:
        raise FeatureSetError(f"{file} was changed after it was written", hint="run `clampdown discover` again")
    return unpack_columns(payload)


def pack_columns(columns: ScoreColumns) -> bytes:
    """The columns in the safetensors format: the header's length (u64), a JSON header, then little-endian float64."""
    width = columns.n_features * 8
    header = {
        name: {"dtype": "F64", "shape": [columns.n_features], "data_offsets": [i * width, (i + 1) * width]}
        for i, name in enumerate(columns)
    }
    encoded = json.dumps(header, ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return b"".join((struct.pack("<Q", len(encoded)), encoded, *(_swapped(a).tobytes() for a in columns.values())))


def unpack_columns(payload: bytes) -> ScoreColumns:
    """What `pack_columns` packed. Raises `ValueError` for anything else."""
    if len(payload) < 8:
        raise ValueError("the file of scores is cut off")
    (length,) = struct.unpack("<Q", payload[:8])
    header, body = json.loads(payload[8 : 8 + length]), memoryview(payload)[8 + length :]
    columns = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] != "F64" or end > len(body):
            raise ValueError(f"scores '{name}' are not float64, or cut off")
        columns[name] = _swapped(array("d", body[begin:end].tobytes()))
    return ScoreColumns(columns)


def _swapped(values: array) -> array:
    """Native to little-endian order and back: the same array on nearly every machine."""
    if sys.byteorder == "little":
        return values
    copy = array("d", values)
    copy.byteswap()
    return copy


def _score_source(row: Mapping[str, Any]) -> ScoreSource:
    return ScoreSource(**{**row, "provenance": Provenance(**row["provenance"])})


def _feature_score(row: Mapping[str, Any]) -> FeatureScore:
    return FeatureScore(
        row["feature"],
        row["scores"],
        tuple(row["top_prompts"]),
        tuple(row["promoted_tokens"]),
        tuple(row["demoted_tokens"]),
    )
