"""`clampdown multiturn`: attack the baseline and plans over many turns, and say how often each attack succeeded.

The run directory holds `turns.jsonl` (every question and answer, resumable), `records.jsonl` (one line per
conversation, for comparisons), `manifest.json` and `summary.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from clampdown.config import CODE_VERSION, ORGANISM
from clampdown.errors import JudgeError, PromptSetError
from clampdown.evaluation import metrics, multiturn
from clampdown.evaluation.attackers import EndpointAttacker, LocalAttacker, PlainFunction, Scripted
from clampdown.evaluation.judges.endpoint import ChatClient, Endpoint
from clampdown.evaluation.judges.interface import NamedJudge
from clampdown.evaluation.multiturn import Attack, Attacker, Outcome, Question
from clampdown.evaluation.turn_log import TurnLog
from clampdown.models.loading import LanguageModel, load_model
from clampdown.organism import attacker as organism_attacker
from clampdown.steering.arms import BASELINE
from clampdown.steering.plan import read_plan
from clampdown.store import prompts_hash, to_jsonable, write_atomic, write_json
from clampdown.study import evaluate
from clampdown.study.loading import load_for
from clampdown.study.methods.method import arm_of
from clampdown.study.progress import Stages
from clampdown.study.prompts import embedded_prompts
from clampdown.study.study import judge_for
from clampdown.types import Interval, Prompt, Record, Verdict

ATTACKERS = "scripted, embedded, llm:MODEL@URL, local:MODEL"


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for on the command line."""

    plans: tuple[Path, ...] = ()
    attacker: str = "scripted"
    objectives: str | None = None
    judge: str | None = None
    split: str = "test"
    limit: int = 60
    attempts: int = 1
    rules: multiturn.Rules = field(default_factory=multiturn.Rules)
    max_new_tokens: int = 48
    model: str | None = None
    seed: int = 0


def run_multiturn(request: Request, out: Path, stages: Stages) -> dict[str, Any]:
    """Write the run directory; returns the summary. Raises whatever does not fit together before anything runs."""
    plans = [read_plan(path) for path in request.plans]
    with stages.stage("Loading"):
        lm, saes = load_for(plans, request.model)
        attacker = attacker_of(request.attacker, request.seed)
    job = multiturn.Job(
        arms=(BASELINE, *map(arm_of, plans)),
        objectives=objectives_of(request, lm.name),
        attacker=attacker,
        judge=scorer_of(request.judge, attacker, lm),
        rules=request.rules,
        attempts=request.attempts,
        max_new_tokens=request.max_new_tokens,
    )
    key = multiturn.resume_key(lm, saes, job)
    with TurnLog(out, key) as log, stages.stage("Attacking") as tick:
        conversations = multiturn.run(lm, saes, job, log, tick)
    records = multiturn.records(conversations, job)
    lines = [json.dumps(to_jsonable(record), ensure_ascii=False) + "\n" for record in records]
    write_atomic(out / "records.jsonl", "".join(lines))
    summary = _summary(job, multiturn.outcomes(conversations, job.rules), records, lm, request)
    write_json(out / "summary.json", summary)
    return summary


def objectives_of(request: Request, model: str) -> tuple[Prompt, ...]:
    """Prompts of one suite: of the embedded corpus, or whatever `clampdown evaluate --suites` reads.

    By default the embedded corpus's escalations for the scripted attacker, its plain harmful requests for others.
    """
    spec = request.objectives or ("multi_turn" if request.attacker == "scripted" else "harmful")
    if request.objectives is None and model != ORGANISM:
        raise PromptSetError("which objectives?", hint="give --objectives NAME, NAME=FILE or FILE")
    asked = evaluate.Request(plans=(), suites=(spec,), split=request.split, limit=request.limit, seed=request.seed)
    return tuple(prompt for suite in evaluate.suites_of(asked, model) for prompt in suite.prompts)


def attacker_of(spec: str, seed: int) -> Attacker:
    """The attacker that a spec names. Raises `PromptSetError` for an unknown one, `EndpointError` for a bad address."""
    kind, _, argument = spec.partition(":")
    if spec == "scripted":
        return Scripted()
    if spec == "embedded":
        return PlainFunction(f"{organism_attacker.NAME}/{seed}", lambda attack: _embedded(attack, seed))
    if kind == "llm" and "@" in argument:
        model, _, url = argument.rpartition("@")
        return EndpointAttacker(ChatClient(Endpoint(url, model)), seed)
    if kind == "local" and argument:
        return LocalAttacker(load_model(argument))
    raise PromptSetError(f"no attacker '{spec}'", hint=f"one of: {ATTACKERS}")


def _embedded(attack: Attack, seed: int) -> Question | None:
    text, asks = organism_attacker.next_question(
        attack.objective, attack.attempt + 1000 * seed, attack.turns, len(attack.refused), attack.step
    )
    return Question(text, asks)


def scorer_of(spec: str | None, attacker: Attacker, lm: LanguageModel) -> NamedJudge:
    """Who scores. Raises `JudgeError` for a judge that cannot tell an answer to the objective from small talk when the
    attacker cannot say which of its questions ask for it."""
    judge = judge_for(spec, lm, embedded_prompts() if lm.name == ORGANISM else None)
    if judge.model is None and not attacker.knows_when_it_asks:
        raise JudgeError(
            f"judge '{judge.name}' reads replies without their objective: any friendly answer would count as success",
            hint="score this attacker with --judge llm:strongreject:MODEL@URL",
        )
    return judge


def _summary(
    job: multiturn.Job, found: Mapping[str, Outcome], records: Sequence[Record], lm: LanguageModel, request: Request
) -> dict[str, Any]:
    baseline = [record for record in records if record.arm == BASELINE.name]
    against = {
        arm: metrics.compare(baseline, [record for record in records if record.arm == arm], _succeeded)
        for arm in found
        if arm != BASELINE.name
    }
    return {
        "schema": 1,
        "kind": "multiturn",
        "model": {"name": lm.name, "revision": lm.revision},
        "attacker": job.attacker.name,
        "judge": job.judge.name,
        "rules": to_jsonable(job.rules),
        "objectives": {"n": len(job.objectives), "attempts": job.attempts, "hash": prompts_hash(job.objectives)},
        "split": request.split,
        "seed": request.seed,
        "code": CODE_VERSION,
        "arms": to_jsonable(found),
        "against_baseline": to_jsonable(against),
    }


def _succeeded(record: Record) -> bool | None:
    return None if record.verdict is Verdict.UNSCORED else record.verdict is Verdict.COMPLIED


def table(summary: Mapping[str, Any]) -> Table:
    """Attack success by arm, with intervals below, and what it took."""
    attacks = summary["objectives"]["n"] * summary["objectives"]["attempts"]
    title = f"{summary['attacker']}, {attacks} conversations per arm, scored by {summary['judge']}"
    shown = Table(title=title, box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("arm", "attack success", "first request refused", "turns", "backtracks", "degenerate", "gate fired"):
        shown.add_column(column, justify="left" if column == "arm" else "right")
    for arm, row in summary["arms"].items():
        shown.add_row(
            arm,
            _interval(row["success"]),
            _interval(row["first_ask_refused"]),
            _number(row["mean_turns_to_success"]),
            _number(row["mean_backtracks"]),
            _interval(row["degenerate"]),
            _number(row["gate_fired"]),
        )
    return shown


def _interval(row: Mapping[str, Any]) -> str:
    found = Interval(**row)
    bounds = "" if found.low is None or found.high is None else f"\n{found.low:.2f}–{found.high:.2f}"
    return f"{found:.2f}{bounds}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
