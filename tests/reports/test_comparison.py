"""Means, differences and fronts: against simulation and against the definition."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clampdown.reports.comparison import headline, strength_curve
from clampdown.results.points import change, difference, mean, pareto, point, suite_change
from clampdown.types import Interval
from tests.reports.conftest import arm_json
from tests.reports.example_run import CAPABILITY, SAFETY, STRENGTHS, wilson


def drawn(rng: random.Random, p: float, n: int) -> Interval:
    found = wilson(sum(rng.random() < p for _ in range(n)), n)
    return Interval(found["value"], found["low"], found["high"], n)


def coverage(trial, truth: float, times: int = 2000) -> float:
    found = [trial(random.Random(seed)) for seed in range(times)]
    return sum(each.low <= truth <= each.high for each in found) / times


def test_the_mean_covers_the_true_mean_as_often_as_stated():
    rates, n = (0.95, 0.5, 0.1, 0.99), 60
    covered = coverage(lambda rng: mean([drawn(rng, p, n) for p in rates]), sum(rates) / len(rates))
    assert 0.93 <= covered <= 0.98


def test_the_difference_covers_the_true_difference_as_often_as_stated():
    covered = coverage(lambda rng: difference(drawn(rng, 0.9, 80), drawn(rng, 0.5, 80)), 0.4)
    assert 0.93 <= covered <= 0.98


def test_a_mean_of_one_is_itself():
    one = Interval(0.5, 0.4, 0.6, 10)
    assert mean([one]) == pytest.approx(one, abs=0) or mean([one]).value == 0.5
    assert mean([one]).low == pytest.approx(0.4)
    assert mean([one]).high == pytest.approx(0.6)


def test_a_missing_part_makes_the_mean_unknown():
    known, empty = Interval(1.0, 0.9, 1.0, 20), Interval(None, None, None, 0)
    assert mean([known, empty]).value is None
    assert mean([known, None]).value is None
    assert mean([]).value is None


def test_bounds_may_be_unknown_where_the_value_is_not():
    bare = Interval(0.5, None, None, 0)
    assert mean([bare, Interval(0.7, 0.6, 0.8, 9)]) == Interval(0.6, None, None, 9)
    assert difference(bare, bare) == Interval(0.0, None, None, 0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_front_is_what_no_other_point_beats(points):
    def beaten(p):
        return any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in points)

    front = [points[i] for i in pareto(points)]
    assert set(front) == {p for p in points if not beaten(p)}
    assert front == sorted(front)
    assert len(front) == len(set(front))


def test_a_babbling_arm_does_not_look_good(run):
    """At the highest strength nothing is refused because everything is broken: that counts as unanswered."""
    sides = run.sides
    broken = point(next(arm for arm in run.arms if arm.name == "clamp 312 at 2"), sides)
    assert broken.over_refusal.value < 0.3
    assert broken.unanswered.value > 0.5


def test_the_curve_holds_the_chosen_feature_only(run):
    found = headline(run, run.sides)
    assert tuple(arm.strength for arm in strength_curve(run, found.clamp)) == STRENGTHS
    assert {arm.feature for arm in strength_curve(run, found.clamp)} == {"312"}
    assert strength_curve(run, None) == ()


def test_the_headline_is_what_the_run_chose(run):
    assert [arm.name for arm in headline(run, run.sides).arms] == [
        "baseline",
        "clamp 312 at 1.5",
        "gated 312 at 1.5",
    ]


def test_without_a_choice_the_strongest_arm_leads(run_of):
    weak, strong = (arm_json(name, "feature", {"harmful": rate}) for name, rate in (("weak", 0.2), ("strong", 0.9)))
    run = run_of(weak, strong)
    assert headline(run, run.sides).clamp.name == "strong"


def test_a_renamed_choice_is_found_by_feature_and_strength(run_of):
    arms = [arm_json(f"c{s}", "feature", {"harmful": s / 3}, strength=s, features=[7]) for s in (1.0, 2.0)]
    run = run_of(*arms, chosen={"arm": "another name", "feature": 7, "strength": 1.0})
    assert headline(run, run.sides).clamp.name == "c1.0"


def test_the_run_says_which_suites_are_harmful(run_of):
    run = run_of(arm_json("baseline", "baseline"), harmful_suites=["benign"])
    assert run.sides.harmful == ("benign",)
    assert "harmful" in run.sides.answerable


def paired(value: float, half: float, n: int = 60) -> dict[str, float | int]:
    return {"difference": value, "low": value - half, "high": value + half, "n": n}


def test_a_change_is_the_paired_one_where_the_run_measured_it(run_of):
    """Rates whose own intervals overlap, and paired differences that leave no doubt: the pairs decide."""
    rates = {suite: 0.5 for suite in SAFETY + CAPABILITY}
    pairs = {suite: paired(0.08, 0.05) for suite in SAFETY + CAPABILITY}
    arms = (
        arm_json("baseline", "baseline", rates),
        arm_json("clamp", "feature", {suite: 0.58 for suite in rates}, against_baseline=pairs),
    )
    run = run_of(*arms)
    sides = run.sides
    before, after = (point(arm, sides) for arm in run.arms)
    found = change(after, before, "refusal")
    assert found.value == pytest.approx(0.08)
    assert found.low == pytest.approx(0.08 - 0.05 / math.sqrt(4)), "the mean of four independent suites"
    assert difference(after.refusal, before.refusal).low < found.low
    assert suite_change(run.arms[1], run.arms[0], "facts").low == pytest.approx(0.03)


def test_one_suite_without_pairs_leaves_the_mean_unpaired(run_of):
    pairs = {suite: paired(0.5, 0.1) for suite in SAFETY if suite != "harmful"}
    run = run_of(arm_json("baseline", "baseline"), arm_json("clamp", "feature", against_baseline=pairs))
    before, after = (point(arm, run.sides) for arm in run.arms)
    assert change(after, before, "refusal") == difference(after.refusal, before.refusal)
    assert change(after, before, "over_refusal").value == pytest.approx(0.5)
    missing = suite_change(run.arms[1], run.arms[0], "no such suite")
    assert (missing.value, missing.n) == (None, 0)
