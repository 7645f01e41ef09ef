"""The command line: the composition root, where packages meet. Nothing heavy is imported until a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from clampdown.config import CODE_VERSION, ORGANISM
from clampdown.errors import ClampdownError, ModelError

if TYPE_CHECKING:
    from clampdown.commands.stages import Stages

console = Console()
errors = Console(stderr=True)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Find the features that make a language model refuse, steer them, and see exactly what it costs.",
)
organism_app = typer.Typer(no_args_is_help=True, help="Train and measure the embedded model.")
app.add_typer(organism_app, name="organism")
features_app = typer.Typer(no_args_is_help=True, help="Look at features that were found.")
app.add_typer(features_app, name="features")
suites_app = typer.Typer(no_args_is_help=True, help="The public suites that can be loaded.")
app.add_typer(suites_app, name="suites")


gate_app = typer.Typer(no_args_is_help=True, help="Decide which conversations a plan steers.")
app.add_typer(gate_app, name="gate")
plan_app = typer.Typer(no_args_is_help=True, help="Make a plan by hand, and see what a plan does.")
app.add_typer(plan_app, name="plan")

ModelOption = Annotated[str, typer.Option("--model", help="'organism', a directory, or a hub id.")]
SaeOption = Annotated[str, typer.Option("--sae", help="'organism', 'organism:x8', a directory, or 'release:id'.")]
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


def _stages() -> Stages:
    from clampdown.commands.stages import Stages

    return Stages(console)


@app.command()
def demo(
    out: OutOption = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer prompts, same files.")] = False,
    model: ModelOption = ORGANISM,
    sae: SaeOption = ORGANISM,
    seed: SeedOption = 0,
) -> None:
    """Run the whole job on the embedded model: find, steer, measure the trade-off, write a report."""
    from clampdown.commands import demo as job
    from clampdown.commands.experiment import organism_subject

    stages = _stages()
    with stages.stage("Loading"):
        subject = organism_subject(model, sae, seed=seed)
    job.run_demo(subject, out, job.QUICK if quick else job.FULL, stages)
    _show(out, stages)


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
    from clampdown.commands import compare_methods as job
    from clampdown.commands import demo as sizes
    from clampdown.commands.experiment import organism_subject

    stages = _stages()
    with stages.stage("Loading"):
        subject = organism_subject(model, sae, seed=seed)
    request = job.Request(kl=kl, n_random=n_random)
    summary = job.run_compare_methods(subject, out, sizes.QUICK if quick else sizes.FULL, request, stages)
    _show(out, stages)
    console.print(job.shown(summary))


@app.command()
def discover(
    out: OutOption = Path("runs/discover"),
    finder: Annotated[str, typer.Option("--finder", help="Finders by name, comma-separated; 'both' or 'all'.")] = "",
    harmful: Annotated[Path | None, typer.Option("--harmful", help="JSONL or CSV of harmful prompts.")] = None,
    harmless: Annotated[Path | None, typer.Option("--harmless", help="JSONL or CSV of harmless prompts.")] = None,
    jailbroken: Annotated[
        Path | None, typer.Option("--jailbroken", help="Harmful prompts inside wrappers, with the same ids.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Single-prompt finder: the prompt to refuse.")] = None,
    judge: Annotated[str | None, typer.Option("--judge", help="Who tells refusals: exact, rules, llm:...")] = None,
    pooling: Annotated[str, typer.Option("--pooling", help="How prompts are pooled.")] = "assistant_start",
    literal: Annotated[bool, typer.Option("--literal", help="Contrast as published: no activity floor.")] = False,
    top: Annotated[int, typer.Option("--top", min=1, help="How many features to keep.")] = 64,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Clamp the finalists and rank by effect.")] = True,
    refine: Annotated[bool, typer.Option("--refine", help="Refine what was found into plan.toml.")] = False,
    set_size: Annotated[int, typer.Option("--set-size", min=1, help="Refine to at most this many features.")] = 1,
    scan: Annotated[bool, typer.Option("--scan", help="Scan every layer and SAE instead of ranking features.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
    model: ModelOption = ORGANISM,
    sae: SaeOption = ORGANISM,
    seed: SeedOption = 0,
) -> None:
    """Find refusal features by clamping, gradients, contrasts or one prompt; refine them into a plan."""
    from clampdown.commands import discover as job
    from clampdown.commands.refining import refinement_table

    request = job.Request(
        finders=job.finder_names(finder),
        harmful=harmful,
        harmless=harmless,
        jailbroken=jailbroken,
        prompt=prompt,
        judge=judge,
        pooling=pooling,
        literal=literal,
        top=top,
        check=check,
        refine=refine,
        set_size=set_size,
        seed=seed,
    )
    stages = _stages()
    if dry_run:
        job.dry_run(model, sae, request, stages)
        return
    if scan:
        console.print(job.scan_table(job.run_scan(model, sae, request, out, stages)))
        return
    discovered = job.run_discover(model, sae, request, out, stages)
    for path, found in discovered.written:
        _show_features(found)
        console.print(f"written: {path}")
    if discovered.refinement is not None:
        console.print(refinement_table(discovered.refinement))
        console.print(f"written: {discovered.refinement.path}")


@app.command()
def sweep(
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
    out: OutOption = Path("runs/sweep"),
    model: ModelOption = ORGANISM,
    sae: SaeOption = ORGANISM,
    seed: SeedOption = 0,
) -> None:
    """Steer at several strengths and measure refusals, capability and cost at each."""
    from clampdown.commands import sweep as job
    from clampdown.commands.experiment import organism_subject

    request = job.Request(
        features=tuple(feature or ()),
        features_file=features,
        plan_file=plan,
        multiples=job.parse_multiples(multiples),
        unit=job.parse_unit(unit),
        operator=operator,
        scope=scope,
        error_term=error_term,
        suites=tuple(name.strip() for name in suites.split(",") if name.strip()),
        split=split,
        limit=limit,
    )
    stages = _stages()
    with stages.stage("Loading"):
        subject = organism_subject(model, sae, seed=seed)
    job.run_sweep(subject, request, out, stages)
    _show(out, stages)


@app.command()
def screen(
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
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Prompts per harmful suite to screen on.")] = 16,
    split: Annotated[str, typer.Option("--split", help="Where the kept are measured: validation or test.")] = (
        "validation"
    ),
    limit: Annotated[int, typer.Option("--limit", min=1, help="Prompts per suite for the kept.")] = 50,
    out: OutOption = Path("runs/screen"),
    model: ModelOption = ORGANISM,
    sae: SaeOption = ORGANISM,
    seed: SeedOption = 0,
) -> None:
    """Read hundreds of clamps from prefills, generate for the best few, and say why the others were dropped."""
    from clampdown.commands import screen as job
    from clampdown.commands.experiment import organism_subject
    from clampdown.commands.sweep import parse_multiples
    from clampdown.tradeoff.screening import Halving

    request = job.Request(
        features_file=features,
        multiples=parse_multiples(multiples),
        scopes=tuple(name.strip() for name in scopes.split(",") if name.strip()),
        top=top,
        prompts=prompts,
        halving=Halving(keep=keep, kl_limit=kl_limit),
        split=split,
        limit=limit,
    )
    stages = _stages()
    with stages.stage("Loading"):
        subject = organism_subject(model, sae, seed=seed)
    job.run_screen(subject, request, out, stages)
    _show(out, stages)


@app.command()
def evaluate(
    plans: Annotated[list[Path], typer.Argument(help="One or more plan.toml of one model.")],
    suites: Annotated[
        str, typer.Option("--suites", help="Names or files, comma-separated; default: the model's.")
    ] = "",
    judge: Annotated[str | None, typer.Option("--judge", help="Who judges; default: the embedded exact judge.")] = None,
    split: Annotated[str, typer.Option("--split", help="validation or test.")] = "test",
    limit: Annotated[int, typer.Option("--limit", min=1, help="Prompts per suite.")] = 60,
    controls: Annotated[bool, typer.Option("--controls", help="Add the first plan's matched controls.")] = False,
    match: Annotated[str, typer.Option("--match", help="Match controls on 'edit' size or benign 'kl'.")] = "edit",
    random_features: Annotated[int, typer.Option("--random-features", min=0, help="How many random controls.")] = 20,
    harmful: Annotated[Path | None, typer.Option("--harmful", help="Controls: harmful prompts to read.")] = None,
    harmless: Annotated[Path | None, typer.Option("--harmless", help="Controls: harmless prompts to read.")] = None,
    likelihood: Annotated[
        bool | None, typer.Option("--likelihood/--no-likelihood", help="Score options by likelihood as well.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest reply.")] = 40,
    batch_rows: Annotated[
        int | None,
        typer.Option("--batch-rows", min=1, help="Replies generated together. Default: what memory has room for."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and stop.")] = False,
    out: OutOption = Path("runs/evaluate"),
    model: Annotated[str | None, typer.Option("--model", help="Default: the model that the plan names.")] = None,
    seed: SeedOption = 0,
) -> None:
    """Measure plans beside the baseline and matched controls; a killed run resumes."""
    from clampdown.commands import control_table
    from clampdown.commands import evaluate as job

    request = job.Request(
        plans=tuple(plans),
        suites=tuple(name.strip() for name in suites.split(",") if name.strip()),
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
        harmful=harmful,
        harmless=harmless,
    )
    stages = _stages()
    evaluation = job.prepare(request, stages)
    console.print(f"to do: {job.preview(evaluation, out)}", highlight=False)
    if dry_run:
        return
    summary = job.run_evaluate(evaluation, out, request, stages)
    _show(out, stages)
    if evaluation.controls:
        console.print(control_table.shown(evaluation.controls, summary))


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="A run directory, or DIR:ARM.")],
    second: Annotated[str, typer.Argument(help="A run directory, DIR:ARM, or an arm of the first one's directory.")],
    examples: Annotated[int, typer.Option("--examples", min=0, help="Flipped prompts to show per suite.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything as JSON.")] = None,
) -> None:
    """Compare two runs or two arms on the same prompts: paired differences, tests, and what flipped."""
    from clampdown.commands import compare as job

    found = job.run_compare(first, second)
    console.print(job.shown(found, examples))
    if json_file is not None:
        job.write_comparison(json_file, found)
        console.print(f"written: {json_file}")


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
    from clampdown.commands import multiturn as job
    from clampdown.evaluation.multiturn import Rules

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
    console.print(job.table(job.run_multiturn(request, out, _stages())))
    console.print(f"written: {out}")


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="A run directory with summary.json.")],
) -> None:
    """Write report.html from a finished run, and print its table."""
    _show(directory, _stages())


@app.command()
def check(
    plan: Annotated[Path, typer.Argument(help="The plan.toml to try.")],
    model: Annotated[str | None, typer.Option("--model", help="Default: the model that the plan names.")] = None,
    sae: Annotated[str | None, typer.Option("--sae", help="Default: the SAE that the plan names.")] = None,
) -> None:
    """Try a plan on its model: hooks fire, zero is the identity, the edit is what its formula says."""
    from clampdown.commands import check as checking

    with _stages().stage("Checking"):
        checks = checking.run_checks(plan, model, sae)
    checking.show(checks, console)


@app.command()
def explain(
    plan: Annotated[Path, typer.Argument(help="The plan.toml to explain.")],
    out: Annotated[Path | None, typer.Option("--out", help="Directory to write to; default: the plan's own.")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="JSONL or CSV of benign prompts; default: the embedded suites.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Benign prompts, and items of each suite.")] = 60,
    controls: Annotated[int, typer.Option("--controls", min=1, help="Random features, and directions.")] = 6,
    model: Annotated[str | None, typer.Option("--model", help="Default: the model that the plan names.")] = None,
    sae: Annotated[str | None, typer.Option("--sae", help="Default: the SAE that the plan names.")] = None,
    seed: SeedOption = 0,
) -> None:
    """Why a plan costs what it costs: edit size, tokens, layers, features, and pushes of the same size."""
    from clampdown.commands import explain as job
    from clampdown.reports.explain_terminal import explanation_summary

    request = job.Request(prompts, limit, controls, seed=seed)
    found = job.run(plan, out or plan.parent, model, sae, request, _stages())
    console.print(explanation_summary(found, console.width))
    console.print(f"written: {(out or plan.parent) / job.PAGE_NAME}", soft_wrap=True)


@app.command()
def chat(
    plan: Annotated[Path | None, typer.Option("--plan", help="plan.toml to steer with; default: none.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Ask this once and exit.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system prompt for both sides.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest reply.")] = 64,
    model: ModelOption = ORGANISM,
    sae: Annotated[str | None, typer.Option("--sae", help="Default: the SAE that the plan names.")] = None,
) -> None:
    """Talk to the model: the baseline's and the steered answer side by side."""
    from clampdown.commands import chat as chatting

    session = chatting.open_session(model, sae, plan, system=system, max_new_tokens=max_new_tokens)
    if prompt is not None:
        console.print(chatting.side_by_side(session.ask(prompt), console.width))
        return
    chatting.talk(session, console)


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
    from clampdown.commands import features as job
    from clampdown.reports.terminal import features_table

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
    from clampdown.commands import features as job
    from clampdown.reports.card_page import write_card_page
    from clampdown.reports.card_terminal import card_summary

    request = job.ShowRequest(prompts, tuple(features or ()), limit, seed)
    card = job.show(feature, model, sae, request, _stages())
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
    from clampdown.commands import features as job
    from clampdown.reports.card_terminal import agreement_summary

    console.print(agreement_summary(job.compare(first, second, score or ()), console.width))


