"""Commands that train and measure the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clampdown.cli.app import console, organism_app, stages
from clampdown.errors import ModelError


@organism_app.command("train")
def organism_train(
    out: Annotated[Path, typer.Option("--out", help="Where the model and its SAEs are written.")],
    seed: Annotated[int, typer.Option("--seed", help="Seed of weights and corpus order.")] = 0,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimiser steps; default as shipped.")] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads; part of what a seed means.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")] = False,
) -> None:
    """Train the embedded model and its SAEs from scratch; resumes after an interruption."""
    from clampdown.organism import train

    train.train_organism(out, seed, steps or train.DEFAULT_STEPS, threads=threads, resume=not fresh)
    console.print(f"trained: {out}")


@organism_app.command("measure")
def organism_measure(
    directory: Annotated[Path | None, typer.Argument(help="A trained organism; default: the shipped one.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Prompts per family.")] = 240,
) -> None:
    """Measure a trained organism against its targets on held-out prompts."""
    from clampdown.organism import WEIGHTS, measure

    where = directory or WEIGHTS
    if not (where / "model" / "config.json").is_file():
        raise ModelError(
            f"no organism at {where}: it has no model/config.json",
            hint="give a directory of `clampdown organism train`",
        )
    with stages().stage("Measuring"):
        rows = measure.measure(where, n)
    console.print(measure.table(rows))
