"""`clampdown judge-agreement`: judges' answers on replies that people labelled, file by file and together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from clampdown.errors import JudgeError, JudgeUnreachableError
from clampdown.evaluation.agreement import (
    Agreement,
    Labelled,
    Question,
    agreement,
    disagreements,
    read_labelled,
)
from clampdown.evaluation.judges.interface import Case, NamedJudge
from clampdown.store import write_json
from clampdown.study.judging import judge_named
from clampdown.study.progress import Stages, Tick
from clampdown.types import Interval, Judgement, Verdict

LONGEST = 240


@dataclass(frozen=True, slots=True)
class Measured:
    """One judge on all replies, and on each file's."""

    name: str
    together: Agreement
    by_source: Mapping[str, Agreement]
    judgements: tuple[Judgement, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """`left_out` measures a judge trained without the file (or the prompts) that it is measured on, beside the others;
    `worst` is how many disagreements are shown of each judge."""

    judges: tuple[str, ...]
    files: tuple[Path, ...]
    question: Question = Question.REFUSED
    left_out: bool = False
    worst: int = 0
    out: Path | None = None


def question_named(text: str) -> Question:
    """Raises `JudgeError` for any other question."""
    if text not in {question.value for question in Question}:
        raise JudgeError(f"no question '{text}'", hint=f"one of: {', '.join(q.value for q in Question)}")
    return Question(text)


def run_agreement(request: Request, stages: Stages) -> RenderableType:
    """Judge every reply, write the figures, and return the tables. Raises `JudgeError`, `PromptSetError`."""
    if not request.files:
        raise JudgeError(
            "no labelled replies to agree with", hint="--replies FILE.csv (prompt, completion, final_label)"
        )
    replies = [reply for path in request.files for reply in read_labelled(path)]
    judges = [judge_named(spec) for spec in request.judges]
    found = []
    for judge in judges:
        with stages.stage(f"Judging: {judge.name}") as tick:
            found.append(_measured(judge.name, replies, _judgements(judge, replies, tick), request.question))
    if request.left_out:
        with stages.stage("Training without each fold") as tick:
            found.append(_measured("learned, left out", replies, _left_out(replies, tick), request.question))
    if request.out is not None:
        write_json(request.out, as_json(found, request.question))
    return _shown(found, replies, request)


def _judgements(judge: NamedJudge, replies: Sequence[Labelled], tick: Tick) -> list[Judgement]:
    """Raises `JudgeUnreachableError` when any reply could not be judged: a kappa of the rest would mislead."""
    found = [Judgement(Verdict.UNSCORED)] * len(replies)
    for done, finding in enumerate(judge.find([Case(reply.prompt, reply.reply) for reply in replies]), 1):
        if finding.judgement is None:
            raise JudgeUnreachableError(f"judge '{judge.name}' could not be asked: {finding.problem}")
        found[finding.index] = finding.judgement
        tick(done, len(replies))
    return found


def _left_out(replies: Sequence[Labelled], tick: Tick) -> list[Judgement]:
    from clampdown.evaluation.judges.training import left_out_judgements  # scikit-learn, for this alone

    return left_out_judgements(replies, tick)


def _measured(name: str, replies: Sequence[Labelled], judgements: Sequence[Judgement], question: Question) -> Measured:
    pairs = list(zip(replies, judgements, strict=True))
    sources = dict.fromkeys(reply.source for reply in replies)
    by_source = {
        source: agreement(*_apart([pair for pair in pairs if pair[0].source == source]), question) for source in sources
    }
    return Measured(name, agreement(replies, judgements, question), by_source, tuple(judgements))


def _apart(pairs: Sequence[tuple[Labelled, Judgement]]) -> tuple[list[Labelled], list[Judgement]]:
    return [reply for reply, _ in pairs], [judgement for _, judgement in pairs]


def as_json(found: Sequence[Measured], question: Question) -> dict[str, Any]:
    """What `--json` writes: one judge's figures, or a list of several judges'."""
    if len(found) == 1:
        return {**_figures(found[0]), "question": question.value}
    return {"question": question.value, "judges": [_figures(measured) for measured in found]}


def _figures(measured: Measured) -> dict[str, Any]:
    return {
        **_numbers(measured.together),
        "confusion": measured.together.confusion,
        "judge": measured.name,
        "interval": f"95 %, bootstrap over {measured.together.clusters} prompts",
        "by_file": {source: _numbers(found) for source, found in measured.by_source.items()},
    }


def _numbers(found: Agreement) -> dict[str, Any]:
    return {
        "kappa": found.kappa.value,
        "low": found.kappa.low,
        "high": found.kappa.high,
        "n": found.kappa.n,
        "unscored": found.unscored,
        "open": found.open,
        "sensitivity": found.sensitivity,
        "specificity": found.specificity,
    }


def _shown(found: Sequence[Measured], replies: Sequence[Labelled], request: Request) -> RenderableType:
    parts: list[RenderableType] = [_kappas(found, request.question)]
    for measured in found:
        parts += [Text(""), _confusion(measured), Text(_line(measured, request.question))]
        parts += _worst(measured, replies, request)
    return Group(*parts)


def _kappas(found: Sequence[Measured], question: Question) -> Table:
    table = Table(title=f"kappa, {question.value} against the rest", title_justify="left", box=None, pad_edge=False)
    table.add_column("judge", overflow="fold")
    sources = list(found[0].by_source)
    for source in sources:
        table.add_column(source, justify="right", overflow="fold")
    table.add_column("together [95 %]", justify="right", no_wrap=True)
    for measured in found:
        each = [f"{measured.by_source[source].kappa:.3f}" for source in sources]
        table.add_row(escape(measured.name), *each, _with_bounds(measured.together.kappa))
    return table


def _with_bounds(value: Interval) -> str:
    if value.low is None or value.high is None:
        return f"{value:.3f}"
    return f"{value:.3f} [{value.low:.3f}, {value.high:.3f}]"


def _confusion(measured: Measured) -> Table:
    table = Table(title=f"{escape(measured.name)}: labels by people, verdicts by the judge")
    table.add_column("label")
    rows = measured.together.confusion
    used = [v.value for v in Verdict if any(row[v.value] for row in rows.values())]
    for verdict in used:
        table.add_column(verdict, justify="right")
    for label, row in rows.items():
        table.add_row(label, *(str(row[verdict]) for verdict in used))
    return table


def _line(measured: Measured, question: Question) -> str:
    found = measured.together
    line = f"kappa, {question.value} against the rest: {_with_bounds(found.kappa)}"
    if found.kappa.low is not None:
        line += f" (95 %, bootstrap over {found.clusters} prompts)"
    left = f", left open by people {found.open}" if found.open else ""
    rates = f"; sensitivity {found.sensitivity}, specificity {found.specificity}"
    return f"{line}, n = {found.kappa.n}, unscored {found.unscored}{left}{rates}"


def _worst(measured: Measured, replies: Sequence[Labelled], request: Request) -> list[RenderableType]:
    """The disagreements to read first."""
    worst = disagreements(replies, measured.judgements, request.question)[: request.worst]
    return [
        Text(f"  {_cut(reply.prompt.text, 80)}\n    people: {reply.word}, judge: {judgement.verdict.value}"
             f" ({judgement.detail})\n    {_cut(reply.reply, LONGEST)}", style="dim")
        for reply, judgement in worst
    ]  # fmt: skip


def _cut(text: str, most: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[:most] + "…"
