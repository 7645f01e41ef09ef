"""Commands for work on several machines: merging what shards wrote."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from clampdown.cli.app import OutOption, app, console


@app.command()
def merge(
    directories: Annotated[
        list[Path] | None, typer.Argument(help="The shards' directories; default: those under --out.")
    ] = None,
    finish: Annotated[
        bool, typer.Option("--finish/--no-finish", help="Then do what comes after: costs, summary, report; finders.")
    ] = True,
    out: OutOption = Path("runs/merged"),
) -> None:
    """Join the shards of a command into what one process would have left, and finish it."""
    from clampdown.scale import merging

    merged = merging.merge(directories or merging.shards_under(out), out)
    console.print(f"merged {merged.shards} shards into {out}: {merged.held}", soft_wrap=True, highlight=False)
    if not merged.command:
        return
    words = (*merged.command, "--out", str(out))
    console.print(f"{'finishing' if finish else 'finish it'}: clampdown {shlex.join(words)}", soft_wrap=True)
    if finish:
        typer.main.get_command(app).main(list(words), standalone_mode=False)
