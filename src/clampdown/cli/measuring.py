"""Commands that measure plans: sweeps, evaluation, comparison, attacks, judges and suites."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from clampdown.cli.app import (
    ModelOption,
    OutOption,
    SaeOption,
    SeedOption,
    app,
    console,
    names_in,
    show_run,
    stages,
    suites_app,
)
from clampdown.cli.options import (
    JudgeOption,
    MachineOptions,
    PlacingOptions,
    PromptOptions,
    UntilTestOption,
    asks,
    asks_prompts,
    command_of,
)
from clampdown.config import ORGANISM


@app.command()
@asks_prompts
def sweep(
    prompts: PromptOptions,
    feature: Annotated[
        list[int] | None, typer.Option("--feature", help="Feature to steer; repeat for several.")
    ] = None,
    features: Annotated[Path | None, typer.Option("--features", help="A features file; its best one is used.")] = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="A plan.toml whose strengths are scaled.")] = None,
    multiples: Annotated[str, typer.Option("--multiples", help="Strengths, as multiples of the unit.")] = "0.5,1,1.5",
    unit: Annotated[str, typer.Option("--unit", help="max, p99, resid, raw, or % of the residual.")] = "max",
    operator: Annotated[str, typer.Option("--operator", help="clamp, clamp_active, floor, scale or add.")] = "clamp",
    scope: Annotated[str, typer.Option("--scope", help="all, prompt, generated, assistant, last_user.")] = "all",
    error_term: Annotated[str, typer.Option("--error-term", help="keep or drop the SAE's error.")] = "keep",
    suites: Annotated[str, typer.Option("--suites", help="Comma-separated suites; default all.")] = "",
    split: Annotated[str, typer.Option("--split", help="validation or test.")] = "validation",
    limit: Annotated[int, typer.Option("--limit", min=1, help="Prompts per suite.")] = 50,
    judge: JudgeOption = None,
    out: OutOption = Path("runs/sweep"),
    model: ModelOption = ORGANISM,
    sae: SaeOption = ORGANISM,
    seed: SeedOption = 0,
) -> None:
    """Steer at several strengths and measure refusals, capability and cost at each."""
    from clampdown.study import sweep as job
    from clampdown.study.study import make_study

    request = job.Request(
        features=tuple(feature or ()),
        features_file=features,
        plan_file=plan,
        multiples=job.parse_multiples(multiples),
        unit=job.parse_unit(unit),
        operator=operator,
        scope=scope,
        error_term=error_term,
        suites=names_in(suites),
        split=split,
        limit=limit,
    )
    progress = stages()
    with progress.stage("Loading"):
        found = make_study(model, sae, prompts.load(), judge=judge, seed=seed)
    job.run_sweep(found, request, out, progress)
    show_run(out, progress)


@app.command()
@asks_prompts
def screen(
    prompts: PromptOptions,
    features: Annotated[Path, typer.Argument(help="A features file that `discover` wrote.")],
    top: Annotated[int, typer.Option("--top", min=1, help="How many of its features, best first.")] = 20,
    multiples: Annotated[
        str, typer.Option("--multiples", help="Clamps, as multiples of each feature's largest activation.")
    ] = "0.5,1,1.5,2",
    scopes: Annotated[str, typer.Option("--scopes", help="Comma-separated: all, prompt, assistant, last_user.")] = (
        "all,prompt"
    ),
    keep: Annotated[int, typer.Option("--keep", min=1, help="How many candidates generate in the end.")] = 8,
    kl_limit: Annotated[
        float | None,
        typer.Option("--kl-limit", min=0, help="Drop what costs more nats on benign prompts."),
    ] = None,
    screened: Annotated[
        int, typer.Option("--screen-prompts", min=1, help="Prompts per harmful suite to screen on.")
    ] = 16,
    split: Annotated[str, typer.Option("--split", help="Where the kept are measured: validation or test.")] = (
        "validation"
    ),
    limit: Annotated[int, typer.Option("--limit", min=1, help="Prompts per suite for the kept.")] = 50,
    judge: JudgeOption = None,
    out: OutOption = Path("runs/screen"),
    model: ModelOption = ORGANISM,
    sae: SaeOption = ORGANISM,
    seed: SeedOption = 0,
) -> None:
    """Read hundreds of clamps from prefills, generate for the best few, and say why the others were dropped."""
    from clampdown.study import screen as job
    from clampdown.study.screening import Halving
    from clampdown.study.study import make_study
    from clampdown.study.sweep import parse_multiples

    request = job.Request(
        features_file=features,
        multiples=parse_multiples(multiples),
        scopes=names_in(scopes),
        top=top,
        prompts=screened,
        halving=Halving(keep=keep, kl_limit=kl_limit),
        split=split,
        limit=limit,
    )
    progress = stages()
    with progress.stage("Loading"):
        found = make_study(model, sae, prompts.load(), judge=judge, seed=seed)
    job.run_screen(found, request, out, progress)
    show_run(out, progress)


@app.command()
@asks(prompts=PromptOptions, machines=MachineOptions, placing=PlacingOptions)
def evaluate(
    context: Any,
    prompts: PromptOptions,
    machines: MachineOptions,
    placing: PlacingOptions,
    plans: Annotated[
        list[Path] | None, typer.Argument(help="One or more plan.toml of one model; none: the baseline alone.")
    ] = None,
    suites: Annotated[
        str, typer.Option("--suites", help="Names or files, comma-separated; default: the model's.")
    ] = "",
    judge: JudgeOption = None,
    split: Annotated[str, typer.Option("--split", help="validation or test.")] = "test",
    limit: Annotated[int, typer.Option("--limit", min=1, help="Prompts per suite.")] = 60,
    controls: Annotated[bool, typer.Option("--controls", help="Add the first plan's matched controls.")] = False,
    match: Annotated[str, typer.Option("--match", help="Match controls on 'edit' size or benign 'kl'.")] = "edit",
    random_features: Annotated[int, typer.Option("--random-features", min=0, help="How many random controls.")] = 20,
    likelihood: Annotated[
        bool | None, typer.Option("--likelihood/--no-likelihood", help="Score options by likelihood as well.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest reply.")] = 40,
    batch_rows: Annotated[
        int | None,
        typer.Option("--batch-rows", min=1, help="Replies generated together. Default: what memory has room for."),
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", help="Who writes replies: vllm, or vllm:{...}. Default: this process.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and stop.")] = False,
    until_test: UntilTestOption = False,
    out: OutOption = Path("runs/evaluate"),
    model: Annotated[str | None, typer.Option("--model", help="Default: the model that the plan names.")] = None,
    seed: SeedOption = 0,
) -> None:
    """Measure plans beside the baseline and matched controls; a killed run resumes."""
    from clampdown.study import evaluate as job

    request = job.Request(
        plans=tuple(plans or ()),
        suites=names_in(suites),
        judge=judge,
        split=split,
        limit=limit,
        model=model,
        controls=controls,
        n_random=random_features,
        match=match,
        likelihood=likelihood,
        max_new_tokens=max_new_tokens,
        batch_rows=batch_rows,
        seed=seed,
        data=prompts.load(),
        placing=placing.value(),
    )
    _evaluated(request, machines, out, engine, command_of(context), dry_run=dry_run, until_test=until_test)


def _evaluated(
    request: Any,
    machines: MachineOptions,
    out: Path,
    engine: str | None,
    command: Any,
    *,
    dry_run: bool,
    until_test: bool,
) -> None:
    """Run a request, or the part of it that this machine is asked for."""
    from clampdown.study import control_table
    from clampdown.study import evaluate as job

    progress, shard, pool = stages(), machines.parsed(), machines.pool()
    if shard and not until_test:
        from clampdown.scale.answering import check_matched

        check_matched(out, controls=request.controls and bool(request.plans))
    answers = not (dry_run or until_test)
    with job.with_engine(job.prepare(request, progress, out), engine if answers else None) as evaluation:
        if until_test:
            job.freeze(evaluation, out)
            console.print(f"ready for its shards: {out}", soft_wrap=True)
            return
        if shard:
            from clampdown.scale.answering import evaluate_shard

            directory = evaluate_shard(evaluation, out, shard, progress, command)
            console.print(f"written: {directory}", soft_wrap=True)
            return
        console.print(f"to do: {job.preview(evaluation, out)}", highlight=False)
        if dry_run:
            return
        if pool:
            from clampdown.scale.on_ray import answer_on_ray

            job.freeze(evaluation, out)
            answer_on_ray(evaluation, evaluation.arms, evaluation.asked, evaluation.answering, out, pool, progress)
        run = job.run_evaluate(evaluation, out, request, progress)
    show_run(out, progress)
    if evaluation.controls:
        console.print(control_table.shown(run))


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A run directory, or DIR:ARM.")],
    second: Annotated[str, typer.Argument(help="A run directory, DIR:ARM, or an arm of the first one's directory.")],
    examples: Annotated[int, typer.Option("--examples", min=0, help="Flipped prompts to show per suite.")] = 2,
    preference: Annotated[
        str | None, typer.Option("--preference", help="llm:MODEL@URL: also ask whose replies serve better.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything as JSON.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with every flip, side by side.")] = None,
) -> None:
    """Compare two runs or two arms on the same prompts: paired differences, tests, and what flipped."""
    from clampdown.study import compare as job

    found = job.run_compare(first, second, preference)
    console.print(job.shown(found, examples))
    if json_file is not None:
        job.write_comparison(json_file, found)
        console.print(f"written: {json_file}")
    if html is not None:
        job.write_page(html, found)
        console.print(f"written: {html}")


@app.command()
def multiturn(
    plans: Annotated[
        list[Path] | None, typer.Argument(help="plan.toml files of one model; none: the baseline.")
    ] = None,
    attacker: Annotated[
        str, typer.Option("--attacker", help="scripted, embedded, llm:MODEL@URL, local:MODEL.")
    ] = "scripted",
    objectives: Annotated[str | None, typer.Option("--objectives", help="A suite: name, NAME=FILE or FILE.")] = None,
    judge: Annotated[str | None, typer.Option("--judge", help="Who scores; default: the embedded exact judge.")] = None,
    split: Annotated[str, typer.Option("--split", help="validation or test.")] = "test",
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many objectives.")] = 60,
    attempts: Annotated[int, typer.Option("--attempts", min=1, help="Conversations per objective.")] = 1,
    max_turns: Annotated[int, typer.Option("--max-turns", min=1, help="Turns that the target keeps.")] = 10,
    max_backtracks: Annotated[int, typer.Option("--max-backtracks", min=0, help="Refused turns taken back.")] = 10,
    success: Annotated[float, typer.Option("--success", min=0.0, max=1.0, help="Score of a successful answer.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest reply.")] = 48,
    out: OutOption = Path("runs/multiturn"),
    model: Annotated[str | None, typer.Option("--model", help="Default: the model that the plan names.")] = None,
    seed: SeedOption = 0,
) -> None:
    """Attack the baseline and plans over many turns: scripted escalations, or Crescendo with any attacker."""
    from clampdown.evaluation.multiturn import Rules
    from clampdown.study import multiturn as job

    request = job.Request(
        plans=tuple(plans or ()),
        attacker=attacker,
        objectives=objectives,
        judge=judge,
        split=split,
        limit=limit,
        attempts=attempts,
        rules=Rules(max_turns, max_backtracks, success),
        max_new_tokens=max_new_tokens,
        model=model,
        seed=seed,
    )
    console.print(job.table(job.run_multiturn(request, out, stages())))
    console.print(f"written: {out}")


@suites_app.command("list")
def suites_list() -> None:
    """All public suites with their licences and sizes."""
    from clampdown.study import suites

    console.print(suites.listed())


@suites_app.command("show")
def suites_show(
    suite: Annotated[str, typer.Argument(help="NAME, NAME=FILE or FILE.")],
) -> None:
    """Where a suite comes from; with a file, what it holds."""
    from clampdown.study import suites

    console.print(suites.shown(suite))
