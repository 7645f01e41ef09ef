"""The entry point: every family of commands, and what a user sees of an error."""

from __future__ import annotations

import sys
import warnings
from typing import TextIO

from clampdown.cli import (
    attacking,
    exporting,
    finding,
    jobs,
    judging,
    measuring,
    models,
    organism,
    plans,
    saes,
    scaling,
    serving,
    side_effects,
    studio,
    tuning,
)
from clampdown.cli.app import app, errors, escaped
from clampdown.errors import ClampdownError, SaeFitWarning

FAMILIES = (
    jobs,
    tuning,
    finding,
    measuring,
    attacking,
    side_effects,
    scaling,
    judging,
    plans,
    exporting,
    serving,
    studio,
    models,
    saes,
    organism,
)
"""Imported because importing registers their commands."""

PANELS = {
    "The main job": ("demo", "study", "chat", "serve", "studio", "report"),
    "Its steps, one by one": (
        "discover", "features", "plan", "sweep", "screen", "gate", "tune", "evaluate", "merge", "compare",
        "explain", "multiturn", "attack", "side-effects", "check", "export", "import",
    ),
    "Published pipelines and methods": ("recipe", "compare-methods"),
    "Looking after it": ("monitor", "judge-agreement", "judge", "label", "suites", "models", "sae", "organism"),
}  # fmt: skip
"""The order in which a newcomer meets the commands; what is not named here comes last."""


def _in_panels() -> None:
    """Put every command and group under its heading, in that order."""
    places = {name: (panel, i) for panel, names in PANELS.items() for i, name in enumerate(names)}
    order = list(PANELS)
    for registered in (*app.registered_commands, *app.registered_groups):
        place = places.get(str(registered.name or getattr(registered.callback, "__name__", "")))
        registered.rich_help_panel = place[0] if place else "Further"

    def rank(registered: object) -> tuple[int, int]:
        name = str(getattr(registered, "name", None) or getattr(getattr(registered, "callback", None), "__name__", ""))
        panel, i = places.get(name, ("", 0))
        return (order.index(panel) if panel else len(order), i)

    app.registered_commands.sort(key=rank)
    app.registered_groups.sort(key=rank)


_in_panels()


_show_other = warnings.showwarning


def _show(
    message: Warning | str,
    category: type[Warning],
    file: str,
    line: int,
    out: TextIO | None = None,
    _: str | None = None,
) -> None:
    """Our own warnings are for whoever typed the command; others name the line of code that they are about."""
    if issubclass(category, SaeFitWarning):
        errors.print(f"[yellow]warning:[/yellow] {escaped(str(message))}", soft_wrap=True, highlight=False)
    else:
        _show_other(message, category, file, line, out)


def main() -> None:
    """A `ClampdownError` is one readable message and exit code 2."""
    warnings.showwarning = _show
    try:
        app()
    except ClampdownError as error:
        errors.print(f"[bold red]error:[/bold red] {escaped(error.message)}", soft_wrap=True, highlight=False)
        if error.hint:
            errors.print(f"[dim]hint: {escaped(error.hint)}[/dim]", soft_wrap=True, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("stopped; what was finished is kept, and the same command goes on from there")
        sys.exit(130)
