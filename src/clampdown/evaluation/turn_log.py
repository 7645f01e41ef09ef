"""The steps of multi-turn attacks on disk: append-only `turns.jsonl`, resumable after a kill at any moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clampdown.documents import read_object, row_of
from clampdown.errors import StoreError
from clampdown.store import append_rows, content_hash, locked, open_appending, recover, write_json
from clampdown.types import Receipt, Verdict

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer: a line of `turns.jsonl`.

    `conversation` is suite/objective/attempt. `asks`: the question requested the objective itself. `kept` is False for
    a turn that was taken out of the target's history again. `score` is None when the scorer could not say.
    """

    arm: str
    conversation: str
    step: int
    question: str
    asks: bool
    reply: str
    n_tokens: int
    verdict: Verdict
    score: float | None
    kept: bool
    judge: str
    receipt: Receipt | None = None


class TurnLog:
    """The turns of one run directory. `key` is everything that could change one; another key's directory is refused.

    One process at a time may hold a directory: two would both take the same steps."""

    def __init__(self, directory: Path, key: Any) -> None:
        self.path = directory / "turns.jsonl"
        self._lock = locked(directory)
        try:
            self._claim(directory, key)
            self.turns: list[Turn] = recover(self.path, row_of(Turn), "a turn")
            self._handle = open_appending(self.path)
        except BaseException:
            self._lock.close()
            raise

    def _claim(self, directory: Path, key: Any) -> None:
        digest, manifest = content_hash(key), directory / "manifest.json"
        if not manifest.exists():
            write_json(manifest, {"schema": SCHEMA, "resume_key": digest, "key": key})
        elif read_object(manifest).get("resume_key") != digest:
            raise StoreError(
                f"{directory} holds another run (other model, objectives, arms, attacker, judge or rules)",
                hint="choose an empty --out directory, or repeat the exact command to resume",
            )

    def append(self, turns: Sequence[Turn]) -> None:
        """Write turns and wait until they are on disk. Raises `StoreError`; then none of them is there."""
        append_rows(self._handle, self.path, turns)
        self.turns += turns

    def close(self) -> None:
        self._handle.close()
        self._lock.close()

    def __enter__(self) -> TurnLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