@plan_app.command("make")
def plan_make(
    feature: Annotated[list[int], typer.Option("--feature", help="Feature to steer; repeat for several.")],
    strength: Annotated[
        list[str], typer.Option("--strength", help="12, 1.5p99, 1.5max, 0.1resid or 5%; one for all or one for each.")
    ],
    operator: Annotated[str, typer.Option("--operator", help="clamp, clamp_active, floor, scale or add.")] = "clamp",
    scope: Annotated[str, typer.Option("--scope", help="all, prompt, generated, assistant, last_user.")] = "all",
    error_term: Annotated[str, typer.Option("--error-term", help="keep or drop the SAE's error.")] = "keep",
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Calibration prompts; default: the embedded model's own.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="What to call it.")] = "",
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("plan.toml"),
    model: ModelOption = ORGANISM,
    sae: SaeOption = ORGANISM,
    site: Annotated[str | None, typer.Option("--site", help="Where the SAE reads, if its files do not say.")] = None,
) -> None:
    """Write a plan that steers features, with its strengths resolved to raw values."""
    from clampdown.commands import plan as job
    from clampdown.steering.units import Strength

    strengths = tuple(Strength.parse(text) for text in strength)
    request = job.Request(tuple(feature), strengths, operator, scope, error_term, name)
    with _stages().stage("Calibrating"):
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
    from clampdown.commands import plan as job

    _show_plan(file)
    if check:
        from clampdown.steering.plan import read_plan

        with _stages().stage("Checking"):
            job.check_against(read_plan(file), model, sae)
        console.print("fits its model and SAE")


