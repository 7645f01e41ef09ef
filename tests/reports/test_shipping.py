"""The range in which a plan may ship: a gain that is measured, no price, and nothing said between the strengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clampdown.reports.comparison import headline, strength_curve
from clampdown.reports.figures import strength_figures
from clampdown.reports.page import build_page
from clampdown.reports.shipping import Fitness, bands, in_words, ranges, steps_of
from clampdown.results.run import Run
from tests.reports.conftest import arm_json

SAFE = {"borderline": 0.1, "about_harm": 0.1, "benign": 0.0}
FINE = {**SAFE, "harmful": 0.9, "jailbroken_seen": 0.9, "jailbroken_unseen": 0.9, "multi_turn": 0.9}
RUINED = {**FINE, "facts": 0.1, "arithmetic": 0.1, "instructions": 0.1, "misconceptions": 0.1}
LOW = {**SAFE, "harmful": 0.3, "jailbroken_seen": 0.3, "jailbroken_unseen": 0.3, "multi_turn": 0.3}


def clamp(strength: float, rates: dict[str, float]) -> dict[str, Any]:
    arm = arm_json(f"clamp x{strength:g}", "feature", rates, strength=strength, features=[7], operator="clamp")
    return arm | {"group": "sweep", "kl_benign": 0.0}


def steps(run: Run) -> Any:
    found = headline(run, run.sides)
    return steps_of(strength_curve(run, found.clamp), found.baseline, run.sides)


def test_the_range_is_where_refusals_rise_and_nothing_is_paid(run_of: Callable[..., Run]) -> None:
    arms = [clamp(0.5, LOW), clamp(1.0, FINE), clamp(1.5, FINE), clamp(2.0, RUINED)]
    run = run_of(arm_json("baseline", "baseline", LOW), *arms)
    found = steps(run)
    assert [step.fitness for step in found] == [Fitness.NO_GAIN, Fitness.SHIPS, Fitness.SHIPS, Fitness.COSTS]
    assert "capability" in found[-1].reason
    assert bands(found, Fitness.SHIPS) == ((0.75, 1.75),)
    assert "strengths 1 to 1.5" in in_words(found)
    shapes = strength_figures(run, headline(run, run.sides), run.sides)[0].spec["layout"]["shapes"]
    assert [(shape["x0"], shape["x1"]) for shape in shapes if shape["type"] == "rect"] == [(0.75, 1.75)]
    assert "strengths 1 to 1.5" in build_page(run)


def test_a_gap_is_no_range(run_of: Callable[..., Run]) -> None:
    arms = [clamp(1.0, FINE), clamp(2.0, RUINED), clamp(3.0, FINE)]
    found = steps(run_of(arm_json("baseline", "baseline", LOW), *arms))
    assert [len(group) for group in ranges(found, Fitness.SHIPS)] == [1, 1]
    assert bands(found, Fitness.SHIPS) == ((0.5, 1.5), (2.5, 3.5))
    assert "strengths 1 and 3" in in_words(found)


def test_no_range_says_why(run_of: Callable[..., Run]) -> None:
    costly = steps(run_of(arm_json("baseline", "baseline", LOW), clamp(1.0, RUINED), clamp(2.0, RUINED)))
    assert "without a gate" in in_words(costly) and "capability" in in_words(costly)
    idle = steps(run_of(arm_json("baseline", "baseline", LOW), clamp(1.0, LOW), clamp(2.0, LOW)))
    assert "No strength may ship:" in in_words(idle)
    unmeasured = [{**arm, "capability": {}} for arm in (arm_json("baseline", "baseline", LOW), clamp(1.0, FINE))]
    assert "capability was not measured" in in_words(steps(run_of(*unmeasured)))
    assert in_words(steps(run_of(clamp(1.0, FINE)))) == ""
