"""`compare-methods` on the embedded model, tiny: every method is a column, matched ones cost the stated KL."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from clampdown.config import ORGANISM
from clampdown.discovery import causal
from clampdown.discovery.refine import Clamps
from clampdown.reports.methods_terminal import methods_summary
from clampdown.results.run import Run
from clampdown.steering.arms import Arm
from clampdown.steering.plan import Gate, read_plan
from clampdown.study import run as running
from clampdown.study.comparing import MATCHED, MatchingRequest
from clampdown.study.frontier import Axes
from clampdown.study.groundwork import Groundwork
from clampdown.study.methods import clamp, dense, gated_set, refine
from clampdown.study.methods.method import Method, arm_of, by_refusals
from clampdown.study.methods.table import ALL
from clampdown.study.progress import Stages
from clampdown.study.run import StudyRequest
from clampdown.study.sizes import Answering, Sizes
from clampdown.study.strengths import Candidate
from clampdown.study.study import make_study
from clampdown.types import ArmKind

TINY = Sizes(24, 4, causal_prompts=2, finalists=1, calibration=300, answering=Answering(4, 4, max_new_tokens=12),
             n_random=2)  # fmt: skip
FEATURE, OTHER = 352, 41
FIRST, SECOND = clamp.NAME, refine.NAME
OWN = (FIRST, SECOND, dense.ADDED, dense.CAST, gated_set.NAME)


def by_hand(ground: Groundwork) -> tuple[Method, ...]:
    """A plan per method, as if it had found it: searching is what the methods' own tests are for."""
    study = ground.study
    plan = causal.clamp_plan(study.lm, study.sae, FEATURE, 40.0)
    gate = Gate(site=study.site.name, features=(OTHER,), weights=(1.0,), bias=0.0, threshold=0.5, poolings=("max",))
    added = refine.additive(ground, Clamps((FEATURE, OTHER), (20.0, -5.0)), "all", "add")
    arms = {
        FIRST: arm_of(plan),
        SECOND: arm_of(added),
        dense.ADDED: dense.added_direction(ground).arms[0],
        dense.CAST: dense.conditional_direction(ground).arms[0],
        gated_set.NAME: arm_of(plan.behind(gate)),
    }
    kinds = {dense.ADDED: ArmKind.DIRECTION, dense.CAST: ArmKind.DIRECTION, gated_set.NAME: ArmKind.TUNED}
    return tuple(Method(name, kinds.get(name, ArmKind.FEATURE), (arm,), by_refusals) for name, arm in arms.items())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare")
    request = StudyRequest(TINY, ALL, sweep=False, matching=MatchingRequest(0.02, 4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "make_methods", lambda ground, _names: by_hand(ground))
        running.run_study(make_study(ORGANISM, ORGANISM), out, request, Stages(Console(file=io.StringIO())))
    return out


@pytest.fixture(scope="module")
def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def test_every_method_and_control_is_a_column_of_a_valid_summary(run: Path, summary: dict[str, Any]) -> None:
    assert Run.read(run).arm(gated_set.NAME).kind == "tuned"
    names = [arm["name"] for arm in summary["arms"]]
    expected = {"baseline", "system prompt", "ablated direction", f"{SECOND}, {refine.TURNED}", *OWN}
    assert expected <= set(names)
    assert sum(name.startswith("random feature") for name in names) == 2
    assert [line["method"] for line in summary["methods"]] == list(OWN)


def test_a_matched_arm_is_the_same_edit_at_another_strength(summary: dict[str, Any]) -> None:
    arms = {arm["name"]: arm for arm in summary["arms"]}
    matched = [line for line in summary["methods"] if line["matched"]]
    assert len(matched) >= 2
    for line in matched:
        best, scaled = arms[line["best"]], arms[line["matched"]]
        assert scaled["name"].endswith(MATCHED)
        assert (best["features"], best["operator"]) == (scaled["features"], scaled["operator"])


def test_the_other_sign_is_the_same_plan_turned(summary: dict[str, Any]) -> None:
    arms = {arm["name"]: arm for arm in summary["arms"]}
    up, down = (arms[name]["edits"][0]["strengths"] for name in (SECOND, f"{SECOND}, {refine.TURNED}"))
    assert down == [-strength for strength in up]


def test_methods_are_read_by_likelihood_as_well_and_random_features_are_not(summary: dict[str, Any]) -> None:
    for arm in summary["arms"]:
        assert bool(arm["capability_by_likelihood"]) == (arm["kind"] != "control")


def test_the_tuned_plan_is_written_with_the_gate_that_its_arm_had(run: Path, summary: dict[str, Any]) -> None:
    plan = read_plan(run / "plan.toml")
    tuned = next(arm for arm in summary["arms"] if arm["name"] == gated_set.NAME)
    assert plan.gate is not None
    assert plan.digest == tuned["plan"]
    assert tuned["gate_fired"]["benign"]["n"] == 4


def test_the_claims_of_both_papers_are_answered_and_shown(run: Path, summary: dict[str, Any]) -> None:
    assert {claim["paper"] for claim in summary["claims"]} == {"2411.11296", "2511.00029"}
    console = Console(file=io.StringIO(), width=120)
    console.print(methods_summary(Run.read(run)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "reproduced" in text
    assert "2 random features, mean" in text


def candidate(name: str, strength: float, refusal: float, safe: float = 0.0, broken: float = 0.0) -> Candidate:
    return Candidate(Arm(name, ArmKind.FEATURE, strength=strength), Axes(refusal, safe, broken, None))


UNSTEERED = candidate("baseline", 0.0, 0.5, safe=0.1)


def test_only_the_tuned_plan_is_held_to_what_safe_prompts_pay() -> None:
    found = [candidate("spares", 1.0, 0.7, safe=0.1), candidate("overdoes", 2.0, 0.9, safe=0.3)]
    arms = tuple(each.arm for each in found)
    published = Method("m", ArmKind.FEATURE, arms, by_refusals)
    tuned = Method("m", ArmKind.TUNED, arms, gated_set.choose)
    assert published.chosen(found, UNSTEERED).arm.name == "overdoes"
    assert tuned.chosen(found, UNSTEERED).arm.name == "spares"


def test_a_method_that_gains_nothing_stays_in_the_table_and_says_so() -> None:
    found = [candidate("weak", 1.0, 0.5), candidate("strong", 2.0, 0.5), candidate("breaks", 3.0, 0.1, broken=0.9)]
    picked = Method("m", ArmKind.FEATURE, tuple(c.arm for c in found), by_refusals).chosen(found, UNSTEERED)
    assert picked.arm.name == "strong"
    assert "no strength gained" in picked.note
