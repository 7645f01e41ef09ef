"""The entry point: every family of commands, and what a user sees of an error."""

from __future__ import annotations

import sys

from clampdown.cli import finding, jobs, measuring, models, organism, plans, serving, studio, tuning
from clampdown.cli.app import app, errors, escaped
from clampdown.errors import ClampdownError

FAMILIES = (jobs, tuning, finding, measuring, plans, serving, studio, models, organism)
"""Imported because importing registers their commands."""


def main() -> None:
    """A `ClampdownError` is one readable message and exit code 2."""
    try:
        app()
    except ClampdownError as error:
        errors.print(f"[bold red]error:[/bold red] {escaped(error.message)}", soft_wrap=True, highlight=False)
        if error.hint:
            errors.print(f"[dim]hint: {escaped(error.hint)}[/dim]", soft_wrap=True, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("stopped; what was finished is kept")
        sys.exit(130)
