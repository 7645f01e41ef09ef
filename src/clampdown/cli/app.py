"""What commands share: the root command and its groups, common options, the console, and how results are shown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from clampdown.config import CODE_VERSION

if TYPE_CHECKING:
    from clampdown.study.progress import Stages

console = Console()
errors = Console(stderr=True)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Find the features that make a language model refuse, steer them, and see exactly what it costs.",
)


def _group(name: str, help: str) -> typer.Typer:
    group = typer.Typer(no_args_is_help=True, help=help)
    app.add_typer(group, name=name)
    return group


organism_app = _group("organism", "Train and measure the embedded model.")
features_app = _group("features", "Look at features that were found.")
suites_app = _group("suites", "The public suites that can be loaded.")
gate_app = _group("gate", "Decide which conversations a plan steers.")
plan_app = _group("plan", "Make a plan by hand, and see what a plan does.")
judge_app = _group("judge", "Train judges, and see how steady they are.")
models_app = _group("models", "The models that have short names, and getting one without a model hub.")
sae_app = _group("sae", "Train an SAE for a model that has none, and measure any SAE on a model.")

ModelOption = Annotated[str, typer.Option("--model", help="'organism', a directory, a .gguf file, or a hub id.")]
SaeOption = Annotated[
    str, typer.Option("--sae", help="'organism', 'organism:x8', a short name, a directory, or 'release:id'.")
]
OutOption = Annotated[Path, typer.Option("--out", help="Directory for the results; an interrupted run resumes.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of prompts, controls and probes.")]


def _version(asked: bool) -> bool:
    if asked:
        console.print(f"clampdown {CODE_VERSION}")
        raise typer.Exit
    return asked


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""


def stages() -> Stages:
    """Progress on the console."""
    from clampdown.study.progress import Stages

    return Stages(console)


def show_run(directory: Path, progress: Stages) -> None:
    """Write the report and print the table."""
    from clampdown.extras import is_there
    from clampdown.reports.methods_terminal import methods_summary
    from clampdown.reports.page import without_figures
    from clampdown.results.run import Run

    run = Run.read(directory)
    with progress.stage("Writing the report"):
        path = run.report()
    console.print(run)
    if run.methods:
        console.print(methods_summary(run))
    console.print(f"[bold]report:[/bold] {path}", soft_wrap=True)
    if not is_there("report"):
        errors.print(escaped(without_figures()), soft_wrap=True, highlight=False)


def names_in(text: str) -> tuple[str, ...]:
    """The names of a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def show_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Headings with their texts beside them, wrapped between words, so that an address or a digest stays whole."""
    for heading, text in facts:
        wrapped = textwrap.wrap(text, max(20, console.width - 14), break_long_words=False, break_on_hyphens=False)
        beside = ("\n" + " " * 14).join(wrapped)
        console.print(f"[bold]{heading:>12}[/bold]  {escaped(beside)}", soft_wrap=True, highlight=False)


def escaped(text: str) -> str:
    """Text that is shown as it is, brackets and all."""
    from rich.markup import escape

    return escape(text)
