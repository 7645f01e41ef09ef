"""`clampdown monitor`: the windows of an audit log, and whether any rate has left its range."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Column, Table

from clampdown.errors import ClampdownError, StoreError
from clampdown.serving.audit import parse_range, read_lines
from clampdown.serving.monitor import RATES, Range, Rate, Watch, Window, stamp, windows

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. `last` keeps the last windows that have ended and the open one (0: all); their alarms alone
    count."""

    log: Path
    seconds: float = 3600.0
    expected: tuple[str, ...] = ()
    plan: str | None = None
    last: int = 0

    def watch(self) -> Watch:
        """Raises `ClampdownError` for a window or a range that means nothing."""
        if self.seconds <= 0:
            raise ClampdownError("a window has a length", hint="--window 15m")
        return Watch(self.seconds, expectations(self.expected), self.plan)


@dataclass(frozen=True, slots=True)
class Found:
    """What a log says."""

    windows: tuple[Window, ...]
    lines: int
    cut: int

    @property
    def alarms(self) -> list[str]:
        return [f"{stamp(w.begin)} {w.plan}: {alarm}" for w in self.windows for alarm in w.alarms]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        shown = [window.as_json() for window in self.windows]
        return {"lines": self.lines, "cut_lines": self.cut, "windows": shown, "alarms": self.alarms}


def duration(text: str) -> float:
    """Seconds of "90s", "15m", "1h", "1d". Raises `ClampdownError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    if match is None:
        raise ClampdownError(f"'{text}' is not a length of time", hint="for example 30s, 15m, 1h or 1d")
    return float(match[1]) * _UNITS[match[2]]


def expectations(given: Sequence[str]) -> Mapping[str, Range]:
    """Ranges of "gate=0-0.05". Raises `ClampdownError`."""
    found: dict[str, Range] = {}
    for text in given:
        name, _, rates = text.partition("=")
        if name not in RATES:
            raise ClampdownError(f"'{text}' expects nothing that is known", hint="gate=0-0.05 or refusal=0.1-0.4")
        low, high = parse_range(rates)
        found[name] = (low, high)
    return found


def read(request: Request) -> Found:
    """The log as it is now. Raises `StoreError` when it cannot be read or holds nothing of ours."""
    watch = request.watch()
    found = windows((line for line, _ in read_lines(request.log)), watch)
    if watch.lines and watch.cut == watch.lines:
        raise StoreError(f"{request.log} is not an audit log: no line of it can be read")
    kept = sorted({window.begin for window in found if window.ended})[-request.last :]
    return Found(tuple(w for w in found if w.begin in kept or not w.ended), watch.lines, watch.cut)


def follow(request: Request, every: float, wait: Callable[[float], None] = time.sleep) -> Iterator[Window]:
    """Windows as they end, for ever. A log that was replaced by a shorter one is read from its start."""
    watch, at = request.watch(), 0
    while True:
        if request.log.exists() and request.log.stat().st_size < at:
            at = 0
        for line, after in read_lines(request.log, at):
            at = after
            yield from watch.feed(line)
        yield from watch.at(datetime.now(UTC))
        wait(every)


def shown(found: Sequence[Window]) -> Table:
    """A row per window and plan, for 80 columns."""
    columns = [Column("window (UTC)", no_wrap=True), Column("plan", overflow="fold"), Column("n", justify="right")]
    table = Table(*columns, "gate fired", "refused", "range", box=box.SIMPLE_HEAD)
    for window in found:
        row = (window.begin.strftime("%m-%d %H:%M:%S"), window.plan, str(window.requests))
        cells = [_cell(window.rates[name]) for name in RATES]
        table.add_row(*row, *cells, _verdict(window), style="red" if window.alarms else "")
    return table


def _cell(rate: Rate) -> str:
    found = rate.interval
    if found.value is None or found.low is None or found.high is None:
        return "-"
    return f"{found.value:.2f} ({found.low:.2f}-{found.high:.2f})"


def _verdict(window: Window) -> str:
    if window.alarms:
        return "ALARM"
    if not window.ended:
        return "open"
    return "inside" if any(rate.expected and rate.n for rate in window.rates.values()) else "none"


def as_line(window: Window) -> str:
    """One window as one line of JSON."""
    return json.dumps(window.as_json())
