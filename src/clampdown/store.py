"""Files between the stages: atomic writes, append-only records, and the resume key.

1. A run directory holds `manifest.json` (schema, resume key, what was run), `replies.jsonl` and `records.jsonl`.
2. A row is one line, written whole. A kill can only cut the last line; on opening, a cut last line is dropped, so
   nothing is lost but the work that was in flight. Replies are written before they are judged: a judge that dies
   leaves replies waiting, and the next run judges them without generating anything again.
3. The resume key is a hash of everything that could change a result. A directory made with another key is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import struct
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from io import FileIO
from pathlib import Path
from typing import Any, Generic, TypeVar

from clampdown.documents import from_json, parse_json, parse_rows, read_json, read_lines, read_object, row_of
from clampdown.errors import FeatureSetError, StoreError
from clampdown.types import (
    FeatureScore,
    FeatureSet,
    OptionChoice,
    Prompt,
    Provenance,
    Record,
    ScoreColumns,
    ScoreSource,
    StoredReply,
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


Key = tuple[str, str, str]
Row = TypeVar("Row", Record, StoredReply, OptionChoice)
T = TypeVar("T")


def key_of(row: Record | StoredReply | OptionChoice) -> Key:
    """What tells rows of a run apart: (arm, suite, prompt id)."""
    return (row.arm, row.suite, row.prompt_id)


def recover(path: Path, parse: Callable[[Any], T], what: str) -> list[T]:
    """The rows of an append-only file that this run goes on writing; a half-written last line is cut off it.

    Only what a kill leaves is cut: the beginning of an object, behind rows of this kind, in a file of this run alone.
    Raises `StoreError` for anything else, and leaves the file as it is.
    """
    if not path.exists():
        return []
    lines = read_lines(path)
    rows = list(parse_rows(path, lines.whole, parse, what))
    if lines.cut:
        if not lines.cut.startswith(b"{") or path.is_symlink() or path.stat().st_nlink > 1:
            raise StoreError(
                f"{path} ends in the middle of a line that this run did not write, or under another name as well",
                hint="move it away, or put a copy in its place",
            )
        os.truncate(path, sum(len(line) + 1 for line in lines.whole))
    return rows


def _keyed(path: Path, rows: Sequence[Row], what: str) -> dict[Key, Row]:
    """Rows by their key. A row that was written twice counts once; two that differ are an error."""
    found: dict[Key, Row] = {}
    for number, row in enumerate(rows, 1):
        if found.setdefault(key_of(row), row) != row:
            raise StoreError(f"{path} line {number} is {what} of {' '.join(key_of(row))} again, and another one")
    return found


class AppendLog(Generic[Row]):
    """An append-only JSON Lines file that holds each key once. A kill at any byte costs the line in flight only."""

    def __init__(self, path: Path, kind: type[Row], what: str) -> None:
        self.path = path
        self._rows = _keyed(path, recover(path, row_of(kind), what), what)
        self._opened: FileIO | None = None

    @property
    def _handle(self) -> FileIO:
        """Opened by the first write. Unbuffered: what a full disk refused must not linger and be written later."""
        if self._opened is None:
            self._opened = open_appending(self.path)
        return self._opened

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def __getitem__(self, key: Key) -> Row:
        return self._rows[key]

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(self._rows.values())

    def append(self, rows: Sequence[Row], *, sync: bool = True) -> None:
        """Write rows that are not there yet. With `sync`, wait until they are on disk: a written line survives a kill
        of the process, a synced one a loss of power."""
        keyed = {key_of(row): row for row in reversed(rows)}
        fresh = {key: keyed[key] for key in reversed(keyed) if key not in self._rows}
        append_rows(self._handle, self.path, list(fresh.values()), sync=sync)
        self._rows.update(fresh)

    def sync(self) -> None:
        """Wait until everything written is on disk."""
        try:
            os.fsync(self._handle.fileno())
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()


def append_rows(handle: FileIO, path: Path, rows: Sequence[Any], *, sync: bool = True) -> None:
    """Write rows behind what the file holds, each a line, and with `sync` wait until they are on disk. Raises
    `StoreError`; then none of them is there."""
    lines = "".join(json.dumps(to_jsonable(row), ensure_ascii=False) + "\n" for row in rows).encode()
    before = path.stat().st_size
    try:
        while lines:
            lines = lines[handle.write(lines) :]
        if sync:
            os.fsync(handle.fileno())
    except OSError as error:
        os.ftruncate(handle.fileno(), before)
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"cannot write {path}: {error.strerror or error}",
        hint="what was written before is kept; make room and repeat the command",
    )


def open_appending(path: Path) -> FileIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab", buffering=0)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error


class RecordLog:
    """The append-only logs of one run directory, resumable after a kill at any moment: `replies.jsonl`, what arms
    answered, `records.jsonl`, what was judged of it, and `choices.jsonl`, multiple choice by likelihood.

    One process at a time may hold a directory: two would both do the same rows.
    """

    def __init__(self, directory: Path, key: Any) -> None:
        """Open or create. `key` is everything that could change a result; another key's directory is refused."""
        self.directory = directory
        self._lock = locked(directory)
        try:
            claim(directory / "manifest.json", key)
            self._judged = AppendLog(directory / "records.jsonl", Record, "a record")
            self.replies = AppendLog(directory / "replies.jsonl", StoredReply, "a reply")
            self.choices = AppendLog(directory / "choices.jsonl", OptionChoice, "a choice")
            self._judged.append([])  # a run without records yet is a run
        except BaseException:
            self._lock.close()
            raise

    @property
    def path(self) -> Path:
        return self._judged.path

    def __contains__(self, key: Key) -> bool:
        """Whether this row is judged."""
        return key in self._judged

    @property
    def records(self) -> tuple[Record, ...]:
        return self._judged.rows

    @property
    def waiting(self) -> tuple[StoredReply, ...]:
        """Replies that no judge has judged yet, oldest first."""
        return tuple(reply for reply in self.replies.rows if key_of(reply) not in self._judged)

    def append(self, records: Sequence[Record], *, sync: bool = True) -> None:
        """Write records that are not there yet; see `AppendLog.append`."""
        self._judged.append(records, sync=sync)

    def sync(self) -> None:
        """Wait until every record is on disk."""
        self._judged.sync()

    def close(self) -> None:
        self._judged.close()
        self.replies.close()
        self.choices.close()
        self._lock.close()

    def __enter__(self) -> RecordLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def claim(manifest: Path, key: Any) -> None:
    """Say in a file what a directory holds. `key` is everything that could change a result; another key is refused."""
    digest = content_hash(key)
    if manifest.exists():
        found = read_object(manifest)
        if found.get("schema") != SCHEMA or found.get("resume_key") != digest:
            raise StoreError(
                f"{manifest.parent} holds another run: {what_differs(found.get('key'), to_jsonable(key))}",
                hint="choose an empty --out directory, or repeat the exact command to resume",
            )
    else:
        write_json(manifest, {"schema": SCHEMA, "resume_key": digest, "key": key})


