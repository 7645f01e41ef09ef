"""Commands about judges: agreement with people, training, consistency, labels by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from clampdown.cli.app import app, console, judge_app, stages


@app.command("judge-agreement")
def judge_agreement(
    files: Annotated[list[Path] | None, typer.Argument(help="Further files of labelled replies.")] = None,
    replies: Annotated[
        list[Path] | None, typer.Option("--replies", help="CSV or JSONL of labelled replies, a file per model.")
    ] = None,
    judge: Annotated[
        list[str] | None, typer.Option("--judge", help="The judge to measure, default 'learned'; repeat for several.")
    ] = None,
    question: Annotated[str, typer.Option("--question", help="What people were asked: refused or helped.")] = "refused",
    left_out: Annotated[
        bool, typer.Option("--left-out", help="Add the learned judge, trained without the file it is measured on.")
    ] = False,
    worst: Annotated[int, typer.Option("--worst", min=0, help="Disagreements to show of each judge.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Measure judges against human labels: kappa with its interval, file by file, and the confusion matrix."""
    from clampdown.evaluation.judges.table import DEFAULT
    from clampdown.study import judge_agreement as job

    request = job.Request(
        judges=tuple(judge or (() if left_out else (DEFAULT,))),
        files=(*(replies or ()), *(files or ())),
        question=job.question_named(question),
        left_out=left_out,
        worst=worst,
        out=json_file,
    )
    console.print(job.run_agreement(request, stages()))


@judge_app.command("train")
def judge_train(
    labels: Annotated[
        list[Path] | None, typer.Option("--labels", help="Labelled replies, a file per model or data set.")
    ] = None,
    more: Annotated[list[Path] | None, typer.Argument(help="Further files of labelled replies.")] = None,
    out: Annotated[Path, typer.Option("--out", help="The judge's file; use it as learned:FILE.")] = Path(
        "judge.safetensors"
    ),
) -> None:
    """Train a judge from replies that people labelled; scores are of replies it was not trained on."""
    from clampdown.study import judge_training as job

    console.print(job.run_training((*(labels or ()), *(more or ())), out, stages()))


@judge_app.command("consistency")
def judge_consistency(
    sources: Annotated[list[Path], typer.Argument(help="Run directories, or files of labelled replies.")],
    judge: Annotated[str, typer.Option("--judge", help="The judge to measure.")] = "learned",
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many replies, evenly from all.")] = 200,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Ask a judge about replies again, retyped, reworded and longer: the verdict should stay."""
    from clampdown.study import judge_consistency as job

    console.print(job.run_consistency(judge, sources, limit, json_file, stages()))


@app.command()
def label(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    n: Annotated[int, typer.Option("--n", min=1, help="How many replies, drawn evenly from the suites.")] = 100,
    out: Annotated[
        Path | None, typer.Option("--out", help="The labels' file; default: labels.jsonl in the run.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Which replies are drawn, and in which order.")] = 0,
) -> None:
    """Label a random sample of a run's replies by keys, without seeing the arm; stop and go on at any time."""
    import click

    from clampdown.study import labelling as job

    path = out or run / "labels.jsonl"
    show = lambda text: console.print(text, markup=False, highlight=False)  # noqa: E731
    answered = job.run_labelling(run, n, path, seed, _key_reader(click.getchar), show)
    console.print(f"{answered} answers written to {path}", markup=False)
    console.print(f"use them: clampdown report {run} --labels {path}", markup=False)


def _key_reader(from_terminal: Callable[[], str]) -> Callable[[], str]:
    """One key of the terminal, or one character of what is piped in ("" at its end)."""
    return from_terminal if sys.stdin.isatty() else lambda: sys.stdin.read(1)
