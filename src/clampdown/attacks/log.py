"""What was tried, on disk: `attempts.jsonl` (every query) and `searches.jsonl` (every finished search with gradients).

Both are append-only and resumable: a run goes on behind the last whole line. They hold what a model answered, so a run
directory of a real model is to be kept to oneself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Generic, TypeVar

from clampdown.documents import row_of
from clampdown.store import append_rows, claim, locked, open_appending, recover
from clampdown.types import Message, Verdict


@dataclass(frozen=True, slots=True)
class Tried:
    """One query. `fired` is what the arm's gate did, None without one."""

    arm: str
    objective: str
    query: int
    attack: str
    messages: tuple[Message, ...]
    begun: str
    reply: str
    verdict: Verdict
    succeeded: bool
    fired: bool | None = None
    gate_score: float | None = None


@dataclass(frozen=True, slots=True)
class Searched:
    """One search with gradients: where it ended. `step` is the step at which it succeeded, else the last; `found` is
    the suffix as text, empty for what is no text. `queries` are the replies that were judged on the way."""

    arm: str
    objective: str
    attack: str
    step: int
    steps: int
    queries: int
    found: str
    loss: float
    log_odds: float
    reply: str
    verdict: Verdict
    succeeded: bool
    fired: bool | None = None
    gate_score: float | None = None


Row = TypeVar("Row", Tried, Searched)


class Lines(Generic[Row]):
    """An append-only file of rows of one kind."""

    def __init__(self, path: Path, kind: type[Row], what: str) -> None:
        self.path = path
        self.rows: list[Row] = recover(path, row_of(kind), what)
        self._handle = open_appending(path)

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows and wait until they are on disk. Raises `StoreError`; then none of them is there."""
        append_rows(self._handle, self.path, rows)
        self.rows += rows

    def close(self) -> None:
        self._handle.close()


class AttackLog:
    """The files of one run directory. `key` is everything that could change a row; another key's directory is refused,
    and so is a second process."""

    def __init__(self, directory: Path, key: Any) -> None:
        self._lock: FileIO = locked(directory)
        self._closing: list[Callable[[], None]] = [self._lock.close]
        try:
            claim(directory / "manifest.json", key)
            self.tried = Lines(directory / "attempts.jsonl", Tried, "an attempt")
            self._closing.append(self.tried.close)
            self.searched = Lines(directory / "searches.jsonl", Searched, "a search")
            self._closing.append(self.searched.close)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for close in reversed(self._closing):
            close()

    def __enter__(self) -> AttackLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