def locked(directory: Path) -> FileIO:
    """An open file whose lock ends with the process, however that ends."""
    handle = open_appending(directory / ".lock")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.close()
        raise StoreError(
            f"another process is writing to {directory}", hint="wait for it to end, or choose another --out"
        ) from error
    return handle


def what_differs(found: Any, wanted: Any) -> str:
    """The parts of two resume keys that are not equal, for a message."""
    if not isinstance(found, Mapping) or not isinstance(wanted, Mapping):
        return "made with other settings"
    parts = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    return f"its {', '.join(parts)} differ" if parts else "its resume key differs"


def read_records(path: Path) -> tuple[Record, ...]:
    """The records of a file, for reports: those that `RecordLog` would have. A cut last line is ignored."""
    rows = parse_rows(path, read_lines(path).whole, row_of(Record), "a record")
    return tuple(_keyed(path, list(rows), "a record").values())


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
            tuple(from_json(FeatureScore, row) for row in raw["features"]),
            from_json(Provenance, raw["provenance"]),
            raw["settings"],
            _read_columns(path, raw["columns"]) if with_columns and raw["columns"] else ScoreColumns(),
            {name: from_json(ScoreSource, row) for name, row in raw["sources"].items()},
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
    header = parse_json(payload[8 : 8 + length], "the header of the scores", FeatureSetError)
    body = memoryview(payload)[8 + length :]
    columns = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if entry["dtype"] != "F64" or not 0 <= begin <= end <= len(body):
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
