"""Reading a run directory: what must be there, what may be missing, and what a broken file is called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from clampdown.errors import StoreError
from clampdown.results.run import Run
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
    assert run.chosen.feature == 312
    assert run.gate.promise.n == 400
    assert len(run.records) == len(run.arms) * N * (len(SAFETY) + len(CAPABILITY))
    assert run.manifest["resume_key"]
    assert [found.finder for found in run.feature_sets] == ["contrast", "single_prompt"]
    assert len(run.prompts["multi_turn", "multi_turn-000"]) == 3


def test_a_missing_summary_is_an_error(tmp_path):
    with pytest.raises(StoreError, match="no summary"):
        Run.read(tmp_path)


@pytest.mark.parametrize(
    "summary",
    [
        [],
        {"schema": 3, "arms": [{"name": "x", "kind": "baseline"}]},
        {"schema": 1, "arms": []},
        {"schema": 1},
        {"schema": 1, "arms": [{"kind": "baseline"}]},
        {"schema": 1, "arms": [{"name": "x", "kind": "wizardry"}]},
        {"schema": 1, "arms": [{"name": "x", "kind": "baseline", "suites": {"harmful": {"refused": {"n": 3}}}}]},
    ],
)
def test_a_malformed_summary_is_an_error(tmp_path, summary):
    with pytest.raises(StoreError, match=r"summary\.json"):
        Run.read(write(tmp_path, summary))


def test_broken_json_is_an_error(tmp_path):
    (tmp_path / "summary.json").write_text("{", encoding="utf-8")
    with pytest.raises(StoreError, match=r"summary\.json"):
        Run.read(tmp_path)


def test_a_summary_alone_is_enough_and_says_what_is_missing(tmp_path):
    run = Run.read(write(tmp_path, {"schema": 1, "arms": [arm_json("baseline", "baseline")]}))
    assert {"records.jsonl", "prompts.jsonl", "plan.toml", "features"} <= run.notes.keys()
    assert run.records == ()
    assert run.gate is None
    assert (run.model, run.sae) == ("none", None)


def test_unreadable_optional_files_become_notes(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    (copy / "records.jsonl").write_text("nonsense\n", encoding="utf-8")
    (copy / "prompts.jsonl").write_text('{"id": "x"}\n', encoding="utf-8")
    (copy / "plan.toml").write_text("= no", encoding="utf-8")
    (copy / "manifest.json").write_text("{", encoding="utf-8")
    (copy / "features" / "contrast.json").write_text("{}", encoding="utf-8")
    run = Run.read(copy)
    assert {"records.jsonl", "prompts.jsonl", "plan.toml", "manifest.json", "features/contrast.json"} == set(run.notes)
    assert all("could not be read" in note for note in run.notes.values())
    assert len(run.feature_sets) == 1


def test_unknown_verdicts_and_keys_are_kept_and_harm_nothing(tmp_path):
    arm = arm_json("baseline", "baseline", novelty=3)
    arm["suites"]["harmful"]["puzzled"] = {"value": 1.0, "low": 1.0, "high": 1.0, "n": 1}
    run = Run.read(write(tmp_path, {"schema": 1, "arms": [arm], "novelty": {}}))
    assert run.arms[0].rate("harmful").value == 0.5
    again = run.to_json()
    assert (again["novelty"], again["arms"][0]["novelty"]) == ({}, 3)
    assert "puzzled" in again["arms"][0]["suites"]["harmful"]
