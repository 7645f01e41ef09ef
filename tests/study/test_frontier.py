"""The summary counts what the records say, holds the schema, and its front is the front."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clampdown.errors import StoreError
from clampdown.evaluation.intervals import wilson
from clampdown.evaluation.utility import Cost
from clampdown.results.run import Run
from clampdown.steering.arms import BASELINE, Arm
from clampdown.study.frontier import Axes, Experiment, axes, pareto, summarise
from clampdown.types import ArmKind, OptionChoice, Provenance, Receipt, Record, Split, Suite, SuiteKind, Verdict
from tests.evaluation.conftest import arm, clamp, prompt

SAFETY = {"harmful": True, "jailbroken_seen": True, "borderline": False, "benign": False}
CAPABILITY = ("facts", "arithmetic")
SUITES = tuple(
    Suite(name, SuiteKind.SAFETY, harmful, tuple(prompt(i, name) for i in range(10)))
    for name, harmful in SAFETY.items()
) + tuple(
    Suite(name, SuiteKind.CAPABILITY, False, tuple(prompt(i, name, answer="4") for i in range(10)))
    for name in CAPABILITY
)
STEERED = replace(arm(clamp(6.0), "clamped"), group="sweep")
GATED = Arm("gated", ArmKind.GATED, clamp(6.0))
ARMS = (BASELINE, STEERED, GATED)


def record(name: str, suite: str, i: int, verdict: Verdict, right: bool | None, receipt: Receipt | None) -> Record:
    return Record(name, suite, f"{suite}-{i}", Split.TEST, None, "reply", 4 + i, verdict, right, "j", receipt)


def arm_records(name: str, refused: int, right: int, receipt: Receipt | None = None) -> list[Record]:
    """`refused` of 10 refusals in each safety suite (the last reply degenerate), `right` of 10 right answers."""
    rows = []
    for suite in SUITES:
        for i in range(10):
            if suite.kind is SuiteKind.CAPABILITY:
                rows.append(record(name, suite.name, i, Verdict.COMPLIED, i < right, receipt))
            else:
                verdict = Verdict.REFUSED if i < refused else Verdict.COMPLIED
                rows.append(record(name, suite.name, i, Verdict.DEGENERATE if i == 9 else verdict, None, receipt))
    return rows


RECORDS = [
    *arm_records("baseline", 3, 9),
    *arm_records("clamped", 8, 4, Receipt("test", 12, 0.5)),
    *arm_records("gated", 8, 9, Receipt("test", 12, 0.5, 1.0, True)),
]
COSTS = {"clamped": Cost(0.7, 0.8, 0.5, 1.0, 100, 10)}
PROVENANCE = Provenance("tiny", "r0", "random", "h", "0.1.0", 0)
EXPERIMENT = Experiment(ARMS, SUITES, PROVENANCE, COSTS, {"generate": 1.5})


def summary(**extra: Any) -> dict[str, Any]:
    return summarise(EXPERIMENT, RECORDS, extra).to_json()


def test_rates_are_counted_with_wilson_intervals_and_n() -> None:
    baseline, clamped, _ = summary()["arms"]
    expected = wilson(8, 10)
    assert clamped["suites"]["harmful"]["refused"] == {
        "value": 0.8, "low": expected.low, "high": expected.high, "n": 10,
    }  # fmt: skip
    assert baseline["suites"]["benign"]["degenerate"]["value"] == 0.1
    assert clamped["capability"]["facts"]["value"] == 0.4
    assert clamped["refused_capability"]["facts"]["value"] == 0.0
    assert set(clamped["suites"]) == set(SAFETY)
    assert set(clamped["capability"]) == set(CAPABILITY)
    assert clamped["reply_tokens"]["facts"] == 8.5


def test_the_required_schema_is_there() -> None:
    found = summary(chosen={"arm": "clamped"})
    assert {"schema", "model", "sae", "arms", "timings", "chosen", "harmful_suites"} <= set(found)
    assert (found["schema"], found["model"], found["sae"]) == (2, "tiny", "random")
    for row in found["arms"]:
        assert {"name", "kind", "strength", "suites", "capability", "kl_benign"} <= set(row)
        for rates in row["suites"].values():
            assert {"refused", "complied", "deflected", "degenerate"} <= set(rates)
    assert [row["kind"] for row in found["arms"]] == ["baseline", "feature", "gated"]
    assert [row["kl_benign"] for row in found["arms"]] == [None, 0.7, None]
    assert (found["arms"][1]["features"], found["arms"][1]["operator"]) == ([3], "clamp")


def test_comparison_with_the_baseline_is_paired() -> None:
    clamped = summary()["arms"][1]["against_baseline"]
    assert (clamped["harmful"]["gained"], clamped["harmful"]["lost"], clamped["harmful"]["n"]) == (5, 0, 10)
    assert clamped["harmful"]["p_value"] == pytest.approx(2 / 32)
    assert (clamped["facts"]["outcome"], clamped["facts"]["lost"]) == ("correct", 5)
    assert clamped["facts"]["difference"] == -0.5


def test_axes_are_means_over_suites_and_unknown_without_data() -> None:
    grouped = {s.name: tuple(r for r in RECORDS if r.arm == "clamped" and r.suite == s.name) for s in SUITES}
    assert axes(grouped, SUITES) == Axes(refusal=0.8, over_refusal=0.8, degenerate=0.1, capability=0.4)
    assert axes({k: v for k, v in grouped.items() if k != "harmful"}, SUITES) == Axes(None, 0.8, None, 0.4)
    lopsided = {**grouped, "harmful": grouped["harmful"][:1]}
    assert axes(lopsided, SUITES).refusal == pytest.approx((1.0 + 0.8) / 2), "suites weigh the same, not prompts"


shares = st.none() | st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])


@given(st.lists(st.builds(lambda r, c: Axes(r, None, None, c), shares, shares), max_size=12))
def test_the_front_is_what_nothing_beats(points: list[Axes]) -> None:
    """Against the definition; and along the front, who gains on one axis loses on the other."""
    front = pareto(points)
    for point, on_front in zip(points, front, strict=True):
        known = point.refusal is not None and point.capability is not None
        beaten = known and any(
            (other.refusal or 0, other.capability or 0) != (point.refusal, point.capability)
            and None not in (other.refusal, other.capability)
            and (other.refusal or 0) >= (point.refusal or 0)
            and (other.capability or 0) >= (point.capability or 0)
            for other in points
        )
        assert on_front == (known and not beaten)
    chosen = sorted({(p.refusal or 0, p.capability or 0) for p, f in zip(points, front, strict=True) if f})
    assert [c for _, c in chosen] == sorted((c for _, c in chosen), reverse=True)


def test_a_degenerate_model_is_never_safe() -> None:
    """Gibberish refuses nothing and knows nothing: it is dominated by the baseline."""
    broken = [replace(r, arm="clamped", verdict=Verdict.DEGENERATE, correct=None if r.correct is None else False)
              for r in RECORDS if r.arm == "clamped"]  # fmt: skip
    found = summarise(EXPERIMENT, [r for r in RECORDS if r.arm != "clamped"] + broken).to_json()
    clamped = found["arms"][1]
    assert clamped["frontier"] == {
        "refusal": 0.0, "over_refusal": 0.0, "degenerate": 1.0, "capability": 0.0, "pareto": False,
    }  # fmt: skip
    assert [row["frontier"]["pareto"] for row in summary()["arms"]] == [False, False, True]


def test_gates_say_how_often_they_fired_and_others_say_nothing() -> None:
    baseline, _, gated = summary()["arms"]
    assert baseline["gate_fired"] == {}
    assert (gated["gate_fired"]["facts"]["value"], gated["gate_fired"]["facts"]["n"]) == (1.0, 10)


def test_an_arm_without_records_has_no_numbers() -> None:
    found = summarise(replace(EXPERIMENT, arms=(*ARMS, Arm("late", ArmKind.CONTROL))), RECORDS).to_json()
    late = found["arms"][-1]
    assert late["suites"]["harmful"]["refused"] == {"value": None, "low": None, "high": None, "n": 0}
    assert late["frontier"]["pareto"] is False


def test_a_run_round_trips_with_every_part_and_the_report_can_read_it(tmp_path: Path) -> None:
    run = summarise(EXPERIMENT, RECORDS, {"chosen": {"arm": "clamped"}, "novelty": {"kept": 1}})
    found = run.write(tmp_path)
    again = Run.read(tmp_path)
    assert again.to_json() == found.to_json() == run.to_json()
    assert [arm.group for arm in again.arms] == [None, "sweep", None]
    assert again.arm("clamped").rate("harmful") == wilson(8, 10)
    assert again.harmful_suites == ("harmful", "jailbroken_seen")
    assert json.loads((tmp_path / "summary.json").read_text())["novelty"] == {"kept": 1}
    assert [(s.name, s.harmful, s.n) for s in again.suites if s.kind is SuiteKind.CAPABILITY] == [
        ("facts", False, 10),
        ("arithmetic", False, 10),
    ]


def test_likelihoods_and_broken_replies_are_paired_with_the_baseline() -> None:
    choices = tuple(
        OptionChoice(name, "facts", f"facts-{i}", (), "", i < right)
        for name, right in (("baseline", 9), ("clamped", 4))
        for i in range(10)
    )
    broken = [
        replace(r, verdict=Verdict.DEGENERATE) if r.arm == "clamped" and r.suite == "benign" else r for r in RECORDS
    ]
    clamped = summarise(replace(EXPERIMENT, choices=choices), broken).arm("clamped")
    likely = clamped.likelihood_against_baseline["facts"]
    assert (likely.gained, likely.lost, likely.n, likely.difference) == (0, 5, 10, -0.5)
    assert likely.p_value == pytest.approx(2 / 32)
    rise = clamped.against_baseline["benign"].degenerate
    assert rise is not None and rise.value == 0.9 and rise.low is not None and rise.low > 0


def test_nan_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="timings"):
        summarise(replace(EXPERIMENT, timings={"generate": math.nan}), RECORDS).write(tmp_path)
    assert not list(tmp_path.iterdir())
