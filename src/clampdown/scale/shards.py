"""Shards: which part of a command's batches a machine does, and the file that says so beside the results.

1. The unit is the batch. How a job is cut into batches depends on the job alone, so that a batch gives the same numbers
   on whichever machine of a kind it runs. Shard i of n does the batches i, i + n, i + 2n, ...: they come longest first,
   so that every shard gets long ones and short ones.
2. A shard's directory is one that an interrupted run of the whole command would leave, with `shard.json` beside it.
3. Directories are merged only when they are all shards of one command, each there once, and each finished.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clampdown.documents import from_json, read_object
from clampdown.errors import ShardError, StoreError
from clampdown.store import content_hash, to_jsonable, what_differs, write_json

SCHEMA, FILE, PARTS = 1, "shard.json", "shards"
"""`PARTS`: the folder of a run's directory in which its shards lie."""
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Shard:
    """Number `index` (from 0) of `count`. Raises `ShardError`."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ShardError(
                f"there is no shard {self.index}/{self.count}",
                hint=f"shards count from 0: 0/{self.count} to {self.count - 1}/{self.count}"
                if self.count > 0
                else "INDEX/COUNT, such as 0/16",
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`3/16`. Raises `ShardError`."""
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
        if found is None:
            raise ShardError(f"'{text}' is not a shard", hint="INDEX/COUNT, counted from 0, such as 0/16")
        return cls(int(found[1]), int(found[2]))

    def of(self, units: int) -> range:
        """Which of so many batches are this shard's."""
        return range(self.index, units, self.count)

    def directory(self, out: Path) -> Path:
        """Where this shard of a run lies."""
        return out / PARTS / f"{self.index}-of-{self.count}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True, slots=True)
class ShardFile:
    """`shard.json`: which shard of which command a directory holds. `key` is everything that could change a result,
    `units` how many batches of each kind the whole command has, `command` how it was asked for, without the shard."""

    kind: str
    shard: Shard
    key: dict[str, Any]
    units: dict[str, int]
    command: tuple[str, ...] = ()
    finished: bool = False

    def write(self, directory: Path) -> None:
        write_json(directory / FILE, {"schema": SCHEMA, "what": "shard", **to_jsonable(self)})

    @classmethod
    def read(cls, directory: Path) -> ShardFile:
        """Raises `ShardError` for a directory that holds none."""
        if not (directory / FILE).is_file():
            raise ShardError(
                f"{directory} holds no shard: it has no {FILE}", hint="merge what `--shard INDEX/COUNT` wrote"
            )
        raw = read_object(directory / FILE)
        if raw.pop("what", None) != "shard" or raw.pop("schema", None) != SCHEMA:
            raise ShardError(f"{directory / FILE} is not a shard of schema {SCHEMA}")
        try:
            return from_json(cls, raw)
        except (ValueError, StoreError) as error:
            raise ShardError(f"{directory / FILE} is malformed: {error}") from error


def begin(directory: Path, file: ShardFile) -> None:
    """Say what a directory will hold, unless it says so already. Raises `ShardError` when it holds another shard."""
    if (directory / FILE).exists():
        found = ShardFile.read(directory)
        if found.shard != file.shard:
            raise ShardError(f"{directory} holds shard {found.shard}, not {file.shard}")
        _check_same(directory, found, file, "this command")
    file.write(directory)


def _check_same(directory: Path, found: ShardFile, wanted: ShardFile, of: str) -> None:
    """Raises `ShardError` unless both are of one command, cut the same way."""
    if found.kind != wanted.kind or content_hash(found.key) != content_hash(wanted.key):
        differs = "another command" if found.kind != wanted.kind else what_differs(found.key, wanted.key)
        raise ShardError(
            f"{directory} is a shard of another run than {of}: {differs}",
            hint="shards of one run come from the same command, on the same kind of machine",
        )
    if found.shard.count != wanted.shard.count:
        raise ShardError(
            f"{directory} is shard {found.shard}, and {of} is cut into {wanted.shard.count}",
            hint="every shard must have the same COUNT",
        )
    if found.units != wanted.units:
        raise ShardError(
            f"{directory} was cut into {found.units}, {of} into {wanted.units} batches",
            hint="give every shard the same --batch-rows",
        )


def checked(directories: Sequence[Path]) -> list[tuple[Path, ShardFile]]:
    """The shards in their order. Raises `ShardError` for one that is foreign, doubled, unfinished or missing."""
    found = [(directory, ShardFile.read(directory)) for directory in directories]
    if not found:
        raise ShardError("no shards to merge", hint="name the directories that `--shard INDEX/COUNT` wrote")
    first, model = found[0]
    by_index: dict[int, Path] = {}
    for directory, file in found:
        _check_same(directory, file, model, str(first))
        other = by_index.setdefault(file.shard.index, directory)
        if other != directory:
            raise ShardError(f"shard {file.shard} is there twice: {other} and {directory}")
    missing = [str(Shard(i, model.shard.count)) for i in range(model.shard.count) if i not in by_index]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise ShardError(
            f"shard {', '.join(missing[:SHOWN])}{more} of {first.parent} is missing",
            hint="run it, or name its directory",
        )
    for directory, file in found:
        if not file.finished:
            raise ShardError(
                f"shard {file.shard} in {directory} is not finished", hint="repeat its command: it goes on from there"
            )
    return sorted(found, key=lambda one: one[1].shard.index)
