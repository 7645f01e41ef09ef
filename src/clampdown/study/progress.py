"""Progress that people see: one bar per stage of a run, how long each stage took, and what had to be left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from clampdown.errors import NotEnoughDataError, PromptSetError, StrengthError

Tick = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A part of a study that the prompts could not show: why, and what would do."""

    stage: str
    reason: str
    hint: str | None = None


class Stages:
    """Stages of one run. `timings` holds the seconds of each finished stage, by name; `left_out` what was not done."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.timings: dict[str, float] = {}
        self.left_out: list[LeftOut] = []

    @contextmanager
    def attempt(self, part: str) -> Iterator[None]:
        """A part without which the study goes on: too little data for it is noted, and said."""
        try:
            yield
        except (NotEnoughDataError, StrengthError, PromptSetError) as error:
            self.leave_out(part, error.message, error.hint)

    def leave_out(self, part: str, reason: str, hint: str | None = None) -> None:
        """Note, and say, that a part was not done."""
        self.left_out.append(LeftOut(part, reason, hint))
        self.console.print(f"[dim]left out: {escape(part)}: {escape(reason)}[/dim]", highlight=False)

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