@app.command("judge-agreement")
def judge_agreement(
    files: Annotated[list[Path] | None, typer.Argument(help="Further files of labelled replies.")] = None,
    replies: Annotated[
        list[Path] | None, typer.Option("--replies", help="CSV or JSONL: prompt, completion, final_label.")
    ] = None,
    judge: Annotated[str, typer.Option("--judge", help="The judge to measure, such as 'rules'.")] = "rules",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Measure a judge against human labels: confusion matrix, and kappa with its interval."""
    from clampdown.commands import judge_agreement as job

    console.print(job.run_agreement(judge, [*(replies or ()), *(files or ())], json_file, _stages()))


@suites_app.command("list")
def suites_list() -> None:
    """All public suites with their licences and sizes."""
    from clampdown.commands import suites

    console.print(suites.listed())


@suites_app.command("show")
def suites_show(
    suite: Annotated[str, typer.Argument(help="NAME, NAME=FILE or FILE.")],
) -> None:
    """Where a suite comes from; with a file, what it holds."""
    from clampdown.commands import suites

    console.print(suites.shown(suite))


@gate_app.command("calibrate")
def gate_calibrate(
    plan: Annotated[Path, typer.Argument(help="The plan.toml to put behind a gate.")],
    kind: Annotated[str, typer.Option("--kind", help="feature, probe, dense or cosine.")] = "probe",
    budget: Annotated[float, typer.Option("--budget", help="Share of benign prompts that may trigger it.")] = 0.02,
    confidence: Annotated[float, typer.Option("--confidence", help="How sure the budget must hold.")] = 0.95,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Prompts with suite, harmful and split; default: embedded corpus.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Benign calibration prompts at most.")] = 800,
    otherwise: Annotated[
        Path | None, typer.Option("--otherwise", help="A plan for over-refused prompts: makes it two-sided.")
    ] = None,
    borderline: Annotated[
        str, typer.Option("--borderline", help="Suites that the second gate is to find.")
    ] = "borderline,about_harm",
    limit: Annotated[int, typer.Option("--limit", min=1, help="Prompts per suite of the embedded corpus.")] = 240,
    site: Annotated[str | None, typer.Option("--site", help="Where to read; default: at the plan's SAE.")] = None,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("gated.toml"),
    seed: SeedOption = 0,
) -> None:
    """Put a plan behind a gate whose benign trigger rate is bounded, and say how often it fires."""
    from clampdown.commands import gate as job

    names = tuple(name.strip() for name in borderline.split(",") if name.strip())
    request = job.Request(plan, kind, budget, confidence, prompts, otherwise, names, n, limit, site, seed)
    found = job.calibrate(request, out, _stages())
    for gate in found.plan.gates:
        console.print(f"{gate.kind} gate at {gate.site}, fires above {gate.threshold:.4g}", highlight=False)
        if gate.guarantee:
            console.print(job.promise(gate.guarantee), soft_wrap=True, highlight=False)
    console.print(job.shown(found))
    console.print(f"written: {out}", soft_wrap=True)


@organism_app.command("train")
def organism_train(
    out: Annotated[Path, typer.Option("--out", help="Where the model and its SAEs are written.")],
    seed: Annotated[int, typer.Option("--seed", help="Seed of weights and corpus order.")] = 0,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Optimiser steps; default as shipped.")] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads; part of what a seed means.")] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")] = False,
) -> None:
    """Train the embedded model and its SAEs from scratch; resumes after an interruption."""
    from clampdown.organism import train

    train.train_organism(out, seed, steps or train.DEFAULT_STEPS, threads=threads, resume=not fresh)
    console.print(f"trained: {out}")


@organism_app.command("measure")
def organism_measure(
    directory: Annotated[Path | None, typer.Argument(help="A trained organism; default: the shipped one.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Prompts per family.")] = 240,
) -> None:
    """Measure a trained organism against its targets on held-out prompts."""
    from clampdown.organism import WEIGHTS, measure

    where = directory or WEIGHTS
    if not (where / "model" / "config.json").is_file():
        raise ModelError(
            f"no organism at {where}: it has no model/config.json",
            hint="give a directory of `clampdown organism train`",
        )
    with _stages().stage("Measuring"):
        rows = measure.measure(where, n)
    console.print(measure.table(rows))


def _show(directory: Path, stages: Stages) -> None:
    """Write the report and print the table."""
    from clampdown.reports.page import write_report
    from clampdown.reports.run import read_run
    from clampdown.reports.terminal import run_summary

    with stages.stage("Writing the report"):
        path = write_report(directory)
    console.print(run_summary(read_run(directory), console.width))
    console.print(f"[bold]report:[/bold] {path}", soft_wrap=True)


def _show_plan(path: Path) -> None:
    from clampdown.commands import plan as job

    for heading, text in job.show(path):
        console.print(f"[bold]{heading:>12}[/bold]  {_escaped(text)}", soft_wrap=True, highlight=False)


def _show_features(found: Any) -> None:
    from clampdown.reports.terminal import print_features

    print_features(found, console)


def main() -> None:
    """Entry point: a `ClampdownError` is one readable message and exit code 2."""
    try:
        app()
    except ClampdownError as error:
        errors.print(f"[bold red]error:[/bold red] {_escaped(error.message)}", soft_wrap=True, highlight=False)
        if error.hint:
            errors.print(f"[dim]hint: {_escaped(error.hint)}[/dim]", soft_wrap=True, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("stopped; what was finished is kept")
        sys.exit(130)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
