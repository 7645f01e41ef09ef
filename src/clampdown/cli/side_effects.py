"""The command that looks for what else a plan moved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clampdown.cli.app import OutOption, SeedOption, app, console, names_in, stages
from clampdown.cli.options import JudgeOption, PlacingOptions, asks


@app.command("side-effects")
@asks(placing=PlacingOptions)
def side_effects(
    placing: PlacingOptions,
    plans: Annotated[list[Path], typer.Argument(help="One or more plan.toml of one model.")],
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Local copies of public sets, by the names that they have.")
    ] = None,
    kinds: Annotated[str, typer.Option("--kinds", help="Comma-separated; default: all.")] = "",
    limit: Annotated[int, typer.Option("--limit", min=2, help="Items per suite.")] = 40,
    margin: Annotated[
        float, typer.Option("--margin", help="How far from the baseline still counts as not moved.")
    ] = 0.1,
    judge: JudgeOption = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest reply.")] = 40,
    batch_rows: Annotated[
        int | None,
        typer.Option("--batch-rows", min=1, help="Replies generated together. Default: what memory has room for."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the summary here as well.")] = None,
    out: OutOption = Path("runs/side-effects"),
    model: Annotated[str | None, typer.Option("--model", help="Default: the model that the plan names.")] = None,
    seed: SeedOption = 0,
) -> None:
    """Measure what else plans moved: truthfulness, sycophancy, bias, persona, calibration, opinions."""
    from clampdown.effects import job
    from clampdown.reports.side_effects_page import PAGE
    from clampdown.reports.side_effects_terminal import side_effects_summary
    from clampdown.store import write_json

    request = job.Request(
        folder=folder,
        kinds=names_in(kinds),
        judge=judge,
        limit=limit,
        max_new_tokens=max_new_tokens,
        batch_rows=batch_rows,
        margin=margin,
        model=model,
        seed=seed,
        placing=placing.value(),
    )
    found = job.run_side_effects(plans, out, request, stages())
    if json_file is not None:
        write_json(json_file, found.to_json())
    console.print(side_effects_summary(found))
    console.print(f"[bold]report:[/bold] {out / PAGE}", soft_wrap=True)
