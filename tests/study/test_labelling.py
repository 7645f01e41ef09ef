"""Labels by hand: blind, resumable, without text; and the report that they correct."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from clampdown.errors import PromptSetError
from clampdown.evaluation.correction import read_own_labels
from clampdown.evaluation.suites import write_suites
from clampdown.store import RecordLog
from clampdown.study.corrected import run_correction
from clampdown.study.labelling import run_labelling, sample
from clampdown.types import Message, Prompt, Record, Split, Suite, SuiteKind, Verdict

N = 12


@pytest.fixture
def run(tmp_path: Path) -> Path:
    prompts = tuple(Prompt(f"p{i}", (Message("user", f"ask {i}"),), "s") for i in range(N))
    directory = tmp_path / "run"
    with RecordLog(directory, "key") as log:
        log.append(
            [
                Record(arm, "s", p.id, Split.TEST, None, f"the reply {i % 6}", 3, verdict, None, "j")
                for arm, verdict in (("baseline", Verdict.COMPLIED), ("secret arm", Verdict.REFUSED))
                for i, p in enumerate(prompts)
            ]
        )
    write_suites(directory / "prompts.jsonl", [Suite("s", SuiteKind.SAFETY, True, prompts)])
    return directory


def keyed(run: Path, keys: str, out: Path, n: int = N) -> tuple[int, str]:
    left, seen = list(keys), []
    answered = run_labelling(run, n, out, 0, lambda: left.pop(0) if left else "", seen.append)
    return answered, "\n".join(seen)


def test_each_reply_is_asked_once_and_the_arm_is_never_shown(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels.jsonl"
    answered, seen = keyed(run, "f" * N, out)
    assert answered == N and len(read_own_labels(out)) == N
    assert "secret arm" not in seen and "baseline" not in seen
    assert "ask 3" not in out.read_text() and "the reply" not in out.read_text()


def test_labelling_goes_on_where_it_stopped(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels.jsonl"
    assert keyed(run, "xfpynnq", out)[0] == 3
    assert [(label.refused, label.helped) for label in read_own_labels(out)] == [
        (True, False),
        (False, True),
        (False, False),
    ]
    assert keyed(run, "ssf", out)[0] == 1
    assert keyed(run, "f" * N, out)[0] == N - 4
    assert len({label.prompt_id for label in read_own_labels(out)}) == N
    assert [item.key for item in sample(run, 5, 0)] == [item.key for item in sample(run, N, 0)][:5]


def test_a_run_without_prompts_cannot_be_labelled(run: Path) -> None:
    (run / "prompts.jsonl").unlink()
    with pytest.raises(PromptSetError, match="prompts"):
        sample(run, 3, 0)


def test_a_report_is_corrected_by_the_labels(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels.jsonl"
    keyed(run, "f" * 6 + "ny" * 6, out)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(run_correction(run, out))
    found = json.loads((run / "corrected.json").read_text())
    assert found["labelled"] == N
    assert {(row["arm"], row["raw"]["value"]) for row in found["rates"]} == {("baseline", 0.0), ("secret arm", 1.0)}
    assert "sensitivity" in console.export_text()
