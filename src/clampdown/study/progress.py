"""Progress that people see: one bar per stage of a run, and how long each stage took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Tick = Callable[[int, int], None]


class Stages:
    """Stages of one run. `timings` holds the seconds of each finished stage, by name."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.timings: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Tick]:
        """A stage with a bar. The block gets `tick(done, total)`; without calls the bar only shows that it is alive."""
        began = time.perf_counter()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
            progress.update(task, completed=1, total=1)
        self.timings[name] = round(time.perf_counter() - began, 2)
