"""The command that attacks a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clampdown.cli.app import OutOption, SeedOption, app, console, names_in, stages
from clampdown.cli.options import JudgeOption


@app.command()
def attack(
    plan: Annotated[Path, typer.Argument(help="A plan.toml.")],
    suite: Annotated[
        str | None, typer.Option("--suite", help="Harmful prompts: a name, NAME=FILE or FILE; default: the corpus's.")
    ] = None,
    queries: Annotated[int, typer.Option("--queries", min=0, help="Black-box queries per objective and arm.")] = 200,
    steps: Annotated[int, typer.Option("--steps", min=0, help="Gradient steps per objective and arm.")] = 200,
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0, help="Most seconds for each attack on each arm.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many objectives.")] = 24,
    attacks: Annotated[str, typer.Option("--attacks", help="Comma-separated; default: all.")] = "",
    templates: Annotated[
        Path | None, typer.Option("--templates", help="Wrappers: a column `text` with [INSERT PROMPT HERE].")
    ] = None,
    attacker: Annotated[
        str | None, typer.Option("--attacker", help="llm:MODEL@URL: a model that rewords requests.")
    ] = None,
    candidates: Annotated[int, typer.Option("--candidates", min=1, help="Changes tried per gradient step.")] = 16,
    suffix_tokens: Annotated[int, typer.Option("--suffix-tokens", min=1, help="Length of a suffix.")] = 12,
    judge: JudgeOption = None,
    split: Annotated[str, typer.Option("--split", help="validation or test.")] = "test",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest reply.")] = 48,
    batch_rows: Annotated[
        int | None,
        typer.Option("--batch-rows", min=1, help="Replies generated together. Default: what memory has room for."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the summary here as well.")] = None,
    out: OutOption = Path("runs/attack"),
    model: Annotated[str | None, typer.Option("--model", help="Default: the model that the plan names.")] = None,
    seed: SeedOption = 0,
) -> None:
    """Attack a plan with text and with gradients, beside the bare model and a system prompt, and say what is left."""
    from clampdown.attacks import job
    from clampdown.attacks.budget import Budget
    from clampdown.attacks.table import ALL
    from clampdown.reports.attack_terminal import attack_table
    from clampdown.store import write_json

    request = job.Request(
        suite=suite,
        attacks=names_in(attacks) or ALL,
        budget=Budget(queries, steps, candidates, suffix_tokens, seconds),
        templates=templates,
        attacker=attacker,
        judge=judge,
        split=split,
        limit=limit,
        max_new_tokens=max_new_tokens,
        batch_rows=batch_rows,
        model=model,
        seed=seed,
    )
    found = job.run_attack(plan, out, request, stages())
    if json_file is not None:
        write_json(json_file, found)
    console.print(attack_table(found))
    console.print(f"[bold]report:[/bold] {out / job.PAGE_NAME}", soft_wrap=True)
