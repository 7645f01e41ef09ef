"""Reading a run directory: what must be there, what may be missing, and what a broken file is called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from clampdown.errors import StoreError
from clampdown.reports.run import read_run
from clampdown.types import ArmKind, Verdict
from tests.reports.conftest import N, arm_json
from tests.reports.example_run import CAPABILITY, SAFETY


def write(directory: Path, summary: object) -> Path:
    (directory / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return directory


def test_everything_is_read(run):
    assert not run.notes
    assert run.arms[0].kind is ArmKind.BASELINE
    assert set(run.arms[0].suites) == set(SAFETY)
    assert set(run.arms[0].capability) == set(CAPABILITY)
    assert run.arms[0].rate("harmful", Verdict.REFUSED).n == N
    assert run.chosen.feature == "312"
    assert run.gate.n_calibration == 400
    assert len(run.records) == len(run.arms) * N * (len(SAFETY) + len(CAPABILITY))
    assert run.provenance["resume_key"]
    assert [found.finder for found in run.feature_sets] == ["contrast", "single_prompt"]
    assert len(run.prompts["multi_turn", "multi_turn-000"]) == 3


def test_a_missing_summary_is_an_error(tmp_path):
    with pytest.raises(StoreError, match="no summary"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "summary",
    [
        [],
        {"schema": 2, "arms": []},
        {"schema": 1, "arms": []},
        {"schema": 1},
        {"schema": 1, "arms": [{"kind": "baseline"}]},
        {"schema": 1, "arms": [{"name": "x", "kind": "wizardry"}]},
        {"schema": 1, "arms": [{"name": "x", "kind": "baseline", "suites": {"harmful": {"refused": {"n": 3}}}}]},
    ],
)
def test_a_malformed_summary_is_an_error(tmp_path, summary):
    with pytest.raises(StoreError, match=r"summary\.json"):
        read_run(write(tmp_path, summary))


def test_broken_json_is_an_error(tmp_path):
    (tmp_path / "summary.json").write_text("{", encoding="utf-8")
    with pytest.raises(StoreError, match=r"summary\.json"):
        read_run(tmp_path)


def test_a_summary_alone_is_enough_and_says_what_is_missing(tmp_path):
    run = read_run(write(tmp_path, {"schema": 1, "arms": [arm_json("baseline", "baseline")]}))
    assert {"records.jsonl", "prompts.jsonl", "plan.toml", "features"} <= run.notes.keys()
    assert run.records == ()
    assert run.gate is None
    assert (run.model, run.sae) == ("none", "none")


def test_unreadable_optional_files_become_notes(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    (copy / "records.jsonl").write_text("nonsense\n", encoding="utf-8")
    (copy / "prompts.jsonl").write_text('{"id": "x"}\n', encoding="utf-8")
    (copy / "plan.toml").write_text("= no", encoding="utf-8")
    (copy / "manifest.json").write_text("{", encoding="utf-8")
    (copy / "features" / "contrast.json").write_text("{}", encoding="utf-8")
    run = read_run(copy)
    assert {"records.jsonl", "prompts.jsonl", "plan.toml", "manifest.json", "features/contrast.json"} == set(run.notes)
    assert all("could not be read" in note for note in run.notes.values())
    assert len(run.feature_sets) == 1


def test_unknown_verdicts_and_keys_are_ignored(tmp_path):
    arm = arm_json("baseline", "baseline", novelty=3)
    arm["suites"]["harmful"]["puzzled"] = {"value": 1.0, "low": 1.0, "high": 1.0, "n": 1}
    run = read_run(write(tmp_path, {"schema": 1, "arms": [arm], "novelty": {}}))
    assert set(run.arms[0].suites["harmful"]) == {Verdict.REFUSED, Verdict.DEGENERATE}
