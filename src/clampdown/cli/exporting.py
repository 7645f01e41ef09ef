"""Commands that write plans for other tools, and make plans of other tools' files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clampdown.cli.app import app, console, escaped, show_facts, stages
from clampdown.cli.options import JudgeOption, PromptOptions, asks_prompts

if TYPE_CHECKING:
    from clampdown.interop.exports.exporting import Exported


@app.command("export")
@asks_prompts
def export_plan(
    prompts: PromptOptions,
    plan: Annotated[Path, typer.Argument(help="The plan.toml to write for another tool.")],
    to: Annotated[str, typer.Option("--to", help="The format; `clampdown export PLAN --to list` names all.")],
    out: Annotated[Path | None, typer.Option("--out", help="The file or directory to write.")] = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Write the nearest that the format can say, and measure the difference.")
    ] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, help="With --lossy: prompts of each suite.")] = 24,
    judge: JudgeOption = None,
    model: Annotated[str | None, typer.Option("--model", help="Default: the model that the plan names.")] = None,
    sae: Annotated[str | None, typer.Option("--sae", help="Default: the SAE that the plan names.")] = None,
) -> None:
    """Write a plan in another tool's format: exactly, or not at all, unless --lossy."""
    from clampdown.interop.exports import exporting
    from clampdown.interop.exports.table import FORMATS
    from clampdown.steering.plan import read_plan

    if to == "list":
        show_facts((row.name, row.of) for row in FORMATS.values())
        return
    progress = stages()
    with progress.stage("Loading"):
        bound = exporting.bind(read_plan(plan), model, sae=sae)
    asked = exporting.Lossy(prompts.load(), judge, limit) if lossy else None
    found = exporting.export(bound, to, out, progress, asked)
    for line in _lines(found):
        console.print(escaped(line), highlight=False)
    console.print(f"written: {found.path}, and {found.sidecar.name} beside it", soft_wrap=True, highlight=False)


def _lines(found: Exported) -> list[str]:
    lines = [f"not as in the plan: {one}; instead, {one.instead}" for one in found.left_out]
    measured = found.difference
    if measured is not None:
        kl = "no benign replies" if measured.kl is None else f"{measured.kl:.4f} nats a token"
        lines.append(f"KL(plan || export) on {measured.n_prompts} benign prompts: {kl}")
        for row in measured.refusals:
            lines.append(
                f"refusals of {row.suite}: {_rate(row.plan.value)} under the plan, {_rate(row.export.value)} exported "
                f"(n = {row.plan.n}, {row.flipped} changed, {row.unjudged} not judged; {measured.judge})"
            )
    return lines


def _rate(value: float | None) -> str:
    return "none judged" if value is None else f"{value:.2f}"


@app.command("import")
@asks_prompts
def import_plan(
    prompts: PromptOptions,
    source: Annotated[str, typer.Argument(help="A file of another tool, or the address of a feature's page.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("plan.toml"),
    form: Annotated[str | None, typer.Option("--format", help="Its format; default: by its name.")] = None,
    strength: Annotated[
        str | None, typer.Option("--strength", help="A factor for vectors; for a feature 12, 1.5p99, 1.5max, ...")
    ] = None,
    operator: Annotated[
        str | None,
        typer.Option("--operator", help="For a feature: clamp, clamp_active, floor, scale or add (default)."),
    ] = None,
    scope: Annotated[str, typer.Option("--scope", help="all, prompt, generated, assistant, last_user.")] = "all",
    name: Annotated[str | None, typer.Option("--name", help="What to call the plan.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The model; an address may imply it.")] = None,
    sae: Annotated[str | None, typer.Option("--sae", help="The SAE; an address may imply it.")] = None,
) -> None:
    """Make a plan of another tool's steering file, or of a feature's address."""
    from clampdown.interop.exports import exporting
    from clampdown.steering.plan import write_plan
    from clampdown.types import Split

    data = prompts.load()
    shown = tuple(data.prompts(Split.DISCOVERY, exporting.MEAN_PROMPTS)) if data is not None else ()
    with stages().stage("Reading"):
        found = exporting.import_plan(
            source, model, form,
            strength=strength, operator=operator, scope=scope, name=name, sae=sae, prompts=shown,
        )  # fmt: skip
    write_plan(out, found)
    from clampdown.study import plan as job

    show_facts(job.lines(found))
    console.print(f"written: {out}", soft_wrap=True)
