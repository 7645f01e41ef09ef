"""Commands about a running model: serve it, watch its log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clampdown.cli.app import ModelOption, app, console, errors, escaped, stages
from clampdown.config import ORGANISM


@app.command()
def serve(
    model: ModelOption = ORGANISM,
    sae: Annotated[str | None, typer.Option("--sae", help="Default: those that the plans name.")] = None,
    plans: Annotated[
        list[Path] | None, typer.Option("--plans", help="A plan.toml or a directory of them; repeat for several.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="What clients call the model.")] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes any free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="Lines NAME KEY; default: anybody may ask.")
    ] = None,
    audit: Annotated[Path | None, typer.Option("--audit", help="Append a line per request to this file.")] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts and replies into the audit log too.")
    ] = False,
    require_plan: Annotated[
        bool, typer.Option("--require-plan", help="Refuse requests that would not be steered.")
    ] = False,
    inline: Annotated[bool, typer.Option("--inline/--no-inline", help="Take edits in requests.")] = True,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Calibration prompts for edits in requests.")
    ] = None,
    max_multiple: Annotated[
        float, typer.Option("--max-multiple", min=0, help="Strongest edit in a request, in multiples of p99.")
    ] = 4.0,
    max_edit_norm: Annotated[
        float, typer.Option("--max-edit-norm", min=0, help="Furthest that an edit may move the residual.")
    ] = 4.0,
    max_body: Annotated[int, typer.Option("--max-body", min=1, help="Bytes of a request's body.")] = 1 << 20,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens that one choice may have.")] = 1024,
    max_choices: Annotated[
        int, typer.Option("--max-choices", min=1, help="Prompts times n that one request may ask for.")
    ] = 64,
    max_concurrent: Annotated[
        int, typer.Option("--max-concurrent", min=1, help="HTTP requests that may be open at once.")
    ] = 256,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Choices that decode together.")] = 64,
    max_queue: Annotated[int, typer.Option("--max-queue", min=1, help="Choices that may wait for a place.")] = 256,
    judge_share: Annotated[
        float, typer.Option("--judge-share", min=0, max=1, help="Share of replies that the rules judge reads.")
    ] = 1.0,
    drain: Annotated[float, typer.Option("--drain", min=0, help="Seconds to finish in when told to stop.")] = 30.0,
) -> None:
    """Serve the model and its plans behind an OpenAI-compatible API."""
    from clampdown.commands import serve as job
    from clampdown.serving.inline import Bounds
    from clampdown.serving.limits import Limits
    from clampdown.serving.worker import Limits as EngineLimits

    options = job.Options(
        model=model,
        sae=sae,
        plans=tuple(plans) if plans else None,
        name=name,
        api_keys=api_key_file,
        limits=Limits(max_body, max_tokens, max_choices, max_concurrent),
        engine=EngineLimits(rows=max_batch, queue=max_queue),
        inline=Bounds(max_multiple, max_edit_norm) if inline else None,
        prompts=prompts,
        allow_base=not require_plan,
        audit=audit,
        log_prompts=log_prompts,
        judge_share=judge_share,
    )
    bound = job.listen(host, port)
    served = job.open_server(options, stages())
    where = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
    if not job.is_local(host) and not api_key_file:
        errors.print("[yellow]anybody who reaches this machine may ask: there is no --api-key-file[/yellow]")
    job.serve(served, bound, lambda: _say_ready(where, served.plans.ids), drain)


def _say_ready(where: str, ids: tuple[str, ...]) -> None:
    console.print(f"[bold]serving[/bold] {where}/v1", soft_wrap=True, highlight=False)
    for name in ids:
        console.print(f"  {escaped(name)}", soft_wrap=True, highlight=False)
    console.print("[dim]Ctrl-C finishes what was begun and stops[/dim]")
