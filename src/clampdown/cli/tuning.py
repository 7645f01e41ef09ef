"""The command that searches for a plan."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from clampdown.cli.app import ModelOption, OutOption, SaeOption, SeedOption, app, console, names_in, show_run, stages
from clampdown.cli.options import JudgeOption, PromptOptions, asks_prompts
from clampdown.config import ORGANISM
from clampdown.errors import PlanError


@app.command()
@asks_prompts
def tune(
    prompts: PromptOptions,
    out: OutOption = Path("runs/tune"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts and trials, same files.")] = False,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="How many settings to try.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
    max_over_refusal: Annotated[
        float, typer.Option("--max-over-refusal", help="Budget: harmless prompts newly refused, a share.")
    ] = 0.02,
    max_capability_loss: Annotated[
        float, typer.Option("--max-capability-loss", help="Budget: right answers lost, a share of prompts.")
    ] = 0.02,
    max_broken: Annotated[float, typer.Option("--max-broken", help="Budget: replies newly broken, a share.")] = 0.015,
    max_kl: Annotated[float, typer.Option("--max-kl", help="Budget: benign KL, nats per token.")] = 0.05,
    confidence: Annotated[float, typer.Option("--confidence", help="Of the budgets' upper bounds.")] = 0.95,
    features: Annotated[
        Path | None, typer.Option("--features", help="FeatureSet file; default: the default finder runs.")
    ] = None,
    top: Annotated[int | None, typer.Option("--top", min=1, help="How many features to consider.")] = None,
    set_size: Annotated[
        int, typer.Option("--set-size", min=1, max=3, help="Steer up to this many of the first three together.")
    ] = 2,
    operators: Annotated[str, typer.Option("--operators", help="Comma-separated.")] = "clamp,floor,add",
    scopes: Annotated[str, typer.Option("--scopes", help="Comma-separated.")] = "all,prompt,assistant",
    gates: Annotated[str, typer.Option("--gates", help="Kinds, comma-separated.")] = "none,probe40,probe100,dense",
    gate_budgets: Annotated[str, typer.Option("--gate-budgets", help="Benign trigger rates.")] = "0.01,0.02,0.05",
    gate_confidences: Annotated[str, typer.Option("--gate-confidences", help="How sure they must hold.")] = "0.9,0.95",
    hand_made: Annotated[
        bool, typer.Option("--hand-made/--no-hand-made", help="Begin with the hand-made recipe's plans.")
    ] = True,
    directions: Annotated[
        str, typer.Option("--directions", help="How many directions are raised together; '' for none.")
    ] = "1,3",
    error_terms: Annotated[
        str, typer.Option("--error-terms", help="Behind gates: keep, correct (the SAE's error).")
    ] = "keep",
    leasts: Annotated[
        str, typer.Option("--leasts", help="Behind gates: share of the strength at the threshold.")
    ] = "1,0.5",
    judge: JudgeOption = None,
    model: ModelOption = ORGANISM,
    sae: SaeOption = ORGANISM,
    seed: SeedOption = 0,
) -> None:
    """Search features, operators, strengths, scopes and gates for the plan that refuses most within budgets."""
    from clampdown.study.budgets import Budgets
    from clampdown.study.study import make_study
    from clampdown.study.tune import run as job
    from clampdown.study.tune.prompts import FULL, QUICK
    from clampdown.study.tune.space import Choices
    from clampdown.study.tune.table import shown

    budgets = Budgets(max_over_refusal, max_capability_loss, max_broken, max_kl, confidence)
    choices = Choices(
        features, _names(operators), _names(scopes), _names(gates), _shares(gate_budgets), set_size,
        _shares(gate_confidences), hand_made, _counts(directions), _names(error_terms), _shares(leasts),
    )  # fmt: skip
    choices.check()
    scale = QUICK if quick else FULL
    scale = dataclasses.replace(scale, trials=trials or scale.trials, features=top or scale.features)
    progress = stages()
    with progress.stage("Loading"):
        found = make_study(model, sae, prompts.load(), judge=judge, seed=seed)
    request = job.Request(budgets, choices, scale)
    if dry_run:
        for line in job.dry_run(found, request, progress):
            console.print(line, highlight=False)
        return
    run = job.run_tune(found, request, out, progress)
    show_run(out, progress)
    console.print(shown(run.to_json(), console.width))
    console.print(f"[bold]plan:[/bold] {out / 'plan.toml'}", soft_wrap=True)


def _counts(text: str) -> tuple[int, ...]:
    """Raises `PlanError` for what is no list of whole numbers."""
    found = _shares(text)
    if any(number != int(number) for number in found):
        raise PlanError(f"'{text}' is not a list of whole numbers", hint="for example --directions 1,3")
    return tuple(map(int, found))


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names_in(text)))


def _shares(text: str) -> tuple[float, ...]:
    """Raises `PlanError` for what is no list of numbers."""
    try:
        return tuple(sorted({float(part) for part in text.split(",") if part.strip()}))
    except ValueError as error:
        raise PlanError(f"'{text}' is not a list of shares", hint="for example --gate-budgets 0.01,0.02") from error
