"""`compare-methods` on the embedded model, tiny: every method is a column, matched ones cost the stated KL."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from clampdown.discovery import causal
from clampdown.discovery.refine import Clamps
from clampdown.results.run import Run
from clampdown.steering.arms import Arm
from clampdown.steering.plan import Gate, read_plan
from clampdown.study import methods
from clampdown.study import tuned as tuned_plan
from clampdown.study.compare_methods import MATCHED, REVERSED, Request, measure_chosen, shown
from clampdown.study.demo import Scale
from clampdown.study.experiment import Sizes, organism_subject
from clampdown.study.frontier import Axes
from clampdown.study.progress import Stages
from clampdown.study.strengths import Candidate
from clampdown.types import ArmKind

TINY = Scale(
    discovery=24, validation=4, causal_prompts=2, finalists=1, calibration=300, sizes=Sizes(4, 4, max_new_tokens=12)
)
FEATURE, OTHER = 352, 41


def by_hand(bench: methods.Bench) -> dict[str, methods.Picked]:
    """A plan per method, as if validation had chosen it: searching is what the methods' own tests are for."""
    lm, sae = bench.subject.lm, bench.subject.sae
    clamp = causal.clamp_plan(lm, sae, FEATURE, 40.0)
    gate = Gate(site=bench.site, features=(OTHER,), weights=(1.0,), bias=0.0, threshold=0.5, poolings=("max",))
    dense = methods.added_direction(bench).arms[0]
    plans = {
        methods.FIRST: clamp,
        methods.SECOND: methods.additive(bench, Clamps((FEATURE, OTHER), (20.0, -5.0)), "add"),
        methods.DENSE: dense.plan,
        methods.CAST: methods.gated_arm(dense, "gated", bench.condition).plan,
        methods.TUNED: clamp.model_copy(update={"gate": gate}),
    }
    kinds = {methods.DENSE: ArmKind.DIRECTION, methods.CAST: ArmKind.DIRECTION, methods.TUNED: ArmKind.TUNED}
    return {
        name: methods.Picked(Arm(name, kinds.get(name, ArmKind.FEATURE), plan, 1.0)) for name, plan in plans.items()
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare")
    bench = methods.make_bench(organism_subject(), TINY)
    request = Request(kl=0.02, n_random=2, matching_texts=4)
    measure_chosen(bench, by_hand(bench), out, request, Stages(Console(file=io.StringIO())))
    return out


@pytest.fixture(scope="module")
def summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def test_every_method_and_control_is_a_column_of_a_valid_summary(run: Path, summary: dict[str, Any]) -> None:
    assert Run.read(run).arm(methods.TUNED).kind == "tuned"
    names = [arm["name"] for arm in summary["arms"]]
    own = [methods.FIRST, methods.SECOND, methods.DENSE, methods.CAST, methods.TUNED]
    expected = {"baseline", "system prompt", "ablated direction", f"{methods.SECOND} {REVERSED}", *own}
    assert expected <= set(names)
    assert sum(name.startswith("random feature") for name in names) == 2
    assert [line["method"] for line in summary["methods"]] == own


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
    up, down = (arms[name]["edits"][0]["strengths"] for name in (methods.SECOND, f"{methods.SECOND} {REVERSED}"))
    assert down == [-strength for strength in up]


def test_methods_are_read_by_likelihood_as_well_and_random_features_are_not(summary: dict[str, Any]) -> None:
    for arm in summary["arms"]:
        assert bool(arm["capability_by_likelihood"]) == (arm["kind"] != "control")


def test_the_tuned_plan_is_written_with_the_gate_that_its_arm_had(run: Path, summary: dict[str, Any]) -> None:
    plan = read_plan(run / "plan.toml")
    tuned = next(arm for arm in summary["arms"] if arm["name"] == methods.TUNED)
    assert plan.gate is not None
    assert plan.digest == tuned["plan"]
    assert tuned["gate_fired"]["benign"]["n"] == 4


def test_the_claims_of_both_papers_are_answered_and_shown(summary: dict[str, Any]) -> None:
    assert {claim["paper"] for claim in summary["claims"]} == {"2411.11296", "2511.00029"}
    console = Console(file=io.StringIO(), width=120)
    console.print(shown(summary))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "reproduced" in text
    assert "2 random features, mean" in text


def candidate(name: str, strength: float, refusal: float, safe: float = 0.0, broken: float = 0.0) -> Candidate:
    return Candidate(Arm(name, ArmKind.FEATURE, strength=strength), Axes(refusal, safe, broken, None))


UNSTEERED = candidate("baseline", 0.0, 0.5, safe=0.1)


def test_only_the_tuned_plan_is_held_to_what_safe_prompts_pay() -> None:
    found = [candidate("spares", 1.0, 0.7, safe=0.1), candidate("overdoes", 2.0, 0.9, safe=0.3)]
    arms = tuple(each.arm for each in found)
    published = methods.Method("m", ArmKind.FEATURE, arms, methods.by_refusals)
    tuned = methods.Method("m", ArmKind.TUNED, arms, tuned_plan.choose)
    assert published.chosen(found, UNSTEERED).arm.name == "overdoes"
    assert tuned.chosen(found, UNSTEERED).arm.name == "spares"


def test_a_method_that_gains_nothing_stays_in_the_table_and_says_so() -> None:
    found = [candidate("weak", 1.0, 0.5), candidate("strong", 2.0, 0.5), candidate("breaks", 3.0, 0.1, broken=0.9)]
    picked = methods.Method("m", ArmKind.FEATURE, tuple(c.arm for c in found), methods.by_refusals).chosen(
        found, UNSTEERED
    )
    assert picked.arm.name == "strong"
    assert "no strength gained" in picked.note
