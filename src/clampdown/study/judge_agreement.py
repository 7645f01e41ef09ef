"""`clampdown judge-agreement`: a judge's verdicts on replies that people labelled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clampdown.errors import JudgeError, JudgeUnreachableError
from clampdown.evaluation.agreement import Agreement, Labelled, agreement, read_labelled
from clampdown.evaluation.judges.interface import Case, NamedJudge
from clampdown.store import write_json
from clampdown.study.judging import judge_named
from clampdown.study.progress import Stages, Tick
from clampdown.types import Verdict


def run_agreement(spec: str, files: Sequence[Path], out: Path | None, stages: Stages) -> RenderableType:
    """Judge every reply, write the figures, and return the table. Raises `JudgeError`, `PromptSetError`."""
    if not files:
        raise JudgeError(
            "no labelled replies to agree with", hint="--replies FILE.csv (prompt, completion, final_label)"
        )
    replies = [reply for path in files for reply in read_labelled(path)]
    judge = judge_named(spec)
    with stages.stage("Judging") as tick:
        verdicts = _verdicts(judge, replies, tick)
    found = agreement(replies, verdicts)
    if out is not None:
        write_json(out, as_json(judge.name, found))
    return _shown(judge.name, found)


def _verdicts(judge: NamedJudge, replies: Sequence[Labelled], tick: Tick) -> list[Verdict]:
    """Raises `JudgeUnreachableError` when any reply could not be judged: a kappa of the rest would mislead."""
    verdicts: list[Verdict] = [Verdict.UNSCORED] * len(replies)
    cases = [Case(reply.prompt, reply.reply) for reply in replies]
    for done, finding in enumerate(judge.find(cases), 1):
        if finding.judgement is None:
            raise JudgeUnreachableError(f"judge '{judge.name}' could not be asked: {finding.problem}")
        verdicts[finding.index] = finding.judgement.verdict
        tick(done, len(replies))
    return verdicts


def as_json(name: str, found: Agreement) -> dict[str, Any]:
    """What `--json` writes."""
    return {
        "kappa": found.kappa.value,
        "low": found.kappa.low,
        "high": found.kappa.high,
        "n": found.kappa.n,
        "confusion": found.confusion,
        "judge": name,
        "unscored": found.unscored,
        "interval": f"95 %, bootstrap over {found.clusters} prompts",
    }


def _shown(name: str, found: Agreement) -> RenderableType:
    table = Table(title=f"{name}: labels by people, verdicts by the judge")
    table.add_column("label")
    used = [v.value for v in Verdict if any(row[v.value] for row in found.confusion.values())]
    for verdict in used:
        table.add_column(verdict, justify="right")
    for label, row in found.confusion.items():
        table.add_row(label, *(str(row[verdict]) for verdict in used))
    value = found.kappa
    line = f"kappa, refused against the rest: {value:.3f}"
    if value.low is not None and value.high is not None:
        line += f" [{value.low:.3f}, {value.high:.3f}] (95 %, bootstrap over {found.clusters} prompts)"
    return Group(table, Text(f"{line}, n = {value.n}, unscored {found.unscored}"))
