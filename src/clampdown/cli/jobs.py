"""The main job: a study of any model, its short forms, published recipes, and the report of any run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from clampdown.cli.app import OutOption, app, console, names_in, show_run, stages
from clampdown.cli.options import (
    JudgeOption,
    MachineOptions,
    PlacingOptions,
    PromptOptions,
    UntilTestOption,
    asks,
    command_of,
)
from clampdown.config import ORGANISM

if TYPE_CHECKING:
    from clampdown.scale.pool import PoolRequest
    from clampdown.scale.shards import Shard
    from clampdown.study.progress import Stages
    from clampdown.study.spec import StudySpec
    from clampdown.study.study import Study

LIST = "list"

SizeOption = Annotated[
    str | None, typer.Option("--size", help="quick, small, medium or full: how many prompts, and which methods.")
]


@app.command()
@asks(prompts=PromptOptions, machines=MachineOptions, placing=PlacingOptions)
def study(
    context: Any,
    prompts: PromptOptions,
    machines: MachineOptions,
    placing: PlacingOptions,
    file: Annotated[
        Path | None, typer.Argument(help="A study or a recipe as a TOML file; options win over it.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="'organism', a directory, .gguf, or a hub id.")] = None,
    sae: Annotated[str | None, typer.Option("--sae", help="'organism', a directory, or 'release:id'.")] = None,
    judge: JudgeOption = None,
    size: SizeOption = None,
    minutes: Annotated[float | None, typer.Option("--minutes", min=0.1, help="Fit the study to this time.")] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", help="all, none, or names: clamp,refine,dense,cast,gated-set,two-sided.")
    ] = None,
    kl: Annotated[float | None, typer.Option("--kl", help="Benign KL at which methods are matched.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Local copies of public sets, by the names that they have.")
    ] = None,
    n_random: Annotated[int | None, typer.Option("--n-random", min=0, help="Random features at that KL.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Longest reply.")] = None,
    batch_rows: Annotated[int | None, typer.Option("--batch-rows", min=1, help="Replies generated together.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would do and take, and stop.")] = False,
    until_test: UntilTestOption = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of prompts, controls and probes.")] = None,
    out: OutOption = Path("runs/study"),
) -> None:
    """The main job on any model: find, choose, sweep, gate, control, read the test prompts once, report."""
    asked = {
        "model": model,
        "sae": sae,
        "judge": judge,
        "size": size,
        "minutes": minutes,
        "methods": _methods(methods),
        "kl": kl,
        "n_random": n_random,
        "max_new_tokens": max_new_tokens,
        "batch_rows": batch_rows,
        "seed": seed,
    }
    if prompts.given:
        asked["prompts"] = prompts.part()
    if placing.given:
        asked["placing"] = placing.value()
    given = {name: value for name, value in asked.items() if value is not None}
    if (shard := machines.parsed()) is not None:
        _study_shard(file, given, out, shard, folder, command_of(context))
        return
    _study(file, given, out, dry_run=dry_run, until_test=until_test, pool=machines.pool(), folder=folder)


@app.command()
def demo(
    out: OutOption = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts, same files.")] = False,
    model: Annotated[str, typer.Option("--model", help="'organism', or a directory trained like it.")] = ORGANISM,
    sae: Annotated[str, typer.Option("--sae", help="'organism', 'organism:x8', or a directory.")] = ORGANISM,
    seed: Annotated[int, typer.Option("--seed", help="Seed of prompts, controls and probes.")] = 0,
) -> None:
    """A study of the embedded model at a small size: the whole job in a minute."""
    _study(None, {"model": model, "sae": sae, "seed": seed, "size": "quick" if quick else "small"}, out)


@app.command("compare-methods")
def compare_methods(
    out: OutOption = Path("runs/compare-methods"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts, same files.")] = False,
    kl: Annotated[float, typer.Option("--kl", help="Benign KL, nats per token, at which methods are matched.")] = 0.02,
    n_random: Annotated[int, typer.Option("--n-random", min=0, help="Random features at that KL.")] = 20,
    model: Annotated[str, typer.Option("--model", help="'organism', or a directory trained like it.")] = ORGANISM,
    sae: Annotated[str, typer.Option("--sae", help="'organism', 'organism:x8', or a directory.")] = ORGANISM,
    seed: Annotated[int, typer.Option("--seed", help="Seed of prompts, controls and probes.")] = 0,
) -> None:
    """A study of the embedded model with all methods and no sweep: `study --methods all` has both."""
    from clampdown.study.methods.table import ALL

    size = "quick" if quick else "full"
    asked = {"model": model, "sae": sae, "seed": seed, "size": size, "kl": kl, "n_random": n_random}
    _study(None, {**asked, "methods": ALL, "sweep": False}, out)


@app.command()
def recipe(
    file: Annotated[
        Path, typer.Argument(metavar="NAME|FILE|list", help="A recipe by name or file; 'list' shows the names.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Directory for the results; default runs/NAME; resumes.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every field without a network, say what it would take, and stop.")
    ] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE over the file, such as sae.id=DIR; repeatable.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="A variant that the recipe names; --dry-run lists them.")
    ] = None,
) -> None:
    """Run a published pipeline from one file: its model, SAE, prompts, judges and strengths."""
    if str(file) == LIST and not file.exists():
        console.print(_published())
        return
    _recipe(file, settings or [], out, option or [], dry_run=dry_run)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A run directory with summary.json.")],
    labels: Annotated[
        Path | None, typer.Option("--labels", help="Labels by `clampdown label`: correct rates for the judge's error.")
    ] = None,
) -> None:
    """Write report.html from a finished run, and print its table."""
    if labels is None:
        show_run(directory, stages())
        return
    from clampdown.study.corrected import run_correction

    corrected = run_correction(directory, labels)
    show_run(directory, stages())
    console.print(corrected)


def _methods(text: str | None) -> tuple[str, ...] | None:
    """The methods of an option; None: as the size says."""
    from clampdown.study.methods.table import ALL

    if text is None:
        return None
    return {"all": ALL, "none": ()}.get(text.strip(), names_in(text))


def _study(
    file: Path | None,
    asked: dict[str, Any],
    out: Path,
    *,
    dry_run: bool = False,
    until_test: bool = False,
    pool: PoolRequest | None = None,
    folder: Path | None = None,
) -> None:
    """Run a study of a file, with what was asked for over it; a recipe goes its own way."""
    from clampdown.study.recipes.schema import is_recipe, read_toml

    if file and is_recipe(read_toml(file)):
        _refuse_options(file, asked | ({"until_test": True} if until_test else {}) | ({"ray": pool} if pool else {}))
        _recipe(file, [], out, [], dry_run=dry_run)
        return
    progress = stages()
    spec, found = _loaded(file, asked, folder, progress)
    from clampdown.study.planned import kept_request, planned_study

    ran = planned_study(found, spec, out, progress, dry_run=dry_run, until_test=until_test or pool is not None)
    if pool and not until_test and not dry_run:
        from clampdown.scale.answering import study_on_ray

        ran = study_on_ray(found, kept_request(spec, out), out, pool, progress)
    if ran is not None:
        show_run(out, progress)
        console.print(f"[bold]plan:[/bold] {out / 'plan.toml'}   serve it: clampdown serve {out}", soft_wrap=True)
    elif until_test:
        console.print(f"ready for its shards: {out}", soft_wrap=True)


def _loaded(file: Path | None, asked: dict[str, Any], folder: Path | None, progress: Stages) -> tuple[StudySpec, Study]:
    """A study's settings, and what they name. Raises `RecipeError` and whatever does not fit together."""
    from clampdown.study.recipes.schema import read_toml
    from clampdown.study.spec import parse_spec

    raw = {**(read_toml(file) if file else {}), **asked}
    spec = parse_spec(raw, str(file) if file else "the study").in_folder(folder)
    with progress.stage("Loading"):
        return spec, spec.load()


