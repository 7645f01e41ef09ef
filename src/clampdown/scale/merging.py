"""Merging shards: what lies in their directories becomes the directory that one process would have left.

No model is needed, and nothing is rounded: a pass's batches are put into prompt order, rows of logs are joined by their
key. The whole command, repeated in the merged directory, finds everything there and does what is left (`finish` of the
command line): costs, summary, report, or the finders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from clampdown.activations.collect import merge_shards
from clampdown.errors import ShardError
from clampdown.scale import answering, reading
from clampdown.scale.reading import pass_directory
from clampdown.scale.shards import PARTS, ShardFile, checked
from clampdown.store import AppendLog, Key, RecordLog, Row, key_of
from clampdown.study.frozen import FILE as FROZEN
from clampdown.types import OptionChoice, Record, StoredReply


@dataclass(frozen=True, slots=True)
class Merged:
    """What was merged: how many shards, what they held in words, and the command that does the rest."""

    shards: int
    held: str
    command: tuple[str, ...]


def shards_under(out: Path) -> list[Path]:
    """The shards' directories of a run, as `--shard` makes them."""
    return sorted(path.parent for path in (out / PARTS).glob("*/shard.json"))


def merge(directories: Sequence[Path], out: Path) -> Merged:
    """Join shards into `out`. What is there already stays, so that an interrupted merge goes on.

    Raises `ShardError` for a shard that is missing, doubled, unfinished or foreign, and `StoreError` when `out` holds
    another run.
    """
    found = checked(directories)
    first = found[0][1]
    if first.kind == reading.KIND:
        held = _merge_pass(found, out)
    elif first.kind == answering.KIND:
        held = _merge_records(found, out)
    else:
        raise ShardError(f"{found[0][0]} is a shard of '{first.kind}', which this clampdown does not know")
    return Merged(len(found), held, first.command)


def _merge_pass(found: Sequence[tuple[Path, ShardFile]], out: Path) -> str:
    file = found[0][1]
    parts = [pass_directory(directory, file.key) for directory, _ in found]
    store = merge_shards(parts, pass_directory(out, file.key), file.units["batches"])
    return f"{file.units['batches']} batches, {len(store.prompts)} prompts"


def _merge_records(found: Sequence[tuple[Path, ShardFile]], out: Path) -> str:
    file = found[0][1]
    parts = [(directory, _Logs.of(directory)) for directory, _ in found]
    if (found[0][0] / FROZEN).exists() and not (out / FROZEN).exists():
        raise ShardError(
            f"{out} is not where these shards' arms were chosen: it holds no {FROZEN}",
            hint="merge into the directory that --until-test wrote, or a copy of it",
        )
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.callback(lambda: [logs.close() for _, logs in parts])
        replies = _joined((directory, logs.replies.rows) for directory, logs in parts)
        records = _joined((directory, logs.records.rows) for directory, logs in parts)
        choices = _joined((directory, logs.choices.rows) for directory, logs in parts)
        answered = replies.keys() | records.keys()
        if len(answered) != file.units["rows"]:
            raise ShardError(
                f"the shards hold {len(answered):,} answers of {file.units['rows']:,}",
                hint="a shard's files were changed after it ended; delete its directory and run it again",
            )
        log = stack.enter_context(RecordLog(out, file.key))
        log.replies.append(list(replies.values()))
        log.append(list(records.values()))
        log.choices.append(list(choices.values()))
        waiting = len(log.waiting)
    return f"{len(answered):,} replies" + (f", of which {waiting:,} wait for the judge" if waiting else "")


@dataclass(frozen=True, slots=True)
class _Logs:
    """A shard's logs, for reading."""

    replies: AppendLog[StoredReply]
    records: AppendLog[Record]
    choices: AppendLog[OptionChoice]

    @classmethod
    def of(cls, directory: Path) -> _Logs:
        return cls(
            AppendLog(directory / "replies.jsonl", StoredReply, "a reply"),
            AppendLog(directory / "records.jsonl", Record, "a record"),
            AppendLog(directory / "choices.jsonl", OptionChoice, "a choice"),
        )

    def close(self) -> None:
        for log in (self.replies, self.records, self.choices):
            log.close()


def _joined(parts: Iterator[tuple[Path, tuple[Row, ...]]]) -> dict[Key, Row]:
    """Rows by their key. Raises `ShardError` for two shards that hold different rows of one key."""
    found: dict[Key, Row] = {}
    owner: dict[Key, Path] = {}
    for directory, rows in parts:
        for row in rows:
            key = key_of(row)
            if found.setdefault(key, row) != row:
                raise ShardError(
                    f"{owner[key]} and {directory} both answered {' '.join(key)}, and differently",
                    hint="a shard's directory holds what another shard did; delete it and run it again",
                )
            owner.setdefault(key, directory)
    return found
