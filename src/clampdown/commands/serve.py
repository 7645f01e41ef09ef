"""`clampdown serve`: load a model, try every plan on it, and answer requests until told to stop.

1. Plans come from files that the operator names, or, for the embedded model, with the package. Each is checked against
   the model and tried (`selftest`) before the first request: a plan that does not act stops the server, not a client.
2. Edits in requests need calibration prompts, read once here.
3. The rules judge and the canaries' prompts come from packages that the server itself may not import.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from clampdown.commands.canaries import canaries
from clampdown.config import ORGANISM, embedded_model
from clampdown.errors import ClampdownError, PlanError, PlanMismatchError
from clampdown.evaluation.judges.table import DEFAULT, make_judge
from clampdown.extras import extra
from clampdown.models.loading import LanguageModel, load_model
from clampdown.organism import PLANS_DIR
from clampdown.saes.checkpoints import open_sae
from clampdown.saes.sae import FeatureSource
from clampdown.serving.app import DRAIN_SECONDS, Background
from clampdown.serving.audit import AuditLog, calibrated_for
from clampdown.serving.canaries import Aviary
from clampdown.serving.connections import Server
from clampdown.serving.desk import Served
from clampdown.serving.engine import Engine
from clampdown.serving.inline import Bounds, InlineEdits
from clampdown.serving.intake import judged_as
from clampdown.serving.ledger import JudgeFn, Ledger
from clampdown.serving.limits import Keys, Limits, is_loopback
from clampdown.serving.metrics import Metrics
from clampdown.serving.plans import PlanTable
from clampdown.serving.worker import Limits as EngineLimits
from clampdown.steering.plan import Plan, read_plan
from clampdown.steering.program import check_plan
from clampdown.steering.selftest import require_self_test
from clampdown.study.plan import calibration_prompts
from clampdown.study.progress import Stages
from clampdown.types import Site

with extra("serve", "the server"):
    from fastapi import FastAPI


@dataclass(frozen=True)
class Options:
    """What a server is made of. `plans` None: those that come with the embedded model. `inline` None: no edits in
    requests."""

    model: str = ORGANISM
    sae: str | None = None
    plans: tuple[Path, ...] | None = None
    name: str | None = None
    api_keys: Path | None = None
    limits: Limits = field(default_factory=Limits)
    engine: EngineLimits = field(default_factory=EngineLimits)
    inline: Bounds | None = field(default_factory=Bounds)
    prompts: Path | None = None
    allow_base: bool = True
    audit: Path | None = None
    log_prompts: bool = False
    judge_share: float = 1.0
    canaries: Path | None = None
    canary_every: float | None = None


def open_server(options: Options, stages: Stages) -> Served:
    """Load and check everything. Raises `ModelError`, `PlanError`, `SteeringNotAppliedError` and their kin."""
    keys = Keys.read(options.api_keys) if options.api_keys else Keys({})
    with stages.stage("Loading"):
        lm = load_model(options.model)
        plans = read_plans(options)
        saes = _open_saes(options, lm, plans)
    name = options.name or public_name(options.model)
    table = PlanTable(name, allow_base=options.allow_base)
    with stages.stage("Trying the plans") as tick:
        for done, plan in enumerate(plans, 1):
            check_plan(plan, lm, saes)
            require_self_test(lm, plan, list(saes.values()))
            table.add(plan)
            tick(done, len(plans))
    if not plans and not options.allow_base:
        raise PlanError("a server without its base model needs a plan", hint="--plans FILE")
    with stages.stage("Calibrating"):
        table.inline = _inline(options, lm, saes)
    audit = AuditLog(options.audit) if options.audit else None
    ledger = Ledger(Metrics(name), audit, reply_judge(), options.judge_share, options.log_prompts)
    _write_start(ledger, lm, name, table)
    engine = Engine(lm, tuple(saes.values()), options.engine)
    return Served(lm, name, engine, table, ledger, options.limits, keys)


def public_name(model: str) -> str:
    """The model's name for clients: of a directory its last part, because a path is nobody's business."""
    return Path(model).resolve().name if Path(model).is_dir() and embedded_model(model) is None else model


def read_plans(options: Options) -> tuple[Plan, ...]:
    """The plans of the named files and directories. Raises `PlanError`, for an empty directory too."""
    paths = options.plans
    if paths is None:
        paths = (PLANS_DIR,) if embedded_model(options.model) is not None else ()
    return tuple(read_plan(file) for path in paths for file in _plan_files(path))


def _plan_files(path: Path) -> Iterable[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(path.glob("*.toml"))
    if not found:
        raise PlanError(f"{path} holds no plan", hint="plans are files that end in .toml")
    return found


def _open_saes(options: Options, lm: LanguageModel, plans: Iterable[Plan]) -> Mapping[str, FeatureSource]:
    """One SAE per site: those that the plans name, and `--sae`, which by default only the embedded model has."""
    found: dict[str, FeatureSource] = {}
    if options.sae is not None or embedded_model(options.model) is not None:
        opened = open_sae(options.sae or ORGANISM, device=str(lm.device))
        found[opened.cfg.site.name] = opened
    for ref in (ref for plan in plans for ref in plan.saes):
        if ref.site not in found:
            found[ref.site] = open_sae(ref.name, device=str(lm.device), site=Site.parse(ref.site))
        if found[ref.site].revision != ref.revision:
            raise PlanMismatchError(
                f"a plan needs the SAE {ref.name} at {ref.site}, where this server has {found[ref.site].name}",
                hint="one server has one SAE per site: serve such plans apart",
            )
    return found


def _inline(options: Options, lm: LanguageModel, saes: Mapping[str, FeatureSource]) -> InlineEdits | None:
    """Edits in requests, where they are allowed and can be measured."""
    if options.inline is None or not saes:
        return None
    prompts = calibration_prompts(options.model, options.prompts)
    return InlineEdits.measured_on(lm, saes, prompts, options.inline) if prompts else None


def reply_judge() -> JudgeFn:
    """The default judge on a request's last message and its reply."""
    judge = make_judge(DEFAULT)
    return lambda asked, reply: judge(judged_as(asked), reply).verdict.value


def _write_start(ledger: Ledger, lm: LanguageModel, name: str, table: PlanTable) -> None:
    plans = {key: {"digest": plan.digest, "ranges": calibrated_for(plan)} for key, plan in table}
    ledger.write("start", {"model": name, "revision": lm.revision, "plans": plans})


def listen(host: str, port: int) -> socket.socket:
    """A bound socket (port 0: any free one). Raises `ClampdownError` when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise ClampdownError(
            f"cannot listen on {host}, port {port}: {error}", hint="--port 0 takes any free port"
        ) from error
    return bound


def is_local(host: str) -> bool:
    """Whether only this machine can reach the address."""
    return host == "localhost" or is_loopback(host)


def run(
    app: FastAPI,
    bound: socket.socket,
    ready: Callable[[], None],
    drain_seconds: float = DRAIN_SECONDS,
    limits: Limits | None = None,
) -> None:
    """Answer until a signal says stop; then finish what was begun, for as long as `drain_seconds`."""
    server = Server(app, limits or Limits(), ready, timeout_graceful_shutdown=max(1, round(drain_seconds)))
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[bound])


def background(options: Options, served: Served) -> tuple[Background, ...]:
    """What runs beside the requests: canaries, where there are any. Raises `PromptSetError`."""
    if options.canary_every is None:
        return ()
    birds = canaries(served.lm, options.model, options.canaries)
    return (Aviary(served, birds, options.canary_every).run,) if birds else ()