def _study_shard(
    file: Path | None, asked: dict[str, Any], out: Path, shard: Shard, folder: Path | None, command: tuple[str, ...]
) -> None:
    """One shard of a study's test."""
    from clampdown.scale.answering import study_shard
    from clampdown.study.planned import kept_request
    from clampdown.study.recipes.schema import is_recipe, read_toml

    if file and is_recipe(read_toml(file)):
        _refuse_options(file, {"shard": str(shard)})
    progress = stages()
    spec, found = _loaded(file, asked, folder, progress)
    console.print(
        f"written: {study_shard(found, kept_request(spec, out), out, shard, progress, command)}", soft_wrap=True
    )


def _refuse_options(file: Path, asked: dict[str, Any]) -> None:
    """A recipe says everything itself. Raises `RecipeError`."""
    from clampdown.errors import RecipeError

    if asked:
        raise RecipeError(
            f"{file} is a recipe: it says everything itself, --{next(iter(asked)).replace('_', '-')} too",
            hint="clampdown recipe FILE --set KEY=VALUE",
        )


def _published() -> Table:
    """The recipes that come with the package."""
    from clampdown.study.recipes.schema import published, read_recipe

    name, model = Column("name", no_wrap=True), Column("model", overflow="fold")
    table = Table(name, "paper", model, "what it runs", box=None, header_style="bold")
    for name in published():
        found = read_recipe(Path(name))
        table.add_row(name, found.paper, found.model.id, found.about)
    return table


def _recipe(file: Path, settings: list[str], out: Path | None, options: list[str], *, dry_run: bool) -> None:
    from clampdown.study.multiturn import table as attack_table
    from clampdown.study.recipes import dry_run as checking
    from clampdown.study.recipes.run import run_recipe
    from clampdown.study.recipes.schema import read_recipe

    found = read_recipe(file, settings, options)
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
