"""The command that opens the page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clampdown.cli.app import app, console, errors, stages
from clampdown.config import ORGANISM


@app.command()
def studio(
    run: Annotated[
        Path | None, typer.Argument(help="A finished study's directory: its model and plans are opened.")
    ] = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="The plan.toml to begin with.")] = None,
    plans: Annotated[Path, typer.Option("--plans", help="Directory where plans are kept, and read from.")] = Path(
        "plans"
    ),
    runs: Annotated[Path, typer.Option("--runs", help="Directory of runs whose frontiers to show.")] = Path("runs"),
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Prompts for calibration, cards and gates; default: embedded.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest reply on the page.")] = 64,
    model: Annotated[str | None, typer.Option("--model", help="Default: the study's, else the embedded one.")] = None,
    sae: Annotated[str | None, typer.Option("--sae", help="Default: those that the plans name.")] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes any free one.")] = 7860,
) -> None:
    """Try a steered model on a page in the browser, with the API of `serve` beside it."""
    from clampdown.extras import require

    require("studio", "the studio's page")
    from clampdown.commands import serve
    from clampdown.commands import studio as job
    from clampdown.commands.finished import finished
    from clampdown.serving.limits import Limits, allowed_hosts

    bound = serve.listen(host, port)
    url = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
    if not serve.is_local(host):
        errors.print("[yellow]anybody who reaches this machine may use the page and the API[/yellow]")
    limits = Limits(hosts=allowed_hosts(host, ()))
    studied = finished(run) if run else None
    model = model or (studied.model if studied else ORGANISM)
    plan = plan or (studied.best if studied else None)
    server = serve.Options(
        model=model, sae=sae, plans=studied.plans if studied else None, prompts=prompts, limits=limits
    )
    options = job.Options(server, plan, plans, runs, max_tokens)
    served = job.open_studio(options, stages())
    job.run(served, options, url, bound, lambda: _say_ready(url), 5.0)


def _say_ready(url: str) -> None:
    console.print(f"[bold]studio[/bold] {url}/", soft_wrap=True, highlight=False)
    console.print(f"[dim]API at {url}/v1; Ctrl-C stops[/dim]", soft_wrap=True, highlight=False)
