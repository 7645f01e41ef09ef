"""Commands that find features and look at them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from clampdown.cli.app import ModelOption, OutOption, SaeOption, SeedOption, app, console, features_app, stages
from clampdown.cli.options import JudgeOption, MachineOptions, PlacingOptions, PromptOptions, asks, command_of
from clampdown.config import ORGANISM


@app.command()
@asks(prompts=PromptOptions, machines=MachineOptions, placing=PlacingOptions)
def discover(
    context: Any,
    prompts: PromptOptions,
    machines: MachineOptions,
    placing: PlacingOptions,
    out: OutOption = Path("runs/discover"),
    finder: Annotated[str, typer.Option("--finder", help="Finders by name, comma-separated; 'both' or 'all'.")] = "",
    prompt: Annotated[str | None, typer.Option("--prompt", help="Single-prompt finder: the prompt to refuse.")] = None,
    judge: JudgeOption = None,
    pooling: Annotated[str, typer.Option("--pooling", help="How prompts are pooled.")] = "assistant_start",
    literal: Annotated[bool, typer.Option("--literal", help="Contrast as published: no activity floor.")] = False,
    top: Annotated[int, typer.Option("--top", min=1, help="How many features to keep.")] = 64,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Clamp the finalists and rank by effect.")] = True,
    refine: Annotated[bool, typer.Option("--refine", help="Refine what was found into plan.toml.")] = False,
    set_size: Annotated[int, typer.Option("--set-size", min=1, help="Refine to at most this many features.")] = 1,
    scan: Annotated[bool, typer.Option("--scan", help="Scan every layer and SAE instead of ranking features.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Discovery prompts of each suite.")] = 160,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
    model: ModelOption = ORGANISM,
    sae: SaeOption = ORGANISM,
    seed: SeedOption = 0,
) -> None:
    """Find refusal features by clamping, gradients, contrasts or one prompt; refine them into a plan."""
    from clampdown.study import discover as job

    request = job.Request(
        finders=job.finder_names(finder),
        data=prompts.load(),
        prompt=prompt,
        judge=judge,
        pooling=pooling,
        literal=literal,
        top=top,
        check=check,
        refine=refine,
        set_size=set_size,
        seed=seed,
        limit=limit,
        placing=placing.value(),
    )
    _discovered(model, sae, request, out, machines, command_of(context), scan=scan, dry_run=dry_run)


def _discovered(
    model: str,
    sae: str,
    request: Any,
    out: Path,
    machines: MachineOptions,
    command: Any,
    *,
    scan: bool,
    dry_run: bool,
) -> None:
    """Run a request, or the part of it that this machine is asked for."""
    from clampdown.study import discover as job

    progress, shard, pool = stages(), machines.parsed(), machines.pool()
    if dry_run:
        job.dry_run(model, sae, request, progress)
        return
    if scan:
        _refuse_machines(machines)
        console.print(job.scan_table(job.run_scan(model, sae, request, out, progress)))
        console.print(f"[bold]layer by layer:[/bold] {out / 'scan.html'}", soft_wrap=True)
        return
    if shard:
        from clampdown.scale.reading import discover_shard

        directory = discover_shard(model, sae, request, out, shard, progress, command)
        console.print(f"written: {directory}", soft_wrap=True)
        return
    how = job.in_this_process
    if pool:
        from clampdown.scale.on_ray import read_on_ray

        how = partial(read_on_ray, request=pool)
    _show_found(job.run_discover(model, sae, request, out, progress, how))


def _show_found(discovered: Any) -> None:
    """The features, and the plan that they were refined into."""
    from clampdown.reports.terminal import print_features
    from clampdown.study.refining import refinement_table

    if discovered.sinks:
        console.print(discovered.sinks, soft_wrap=True, highlight=False)
    for path, found in discovered.written:
        print_features(found, console)
        console.print(f"written: {path}")
    if discovered.refinement is not None:
        console.print(refinement_table(discovered.refinement))
        console.print(f"written: {discovered.refinement.path}")


def _refuse_machines(machines: MachineOptions) -> None:
    """The layer scan is one short pass. Raises `ShardError`."""
    from clampdown.errors import ShardError

    if machines.shard or machines.ray:
        raise ShardError("--scan is done by one process", hint="leave --shard and --ray away")


@features_app.command("list")
def features_list(
    path: Annotated[Path, typer.Argument(help="A FeatureSet file, or a directory of them (merged).")] = Path(
        "runs/discover"
    ),
    sort: Annotated[str | None, typer.Option("--sort", help="Sort all features by this score, largest first.")] = None,
    ascending: Annotated[bool, typer.Option("--ascending", help="Smallest first.")] = False,
    top: Annotated[int, typer.Option("--top", min=1, help="How many to show.")] = 20,
    where: Annotated[list[str] | None, typer.Option("--where", help="A bound, e.g. 'd_prime>=1'; repeatable.")] = None,
) -> None:
    """List the features that finders kept, or all features by a score."""
    from clampdown.reports.terminal import features_table
    from clampdown.study import features as job

    conditions = [job.parse_condition(text) for text in where or ()]
    found = job.list_features(path, sort, conditions, ascending=ascending)
    console.print(features_table(found, console.width, top))


@features_app.command("show")
def features_show(
    feature: Annotated[str, typer.Argument(help="A feature's index, or a card's .json file.")],
    features: Annotated[
        list[Path] | None, typer.Option("--features", help="FeatureSet file or directory to take scores from.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="JSONL or CSV of prompts; default: the embedded suites.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Prompts of each embedded suite.")] = 60,
    html: Annotated[Path | None, typer.Option("--html", help="Write the card as one HTML file.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the card's data, to be shown again.")] = None,
    model: ModelOption = ORGANISM,
    sae: SaeOption = ORGANISM,
    seed: SeedOption = 0,
) -> None:
    """Show one feature: what it promotes, where it fires, its strongest prompts, neighbours and scores."""
    from clampdown.cards import write_card
    from clampdown.reports.card_page import write_card_page
    from clampdown.reports.card_terminal import card_summary
    from clampdown.study import features as job

    request = job.ShowRequest(prompts, tuple(features or ()), limit, seed)
    card = job.show(feature, model, sae, request, stages())
    console.print(card_summary(card, console.width))
    for path, write in ((html, write_card_page), (json, write_card)):
        if path is not None:
            write(path, card)
            console.print(f"written: {path}", soft_wrap=True)


@features_app.command("compare")
def features_compare(
    first: Annotated[Path, typer.Argument(help="A FeatureSet file or directory.")],
    second: Annotated[Path, typer.Argument(help="Another: of another finder, seed or SAE.")],
    score: Annotated[
        list[str] | None, typer.Option("--score", help="Score to compare; give it twice for one per side.")
    ] = None,
) -> None:
    """Compare two rankings: rank correlation, overlap of the best, and what moved most."""
    from clampdown.reports.card_terminal import agreement_summary
    from clampdown.study import features as job

    console.print(agreement_summary(job.compare(first, second, score or ()), console.width))
