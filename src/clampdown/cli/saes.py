"""Commands that train SAEs and measure them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clampdown.cli.app import ModelOption, SaeOption, SeedOption, console, sae_app, stages
from clampdown.config import ORGANISM

TextOption = Annotated[
    list[Path], typer.Option("--text", help="JSONL or CSV of conversations or prompts, or plain text; repeatable.")
]
ContextOption = Annotated[int, typer.Option("--context", min=8, help="Tokens of a text that are read.")]


@sae_app.command("train")
def sae_train(
    text: TextOption,
    site: Annotated[str, typer.Option("--site", help="Where it sits, such as blocks.15.hook_resid_post.")],
    out: Annotated[Path, typer.Option("--out", help="The SAE's directory; an interrupted run resumes.")],
    model: ModelOption = ORGANISM,
    model_name: Annotated[str, typer.Option("--model-name", help="The model's public name, for the SAE's card.")] = "",
    kind: Annotated[str, typer.Option("--kind", help="batchtopk, topk or jumprelu.")] = "batchtopk",
    features: Annotated[int, typer.Option("--features", min=2, help="Width of the SAE.")] = 4096,
    k: Annotated[int, typer.Option("--k", min=1, help="Features per token (on average but for topk).")] = 48,
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, help="Stop collecting at this many tokens.")] = None,
    keep_out: Annotated[
        list[Path] | None, typer.Option("--keep-out", help="Prompts that no text may hold; repeatable.")
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Passes over the residuals.")] = 4,
    batch: Annotated[int, typer.Option("--batch", min=2, help="Residuals per step.")] = 2048,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate.")] = 1e-3,
    context: ContextOption = 512,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of the model while collecting: auto, float32, bfloat16.")
    ] = "auto",
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Train with 16-bit matrix products.")] = False,
    seed: SeedOption = 0,
) -> None:
    """Train an SAE on a model's residuals at one site, with SAELens's trainer, and write it with a card."""
    from clampdown.sae_training import training as job
    from clampdown.sae_training.trainers import SaeRecipe
    from clampdown.types import Site

    recipe = SaeRecipe(kind, features, k, epochs, batch, lr, seed, bfloat16)
    kept_out = tuple(keep_out or ())
    request = job.Request(
        model, Site.parse(site), tuple(text), out, recipe, context, tokens, dtype, model_name, kept_out
    )
    _show(job.train(request, stages()))
    console.print(f"written: {out}", soft_wrap=True)


@sae_app.command("measure")
def sae_measure(
    text: TextOption,
    model: ModelOption = ORGANISM,
    sae: SaeOption = ORGANISM,
    tokens: Annotated[int, typer.Option("--tokens", min=64, help="Residuals to reconstruct, about.")] = 50_000,
    context: ContextOption = 512,
    graft: Annotated[
        Path | None, typer.Option("--graft", help="Write a copy that is moved onto this model's mean, and measure it.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the numbers.")] = None,
    seed: SeedOption = 0,
) -> None:
    """Measure an SAE on a model: reconstruction, dead features, predictions and refusals that survive it."""
    from clampdown.sae_training import training as job
    from clampdown.store import write_json

    card = job.measure(
        job.MeasureRequest(model, sae, tuple(text), context=context, tokens=tokens, seed=seed, graft=graft), stages()
    )
    _show(card)
    for path in (json, graft):
        if path is not None:
            console.print(f"written: {path}", soft_wrap=True)
    if json is not None:
        write_json(json, card)


def _show(card: dict) -> None:
    from rich.table import Table

    from clampdown.sae_training.files import measured_rows

    about = card["sae"]
    table = Table("measured", "", title=f"SAE at {about['site']} of {about['model']}")
    for name, value in measured_rows(card):
        table.add_row(name, value)
    console.print(table)
    for source, row in card["text"].items():
        console.print(f"[dim]{source}: {row['texts']:,} texts, {row['tokens']:,} tokens[/dim]", highlight=False)
