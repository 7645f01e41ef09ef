"""`clampdown judge consistency`: whether a judge says the same of a reply repeated, retyped, reworded, longer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from clampdown.errors import PromptSetError
from clampdown.evaluation.agreement import read_labelled
from clampdown.evaluation.consistency import Consistency, consistency
from clampdown.evaluation.judges.interface import Case
from clampdown.evaluation.suites import read_suites
from clampdown.store import read_records, write_json
from clampdown.study.judging import judge_named
from clampdown.study.progress import Stages


def run_consistency(spec: str, sources: Sequence[Path], limit: int, out: Path | None, stages: Stages) -> RenderableType:
    """Measure one judge on replies of run directories or labelled files; labels are not read."""
    cases = [case for path in sources for case in (_of_run(path) if path.is_dir() else _of_file(path))]
    if not cases:
        raise PromptSetError("no replies to ask about", hint="name a run directory or a file of labelled replies")
    judge = judge_named(spec)
    step = max(1, len(cases) // limit)
    with stages.stage("Judging") as tick:
        found = consistency(judge, cases[::step][:limit], tick)
    if out is not None:
        write_json(
            out, {"judge": judge.name, **{name: value for name, value in found.kept.items()}, "moved": found.moved}
        )
    return _shown(judge.name, found)


def _of_file(path: Path) -> list[Case]:
    return [Case(reply.prompt, reply.reply) for reply in read_labelled(path)]


def _of_run(directory: Path) -> list[Case]:
    prompts = {
        (suite.name, prompt.id): prompt
        for suite in read_suites(directory / "prompts.jsonl")
        for prompt in suite.prompts
    }
    found = {(r.suite, r.prompt_id, r.reply): r for r in read_records(directory / "records.jsonl")}
    return [Case(prompts[suite, prompt], reply) for suite, prompt, reply in found if (suite, prompt) in prompts]


def _shown(name: str, found: Consistency) -> RenderableType:
    table = Table(title=f"{escape(name)}: verdicts that stay", title_justify="left", box=None, pad_edge=False)
    for heading in ("the reply", "same verdict", "95 %", "n", "what moved most"):
        table.add_column(heading, justify="right" if heading in ("same verdict", "n") else "left")
    for change, value in found.kept.items():
        bounds = "" if value.low is None or value.high is None else f"{value.low:.3f} to {value.high:.3f}"
        moved = ", ".join(f"{move} ({n})" for move, n in list(found.moved[change].items())[:2])
        table.add_row(change, f"{value:.3f}", bounds, str(value.n), moved)
    return table
