"""Reading a run directory: what must be there, what may be missing, and what a broken file is called."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import plotly.graph_objects as go
import pytest
from rich.console import Console

from clampdown.errors import StoreError
from clampdown.results import views
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


def test_a_run_is_a_tidy_frame(run):
    pytest.importorskip("pandas")
    frame = run.to_pandas()
    assert len(frame) == len(run.arms) * (len(SAFETY) + len(CAPABILITY))
    row = frame[(frame.arm == "clamp 312 at 1.5") & (frame.suite == "facts")].iloc[0]
    arm = run.arm("clamp 312 at 1.5")
    assert (row.value, row.low, row.n) == (arm.capability["facts"].value, arm.capability["facts"].low, N)
    assert (row.outcome, row.side, row.change) == ("right", "capability", arm.against_baseline["facts"].difference)
    assert frame[(frame.arm == "baseline") & (frame.suite == "harmful")].iloc[0].outcome == "refused"


def test_what_was_not_measured_is_no_number(run_of):
    pytest.importorskip("pandas")
    arm = arm_json("x", "feature")
    arm["capability"]["facts"] = {"value": None, "low": None, "high": None, "n": 0}
    run = run_of(arm_json("baseline", "baseline"), arm)
    frame = run.to_pandas()
    assert frame[(frame.arm == "x") & (frame.suite == "facts")].value.isna().all()
    assert "not measured" in run._repr_html_()


def test_the_frontier_is_what_nothing_beats_with_intervals_and_a_figure(run):
    found = run.frontier()
    assert [p.arm.name for p in found] == [arm.name for arm in run.arms if arm.frontier.pareto]
    for p in found:
        assert p.refusal.value == pytest.approx(p.arm.frontier.refusal)
        assert p.refusal.low < p.refusal.value <= p.refusal.high
    shown = found._repr_mimebundle_()
    go.Figure(shown["application/vnd.plotly.v1+json"])
    assert "@" not in json.dumps(shown["application/vnd.plotly.v1+json"])
    assert found.points[0].arm.name in shown["text/html"]


class Named:
    """What a plan is to a run: a name and a digest."""

    def __init__(self, name: str, digest: str) -> None:
        self.name, self.digest = name, digest


def test_two_arms_are_compared_on_the_same_prompts_by_name_or_by_plan(run):
    found = run.compare("baseline", "gated 312 at 1.5")
    assert [row.suite for row in found.suites] == list(run.suite_names)
    for row in found.suites:
        paired = run.arm("gated 312 at 1.5").against_baseline[row.suite]
        assert (row.change.gained, row.change.lost) == (paired.gained, paired.lost)
        assert row.change.p_value == paired.p_value
    plan = Named("renamed since", run.arm("gated 312 at 1.5").plan)
    assert run.compare(Named("baseline", "none"), plan) == found
    with pytest.raises(StoreError, match="no arm 'nobody'"):
        run.compare("baseline", "nobody")
    with pytest.raises(StoreError, match="no records"):
        Run.parse(run.to_json()).compare("baseline", "gated 312 at 1.5")


def test_a_run_shows_itself_shortly_and_never_as_markup(run, run_of):
    assert len(repr(run)) < 200 and "23 arms on 11 suites" in repr(run)
    assert len(repr(run.feature_sets[0])) < 200
    assert len(repr(run.compare("baseline", "gated 312 at 1.5"))) < 500
    evil = run_of(arm_json("<script>alert(1)</script>", "baseline"))
    assert "<script>" not in evil._repr_html_() and "n = 200" in evil._repr_html_()
    console = Console(file=io.StringIO(), width=80)
    console.print(run)
    assert "Price" in console.file.getvalue()


def test_parts_that_are_added_are_checked_and_lie_where_the_run_lies(run):
    more = run.with_parts(matched_kl=0.5, methods=[{"method": "m", "best": "b"}])
    assert (more.matched_kl, more.methods[0].best, more.directory) == (0.5, "b", run.directory)
    assert more.records == run.records
    with pytest.raises(StoreError, match="methods"):
        run.with_parts(methods=[{"best": "b"}])


def test_what_draws_a_run_is_there(run):
    assert all(callable(views.find(name)) for name in views.VIEWS)


def test_a_report_goes_where_it_is_told(run, tmp_path):
    assert run.report(tmp_path / "out") == tmp_path / "out" / "report.html"
    assert run.report(tmp_path / "mine.html") == tmp_path / "mine.html"
    with pytest.raises(StoreError, match="no directory"):
        Run.parse(run.to_json()).report()
