"""Commands that run a whole job, and the report of any run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clampdown.cli.app import ModelOption, OutOption, SaeOption, SeedOption, app, console, show_run, stages
from clampdown.config import ORGANISM


@app.command()
def demo(
    out: OutOption = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts, same files.")] = False,
    model: ModelOption = ORGANISM,
    sae: SaeOption = ORGANISM,
    seed: SeedOption = 0,
) -> None:
    """Run the whole job on the embedded model: find, steer, measure the trade-off, write a report."""
    from clampdown.study import demo as job
    from clampdown.study.experiment import organism_subject

    progress = stages()
    with progress.stage("Loading"):
        subject = organism_subject(model, sae, seed=seed)
    job.run_demo(subject, out, job.QUICK if quick else job.FULL, progress)
    show_run(out, progress)


@app.command("compare-methods")
def compare_methods(
    out: OutOption = Path("runs/compare-methods"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts, same files.")] = False,
    kl: Annotated[float, typer.Option("--kl", help="Benign KL, nats per token, at which methods are matched.")] = 0.02,
    n_random: Annotated[int, typer.Option("--n-random", min=0, help="Random features at that KL.")] = 20,
    model: ModelOption = ORGANISM,
    sae: SaeOption = ORGANISM,
    seed: SeedOption = 0,
) -> None:
    """Both papers' methods, the dense baselines, a tuned plan and random features in one run on the embedded model."""
    from clampdown.study import compare_methods as job
    from clampdown.study.experiment import organism_subject

    progress = stages()
    with progress.stage("Loading"):
        subject = organism_subject(model, sae, seed=seed)
    request = job.Request(kl=kl, n_random=n_random)
    summary = job.run_compare_methods(subject, out, job.QUICK if quick else job.FULL, request, progress)
    show_run(out, progress)
    console.print(job.shown(summary))


@app.command()
def recipe(
    file: Annotated[Path, typer.Argument(help="A recipe, such as recipes/obrien2024-organism.toml.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory for the results; default runs/NAME; resumes.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every field without a network, say what it would take, and stop.")
    ] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE over the file, such as sae.id=DIR; repeatable.")
    ] = None,
) -> None:
    """Run a published pipeline from one file: its model, SAE, prompts, judges and strengths."""
    from clampdown.study.multiturn import table as attack_table
    from clampdown.study.recipes import dry_run as checking
    from clampdown.study.recipes.run import run_recipe
    from clampdown.study.recipes.schema import read_recipe

    found = read_recipe(file, settings or ())
    checked = checking.dry_run(found)
    console.print(checking.shown(checked), highlight=False)
    checked.raise_if_wrong()
    if dry_run:
        return
    directory, progress = out or Path("runs") / found.name, stages()
    ran = run_recipe(found, directory, progress)
    show_run(directory, progress)
    if ran.attacks is not None:
        console.print(attack_table(ran.attacks))


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A run directory with summary.json.")],
) -> None:
    """Write report.html from a finished run, and print its table."""
    show_run(directory, stages())
