"""Commands about one plan: make, show, check, gate, explain, talk to it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from clampdown.cli.app import (
    ModelOption,
    SaeOption,
    SeedOption,
    app,
    console,
    gate_app,
    names_in,
    plan_app,
    show_facts,
    stages,
)
from clampdown.cli.options import JudgeOption, PromptOptions, asks_prompts
from clampdown.config import ORGANISM


@plan_app.command("make")
def plan_make(
    strength: Annotated[
        list[str], typer.Option("--strength", help="12, 1.5p99, 1.5max, 0.1resid or 5%; one for all or one for each.")
    ],
    feature: Annotated[
        list[int] | None, typer.Option("--feature", help="Feature to steer; repeat for several.")
    ] = None,
    directions: Annotated[
        int, typer.Option("--directions", min=0, help="Edit along so many directions of refusal, found on --prompts.")
    ] = 0,
    operator: Annotated[
        str | None, typer.Option("--operator", help="clamp (default), floor, add, ..., floor_direction, ...")
    ] = None,
    scope: Annotated[str, typer.Option("--scope", help="all, prompt, generated, assistant, last_user.")] = "all",
    error_term: Annotated[
        str, typer.Option("--error-term", help="keep, drop or correct the SAE's error (pass on a part of it).")
    ] = "keep",
    rank: Annotated[
        int, typer.Option("--rank", min=1, help="With --error-term correct: in how many directions it is passed on.")
    ] = 32,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Calibration prompts; default: the embedded model's own.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="What to call it.")] = "",
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("plan.toml"),
    model: ModelOption = ORGANISM,
    sae: SaeOption = ORGANISM,
    site: Annotated[str | None, typer.Option("--site", help="Where the SAE reads, if its files do not say.")] = None,
) -> None:
    """Write a plan that steers features, or along directions, with its strengths resolved to raw values."""
    from clampdown.steering.units import Strength
    from clampdown.study import plan as job

    strengths = tuple(Strength.parse(text) for text in strength)
    operator = operator or ("floor_direction" if directions else "clamp")
    request = job.Request(tuple(feature or ()), strengths, operator, scope, error_term, name, directions, rank)
    with stages().stage("Calibrating"):
        job.make_plan(model, sae, request, prompts, out, site)
    _show_plan(out)
    console.print(f"written: {out}", soft_wrap=True)


@plan_app.command("show")
def plan_show(
    file: Annotated[Path, typer.Argument(help="A plan.toml.")],
    check: Annotated[
        bool, typer.Option("--check", help="Also load the model and the SAE that it was made for.")
    ] = False,
    model: Annotated[str | None, typer.Option("--model", help="With --check: another name of the model.")] = None,
    sae: Annotated[str | None, typer.Option("--sae", help="With --check: another name of the SAE.")] = None,
) -> None:
    """Say what a plan does, with its strengths in every unit, and check it against model and SAE."""
    from clampdown.study import plan as job

    _show_plan(file)
    if check:
        from clampdown.steering.plan import read_plan

        with stages().stage("Checking"):
            job.check_against(read_plan(file), model, sae)
        console.print("fits its model and SAE")


@app.command()
def check(
    plan: Annotated[Path, typer.Argument(help="The plan.toml to try.")],
    model: Annotated[str | None, typer.Option("--model", help="Default: the model that the plan names.")] = None,
    sae: Annotated[str | None, typer.Option("--sae", help="Default: the SAE that the plan names.")] = None,
) -> None:
    """Try a plan on its model: hooks fire, zero is the identity, the edit is what its formula says."""
    from clampdown.commands import check as checking

    with stages().stage("Checking"):
        checks = checking.run_checks(plan, model, sae)
    checking.show(checks, console)


class InDoubt(StrEnum):
    """What a gate does with a conversation of more turns than it was calibrated on."""

    READ = "read"
    STEER = "steer"


@gate_app.command("calibrate")
@asks_prompts
def gate_calibrate(
    prompts: PromptOptions,
    plan: Annotated[Path, typer.Argument(help="The plan.toml to put behind a gate.")],
    kind: Annotated[
        str | None, typer.Option("--kind", help="feature, probe (default), dense, cosine or ensemble.")
    ] = None,
    budget: Annotated[float, typer.Option("--budget", help="Share of benign prompts that may trigger it.")] = 0.02,
    confidence: Annotated[float, typer.Option("--confidence", help="How sure the budget must hold.")] = 0.95,
    n: Annotated[int, typer.Option("--n", min=1, help="Benign calibration prompts at most.")] = 3200,
    otherwise: Annotated[
        Path | None, typer.Option("--otherwise", help="A plan for over-refused prompts: makes it two-sided.")
    ] = None,
    found_by_second: Annotated[
        str, typer.Option("--down-suites", help="Suites that the second gate is to find.")
    ] = "borderline,about_harm",
    limit: Annotated[int, typer.Option("--limit", min=1, help="Prompts per suite of the embedded corpus.")] = 240,
    site: Annotated[str | None, typer.Option("--site", help="Where to read; default: at the plan's SAE.")] = None,
    first: Annotated[str, typer.Option("--first", help="Which side is asked first: up or down.")] = "up",
    down_budget: Annotated[
        float, typer.Option("--down-budget", help="With --first down: share of harmful prompts that it may take.")
    ] = 0.0025,
    features: Annotated[int | None, typer.Option("--features", help="Features of a probe at most; default 80.")] = None,
    inverse_penalty: Annotated[
        float | None, typer.Option("--inverse-penalty", help="A probe's C: smaller holds its weights smaller.")
    ] = None,
    turns: Annotated[int, typer.Option("--turns", min=1, help="Turns of a conversation that the bound covers.")] = 9,
    in_doubt: Annotated[
        InDoubt, typer.Option("--in-doubt", help="What to do with longer conversations: read them, or steer.")
    ] = InDoubt.READ,
    wrapped: Annotated[
        int, typer.Option("--wrapped", min=0, help="Learn from so many copies of each prompt in random wrappers.")
    ] = 0,
    unreadable: Annotated[
        int,
        typer.Option("--unreadable", min=0, help="Fire on text that the model cannot read: learn so many examples."),
    ] = 0,
    members: Annotated[
        str, typer.Option("--members", help="An ensemble's members: KIND or KIND@SITE, separated by commas.")
    ] = "",
    combine: Annotated[str, typer.Option("--combine", help="How an ensemble makes one score: mean or max.")] = "mean",
    least: Annotated[
        float,
        typer.Option("--least", help="Share of the strength at the threshold; grows with the score to all of it."),
    ] = 1.0,
    family_out: Annotated[
        bool, typer.Option("--family-out", help="Estimate detection in unseen wrappers by leaving out families.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("gated.toml"),
    seed: SeedOption = 0,
) -> None:
    """Put a plan behind a gate whose benign trigger rate is bounded, and say how often it fires."""
    from clampdown.study import gate as job
    from clampdown.study import gate_table as table

    names, chosen = names_in(found_by_second), names_in(members)
    kind = kind or (job.ENSEMBLE if chosen else "probe")
    request = job.Request(
        plan, kind, budget, confidence, otherwise, names, n, limit, site, seed, first, down_budget, features,
        inverse_penalty, turns, in_doubt.value, wrapped, unreadable, family_out, prompts.load(), chosen, combine, least,
    )  # fmt: skip
    found = job.calibrate(request, out, stages())
    for gate in found.plan.gates:
        console.print(f"gate: {table.what_it_reads(gate)}, fires above {gate.threshold:.4g}", highlight=False)
        if gate.full is not None:
            console.print(table.growth(gate), soft_wrap=True, highlight=False)
        if gate.guarantee:
            console.print(table.promise(gate.guarantee, gate.turns_calibrated), highlight=False)
    if found.sinks:
        console.print(found.sinks, soft_wrap=True, highlight=False)
    console.print(table.shown(found))
    for line in table.family_lines(found):
        console.print(line, highlight=False)
    console.print(f"written: {out}", soft_wrap=True)


@app.command()
def explain(
    plan: Annotated[Path, typer.Argument(help="The plan.toml to explain.")],
    out: Annotated[Path | None, typer.Option("--out", help="Directory to write to; default: the plan's own.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help="JSONL or CSV of prompts, benign ones among them; default: the embedded suites."
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Benign prompts, and items of each suite.")] = 60,
    controls: Annotated[int, typer.Option("--controls", min=1, help="Random features, and directions.")] = 6,
    model: Annotated[str | None, typer.Option("--model", help="Default: the model that the plan names.")] = None,
    sae: Annotated[str | None, typer.Option("--sae", help="Default: the SAE that the plan names.")] = None,
    judge: JudgeOption = None,
    seed: SeedOption = 0,
) -> None:
    """Why a plan costs what it costs: edit size, tokens, layers, features, and pushes of the same size."""
    from clampdown.reports.explain_terminal import explanation_summary
    from clampdown.study import explaining as job

    request = job.Request(prompts, limit, controls, judge=judge, seed=seed)
    found = job.run(plan, out or plan.parent, model, sae, request, stages())
    console.print(explanation_summary(found, console.width))
    console.print(f"written: {(out or plan.parent) / job.PAGE_NAME}", soft_wrap=True)


@app.command()
def chat(
    plan: Annotated[Path | None, typer.Option("--plan", help="plan.toml to steer with; default: none.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Ask this once and exit.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system prompt for both sides.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest reply.")] = 64,
    model: Annotated[str | None, typer.Option("--model", help="Default: the model that the plan names.")] = None,
    sae: Annotated[str | None, typer.Option("--sae", help="Default: the SAE that the plan names.")] = None,
) -> None:
    """Talk to the model: the baseline's and the steered answer side by side."""
    from clampdown.commands import chat as chatting

    session = chatting.open_session(model, sae, plan, system=system, max_new_tokens=max_new_tokens)
    if prompt is not None:
        console.print(chatting.side_by_side(session.ask(prompt), console.width))
        return
    chatting.talk(session, console)


def _show_plan(path: Path) -> None:
    from clampdown.study import plan as job

    show_facts(job.show(path))
