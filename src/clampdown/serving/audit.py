"""The audit log: a line of JSON for every request that was answered or refused, and for what the server did itself.

1. A line is one append to the file, so a killed server leaves whole lines and at most one cut one; the next start ends
   a cut line before it writes its own.
2. Lines of `event` "start" hold what was served: model, plans, digests, and the rates that each plan was calibrated
   for. `clampdown monitor` needs nothing else.
3. Prompts and replies are written only if the server was told to (`--log-prompts`); keys never, only their names.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clampdown.documents import parse_json
from clampdown.errors import StoreError
from clampdown.steering.plan import Plan

log = logging.getLogger(__name__)

SCHEMA = 1
_PRIVATE = 0o600
_CANARY, _HEAD = b'"event": "canary"', 64  # a line's first fields are its version and its event


def now() -> str:
    """This moment, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class AuditLog:
    """Appends events to a file. Raises `StoreError` when the file cannot be opened; what fails later is `broken`.

    The file is looked at before each line. One that was deleted, moved away or replaced is opened anew, and one that
    was made shorter is gone on with: in both cases the first line says so, and what was said at the start follows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken: str | None = None
        self._start: Mapping[str, Any] | None = None
        self._size = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._opened()
        except OSError as error:
            raise StoreError(f"cannot write the audit log {path}: {error.strerror or error}") from error

    def write(self, event: str, fields: Mapping[str, Any]) -> None:
        """Append one line. A line that cannot be written whole is remembered in `broken`, until one can."""
        if event == "start":
            self._start = fields
        try:
            if self.broken:
                self._end_cut_line()  # there may have been no room for that either
            if happened := self._gone():
                self._go_on(happened)
            self._append(event, fields)
            self.broken = None
        except OSError as error:
            self.broken = str(error.strerror or error)

    def close(self) -> None:
        """Nothing is buffered, so there is nothing to lose."""
        os.close(self._file)

    def _opened(self) -> int:
        """The file, ready for the next line."""
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, _PRIVATE)
        self._file, self._size = file, os.fstat(file).st_size
        self._end_cut_line()
        return file

    def _append(self, event: str, fields: Mapping[str, Any]) -> None:
        data = (json.dumps({"v": SCHEMA, "event": event, "time": now(), **fields}) + "\n").encode()
        if os.write(self._file, data) < len(data):
            self._end_cut_line()
            raise OSError("the disk is full")
        self._size = os.fstat(self._file).st_size

    def _gone(self) -> str | None:
        """What has become of the file since the last line, if anything has."""
        own = os.fstat(self._file)
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return "deleted or moved"
        if (there.st_dev, there.st_ino) != (own.st_dev, own.st_ino):
            return "replaced"
        return "made shorter" if own.st_size < self._size else None

    def _go_on(self, happened: str) -> None:
        log.warning("the audit log %s was %s while it was written", self.path, happened)
        if self.path.exists() and not self.path.is_file():
            raise OSError("what stands in its place is no file")
        old = self._file
        self._opened()
        os.close(old)
        self._append("reopen", {"detail": f"the log was {happened}: its earlier lines are not in this file"})
        if self._start is not None:
            self._append("start", self._start)

    def _end_cut_line(self) -> None:
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a log: its fields, or None for one that was cut."""

    number: int
    fields: dict[str, Any] | None


def read_lines(path: Path, start: int = 0) -> Iterator[tuple[Line, int]]:
    """The lines from byte `start`, each with the byte after it. A last line without its end is left for later.

    Raises `StoreError` when the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            at = start
            for number, raw in enumerate(file, 1):
                if not raw.endswith(b"\n"):
                    return
                at += len(raw)
                if raw.strip():
                    yield Line(number, _parsed(raw)), at
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from error


def canary_lines(path: Path) -> Iterator[dict[str, Any]]:
    """What a log says of canaries, from its beginning; other lines, of which there may be millions, are not parsed."""
    with path.open("rb") as file:
        for raw in file:
            if _CANARY in raw[:_HEAD] and (found := _parsed(raw)) is not None:
                yield found


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        found = parse_json(raw, "the line")
    except StoreError:
        return None
    return found if isinstance(found, dict) else None


def calibrated_for(plan: Plan) -> dict[str, list[float | None]]:
    """The rates that a plan should show in use, as [low, high], None for an open side.

    What its provenance states (`expected_gate_rate`, `expected_refusal_rate`, as "0.01-0.05") goes first. A guaranteed
    gate promises that at most `budget` of benign prompts trigger it; nothing is promised about refusals, nor by a gate
    whose guarantee is about harmful prompts.
    """
    ranges = {}
    if plan.gate and plan.gate.guarantee and plan.gate.guarantee.on == "benign":
        ranges["gate"] = [None, plan.gate.guarantee.budget]
    for key, name in (("expected_gate_rate", "gate"), ("expected_refusal_rate", "refusal")):
        if key in plan.provenance:
            ranges[name] = parse_range(plan.provenance[key])
    return ranges


def parse_range(text: str) -> list[float | None]:
    """ "0.01-0.05", "-0.05" (at most) or "0.5-" (at least). Raises `StoreError`."""
    low, dash, high = text.partition("-")
    try:
        found = [float(part) if part.strip() else None for part in (low, high)]
    except ValueError:
        found = []
    bounds = [value for value in found if value is not None]
    if not dash or not bounds or bounds != sorted(bounds) or not all(0 <= value <= 1 for value in bounds):
        raise StoreError(f"'{text}' is not a range of rates", hint='two shares as "0.01-0.05"; either may be left out')
    return found
