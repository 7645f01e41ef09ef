"""Commands about a running model: serve it, watch its log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clampdown.cli.app import app, console, errors, escaped, stages
from clampdown.config import ORGANISM

if TYPE_CHECKING:
    from clampdown.commands.monitor import Request
    from clampdown.commands.serve import Options


_MaxMultiple = Annotated[
    float, typer.Option("--max-multiple", min=0, help="Strongest edit in a request, in multiples of p99.")
]
_MaxEditNorm = Annotated[
    float, typer.Option("--max-edit-norm", min=0, help="Furthest that an edit may move the residual.")
]
_MaxBody = Annotated[int, typer.Option("--max-body", min=1, help="Bytes of a request's body.")]
_MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens that one choice may have.")]
_MaxChoices = Annotated[int, typer.Option("--max-choices", min=1, help="Prompts times n that one request may ask for.")]
_MaxConcurrent = Annotated[int, typer.Option("--max-concurrent", min=1, help="HTTP requests that may be open at once.")]
_MaxBatch = Annotated[int, typer.Option("--max-batch", min=1, help="Choices that decode together.")]
_MaxQueue = Annotated[int, typer.Option("--max-queue", min=1, help="Choices that may wait for a place.")]
_MaxConnections = Annotated[int, typer.Option("--max-connections", min=1, help="Connections that may be open.")]
_ReceiveTimeout = Annotated[
    float,
    typer.Option("--receive-timeout", min=0.1, help="Seconds in which a request's head, and its body, must come."),
]
_AllowHost = Annotated[
    list[str] | None, typer.Option("--allow-host", help="A name under which the server may be asked; repeatable.")
]
_Canaries = Annotated[
    Path | None, typer.Option("--canaries", help="Prompts that are asked on a schedule; default: the model's own.")
]
_CanaryEvery = Annotated[str, typer.Option("--canary-every", help="How often: 15m, 1h; 'never' for no canaries.")]

_GatedScoring = Annotated[
    str,
    typer.Option(
        "--gated-scoring",
        help="What a gate reads of a text that is scored: 'read' (all, token by token), 'context', or 'off'.",
    ),
]
_Raw = Annotated[bool, typer.Option("--raw/--no-raw", help="Take /v1/completions: prompts without the chat template.")]


_Run = Annotated[Path | None, typer.Argument(help="A finished study's directory: its model and plans are served.")]
_Model = Annotated[str | None, typer.Option("--model", help="Default: the study's, else the embedded one.")]
_Sae = Annotated[str | None, typer.Option("--sae", help="Default: those that the plans name.")]
_Plans = Annotated[
    list[Path] | None, typer.Option("--plans", help="A plan.toml or a directory of them; repeat for several.")
]
_Name = Annotated[str | None, typer.Option("--name", help="What clients call the model.")]
_Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
_Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes any free one.")]
_ApiKeyFile = Annotated[Path | None, typer.Option("--api-key-file", help="Lines NAME KEY; default: anybody may ask.")]
_Audit = Annotated[Path | None, typer.Option("--audit", help="Append a line per request to this file.")]
_LogPrompts = Annotated[bool, typer.Option("--log-prompts", help="Write prompts and replies into the audit log too.")]
_RequirePlan = Annotated[bool, typer.Option("--require-plan", help="Refuse requests that would not be steered.")]
_Inline = Annotated[bool, typer.Option("--inline/--no-inline", help="Take edits in requests.")]
_Prompts = Annotated[Path | None, typer.Option("--prompts", help="Calibration prompts for edits in requests.")]
_JudgeShare = Annotated[
    float, typer.Option("--judge-share", min=0, max=1, help="Share of replies that the learned judge reads.")
]
_Drain = Annotated[float, typer.Option("--drain", min=0, help="Seconds to finish in when told to stop.")]


@app.command()
def serve(
    run: _Run = None,
    model: _Model = None,
    sae: _Sae = None,
    plans: _Plans = None,
    name: _Name = None,
    host: _Host = "127.0.0.1",
    port: _Port = 8000,
    api_key_file: _ApiKeyFile = None,
    audit: _Audit = None,
    log_prompts: _LogPrompts = False,
    require_plan: _RequirePlan = False,
    inline: _Inline = True,
    prompts: _Prompts = None,
    raw: _Raw = True,
    gated_scoring: _GatedScoring = "read",
    max_multiple: _MaxMultiple = 4.0,
    max_edit_norm: _MaxEditNorm = 4.0,
    max_body: _MaxBody = 1 << 20,
    max_tokens: _MaxTokens = 1024,
    max_choices: _MaxChoices = 64,
    max_concurrent: _MaxConcurrent = 256,
    max_batch: _MaxBatch = 64,
    max_queue: _MaxQueue = 256,
    max_connections: _MaxConnections = 1024,
    receive_timeout: _ReceiveTimeout = 20.0,
    allow_host: _AllowHost = None,
    judge_share: _JudgeShare = 1.0,
    canaries: _Canaries = None,
    canary_every: _CanaryEvery = "15m",
    drain: _Drain = 30.0,
) -> None:
    """Serve the model and its plans behind an OpenAI-compatible API."""
    from clampdown.commands import serve as job
    from clampdown.commands.finished import finished
    from clampdown.commands.monitor import duration
    from clampdown.serving.inline import Bounds
    from clampdown.serving.limits import Limits, allowed_hosts, scoring_mode
    from clampdown.serving.worker import Limits as EngineLimits

    limits = Limits(
        body_bytes=max_body,
        tokens=max_tokens,
        choices=max_choices,
        concurrent=max_concurrent,
        raw=raw,
        gated_scoring=scoring_mode(gated_scoring),
        connections=max_connections,
        receive_seconds=receive_timeout,
        hosts=allowed_hosts(host, allow_host or ()),
    )
    studied = finished(run) if run else None
    named = (*(studied.plans if studied else ()), *(plans or ()))
    options = job.Options(
        model=model or (studied.model if studied else ORGANISM),
        sae=sae,
        plans=named or None,
        name=name,
        api_keys=api_key_file,
        limits=limits,
        engine=EngineLimits(rows=max_batch, queue=max_queue),
        inline=Bounds(max_multiple, max_edit_norm) if inline else None,
        prompts=prompts,
        allow_base=not require_plan,
        audit=audit,
        log_prompts=log_prompts,
        judge_share=judge_share,
        canaries=canaries,
        canary_every=None if canary_every == "never" else duration(canary_every),
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
