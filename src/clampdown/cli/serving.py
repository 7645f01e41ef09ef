"""Commands about a running model: serve it, watch its log."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clampdown.cli.app import app, console, errors, escaped, stages
from clampdown.cli.options import asks
from clampdown.config import ORGANISM

if TYPE_CHECKING:
    from clampdown.commands.monitor import Request
    from clampdown.commands.serve import Options
    from clampdown.serving.inline import Bounds
    from clampdown.serving.limits import Limits
    from clampdown.serving.worker import Limits as EngineLimits


@dataclass(frozen=True, slots=True)
class LimitOptions:
    """What the server takes: which requests, how large, how many, how slow, and under which names."""

    raw: Annotated[
        bool, typer.Option("--raw/--no-raw", help="Take /v1/completions: prompts without the chat template.")
    ] = True
    gated_scoring: Annotated[
        str,
        typer.Option(
            "--gated-scoring",
            help="What a gate reads of a text that is scored: 'read' (all, token by token), 'context', or 'off'.",
        ),
    ] = "read"
    max_body: Annotated[int, typer.Option("--max-body", min=1, help="Bytes of a request's body.")] = 1 << 20
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens that one choice may have.")] = 1024
    max_choices: Annotated[
        int, typer.Option("--max-choices", min=1, help="Prompts times n that one request may ask for.")
    ] = 64
    max_concurrent: Annotated[
        int, typer.Option("--max-concurrent", min=1, help="HTTP requests that may be open at once.")
    ] = 256
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Choices that decode together.")] = 64
    max_queue: Annotated[int, typer.Option("--max-queue", min=1, help="Choices that may wait for a place.")] = 256
    max_connections: Annotated[int, typer.Option("--max-connections", min=1, help="Connections that may be open.")] = (
        1024
    )
    receive_timeout: Annotated[
        float,
        typer.Option("--receive-timeout", min=0.1, help="Seconds in which a request's head, and its body, must come."),
    ] = 20.0
    allow_host: Annotated[
        list[str] | None, typer.Option("--allow-host", help="A name under which the server may be asked; repeatable.")
    ] = None

    def of_server(self, host: str) -> Limits:
        """As the API holds them."""
        from clampdown.serving.limits import Limits, allowed_hosts, scoring_mode

        return Limits(
            body_bytes=self.max_body,
            tokens=self.max_tokens,
            choices=self.max_choices,
            concurrent=self.max_concurrent,
            raw=self.raw,
            gated_scoring=scoring_mode(self.gated_scoring),
            connections=self.max_connections,
            receive_seconds=self.receive_timeout,
            hosts=allowed_hosts(host, self.allow_host or ()),
        )

    def of_engine(self) -> EngineLimits:
        """As the engine holds them."""
        from clampdown.serving.worker import Limits

        return Limits(rows=self.max_batch, queue=self.max_queue)


@dataclass(frozen=True, slots=True)
class EditOptions:
    """Edits that requests bring along, and how far they may go."""

    inline: Annotated[bool, typer.Option("--inline/--no-inline", help="Take edits in requests.")] = True
    prompts: Annotated[Path | None, typer.Option("--prompts", help="Calibration prompts for edits in requests.")] = None
    max_multiple: Annotated[
        float, typer.Option("--max-multiple", min=0, help="Strongest edit in a request, in multiples of p99.")
    ] = 4.0
    max_edit_norm: Annotated[
        float, typer.Option("--max-edit-norm", min=0, help="Furthest that an edit may move the residual.")
    ] = 4.0

    def bounds(self) -> Bounds | None:
        """None: requests bring none."""
        from clampdown.serving.inline import Bounds

        return Bounds(self.max_multiple, self.max_edit_norm) if self.inline else None


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """What is written down of every request, and what is asked on a schedule."""

    audit: Annotated[Path | None, typer.Option("--audit", help="Append a line per request to this file.")] = None
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts and replies into the audit log too.")
    ] = False
    judge_share: Annotated[
        float, typer.Option("--judge-share", min=0, max=1, help="Share of replies that the learned judge reads.")
    ] = 1.0
    canaries: Annotated[
        Path | None, typer.Option("--canaries", help="Prompts that are asked on a schedule; default: the model's own.")
    ] = None
    canary_every: Annotated[
        str, typer.Option("--canary-every", help="How often: 15m, 1h; 'never' for no canaries.")
    ] = "15m"

    def every(self) -> float | None:
        """Seconds between canaries; None: there are none."""
        from clampdown.commands.monitor import duration

        return None if self.canary_every == "never" else duration(self.canary_every)


@app.command()
@asks(limits=LimitOptions, edits=EditOptions, watch=WatchOptions)
def serve(
    limits: LimitOptions,
    edits: EditOptions,
    watch: WatchOptions,
    run: Annotated[
        Path | None, typer.Argument(help="A finished study's directory: its model and plans are served.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="Default: the study's, else the embedded one.")] = None,
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
    require_plan: Annotated[
        bool, typer.Option("--require-plan", help="Refuse requests that would not be steered.")
    ] = False,
    drain: Annotated[float, typer.Option("--drain", min=0, help="Seconds to finish in when told to stop.")] = 30.0,
) -> None:
    """Serve the model and its plans behind an OpenAI-compatible API."""
    from clampdown.commands import serve as job
    from clampdown.commands.finished import finished

    asked = limits.of_server(host)  # a wrong limit is said before a study's directory is read
    studied = finished(run) if run else None
    named = (*(studied.plans if studied else ()), *(plans or ()))
    options = job.Options(
        model=model or (studied.model if studied else ORGANISM),
        sae=sae,
        plans=named or None,
        name=name,
        api_keys=api_key_file,
        limits=asked,
        engine=limits.of_engine(),
        inline=edits.bounds(),
        prompts=edits.prompts,
        allow_base=not require_plan,
        audit=watch.audit,
        log_prompts=watch.log_prompts,
        judge_share=watch.judge_share,
        canaries=watch.canaries,
        canary_every=watch.every(),
    )
    _serve(options, host, port, drain)


def _serve(options: Options, host: str, port: int, drain: float) -> None:
    """Listen first: a port that is taken is said at once, not after the model has been loaded."""
    from clampdown.commands import serve as job
    from clampdown.serving.app import create_app
    from clampdown.serving.limits import readable_by_others

    bound = job.listen(host, port)
    served = job.open_server(options, stages())
    where = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}"
    if not job.is_local(host) and not options.api_keys:
        errors.print("[yellow]anybody who reaches this machine may ask: there is no --api-key-file[/yellow]")
    if options.api_keys and (warning := readable_by_others(options.api_keys)):
        errors.print(f"[yellow]{escaped(warning)}[/yellow]", soft_wrap=True)
    web = create_app(served, background=job.background(options, served), drain_seconds=drain)
    job.run(web, bound, lambda: _say_ready(where, served.plans.ids), drain, options.limits)


def _say_ready(where: str, ids: tuple[str, ...]) -> None:
    console.print(f"[bold]serving[/bold] {where}/v1", soft_wrap=True, highlight=False)
    for name in ids:
        console.print(f"  {escaped(name)}", soft_wrap=True, highlight=False)
    console.print("[dim]Ctrl-C finishes what was begun and stops[/dim]")


@app.command()
def monitor(
    log: Annotated[Path, typer.Argument(help="The file that `clampdown serve --audit` writes.")],
    window: Annotated[str, typer.Option("--window", help="Length of a window: 30s, 15m, 1h, 1d.")] = "1h",
    plan: Annotated[str | None, typer.Option("--plan", help="This plan only; 'base' is no plan.")] = None,
    last: Annotated[int, typer.Option("--last", min=0, help="The last windows only; 0 means all.")] = 0,
    expect: Annotated[
        list[str] | None, typer.Option("--expect", help="A range instead of the log's: gate=0-0.05, refusal=0.1-0.4.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Go on: print windows as they end.")] = False,
    every: Annotated[float, typer.Option("--every", min=0.1, help="With --follow: seconds between looks.")] = 5.0,
) -> None:
    """Rates of gates and refusals over time; exit code 1 when one has left the range it was calibrated for."""
    from clampdown.commands import monitor as job

    request = job.Request(log, job.duration(window), tuple(expect or ()), plan, last)
    if follow:
        _follow(request, every, as_json=as_json)
    found = job.read(request)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        console.print(job.shown(found.windows) if found.windows else "no requests yet")
    if found.cut and not as_json:
        errors.print(f"{found.cut} of {found.lines} lines cannot be read: a server was killed while it wrote")
    for alarm in found.alarms:
        errors.print(f"[bold red]alarm:[/bold red] {escaped(alarm)}", soft_wrap=True, highlight=False)
    if found.alarms:
        raise typer.Exit(1)


def _follow(request: Request, every: float, *, as_json: bool) -> None:
    """Until interrupted; then exit code 1 if there was an alarm."""
    from clampdown.commands import monitor as job

    alarms = 0
    try:
        for window in job.follow(request, every):
            alarms += len(window.alarms)
            if as_json:
                print(job.as_line(window), flush=True)
            else:
                console.print(job.shown([window]))
            for alarm in window.alarms:
                errors.print(f"[bold red]alarm:[/bold red] {escaped(window.plan)}: {escaped(alarm)}", soft_wrap=True)
    except KeyboardInterrupt:
        raise typer.Exit(1 if alarms else 0) from None
