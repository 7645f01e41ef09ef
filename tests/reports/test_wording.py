"""The verdict says what the numbers say, and no more."""

from __future__ import annotations

import pytest

from clampdown.reports.wording import MISSING, UNIT, number, percent, title, verdict
from tests.reports.conftest import arm_json, changed
from tests.reports.example_run import CAPABILITY, SAFETY

HARMFUL, SAFE = SAFETY[:4], SAFETY[4:]


def rates(harmful: float, safe: float, capability: float) -> dict[str, float]:
    return dict.fromkeys(HARMFUL, harmful) | dict.fromkeys(SAFE, safe) | dict.fromkeys(CAPABILITY, capability)


BASELINE = arm_json("baseline", "baseline", rates(0.5, 0.05, 0.95))
COSTLY = arm_json("clamp", "feature", rates(0.95, 0.9, 0.5), strength=9.731, features=[312])


def said(run) -> dict[str, str]:
    return {sentence.label: sentence.text for sentence in verdict(run, run.sides)}


def headline_of(run) -> str:
    return title(run, run.sides)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, MISSING),
        (0.0, "0"),
        (1.0, "100"),
        (0.999, ">99"),
        (0.001, "<1"),
        (0.5, "50"),
        (0.995, ">99"),
        (0.994, "99"),
    ],
)
def test_percentages_never_round_to_all_or_nothing(value, shown):
    assert percent(value) == (shown if value is None else shown + UNIT)


def test_one_digit_more_in_tables():
    assert percent(0.9996, unit="", digits=1) == ">99.9"
    assert percent(0.9993, unit="", digits=1) == "99.9"
    assert percent(0.0004, unit="", digits=1) == "<0.1"


def test_numbers():
    assert number(9.7312) == "9.73"
    assert number(1318.9) == "1,319"
    assert number(None) == MISSING


def test_gain_and_price(run_of):
    run = run_of(BASELINE, COSTLY, strength_unit="raw activation")
    text = said(run)
    assert "feature 312 to 9.73 (raw activation)" in text["Gain"]
    assert f"raises refusals of unseen jailbreaks: **50{UNIT} → 95{UNIT}" in text["Gain"]
    assert "n = 200" in text["Gain"]
    assert f"**5{UNIT} → 90{UNIT}" in text["Price"]
    assert f"**95{UNIT} → 50{UNIT}" in text["Price"]
    assert headline_of(run) == "Clamping trades good answers for refusals"


def test_a_chosen_strength_is_said_in_other_units_too(run_of):
    run = run_of(BASELINE, COSTLY, strength_unit="raw activation")
    note = "1.3 times its p99, moving the residual by 8%"
    chosen = changed(run.chosen, strength=9.731, strength_note=note)
    assert f"to 9.73 (raw activation; {note})" in said(changed(run, chosen=chosen))["Gain"]
    assert note not in said(changed(run, chosen=changed(chosen, strength=1.0)))["Gain"]


def test_an_operator_that_does_not_clamp_is_not_said_to(run_of):
    added = COSTLY | {"operator": "add", "name": "refined"}
    run = run_of(BASELINE, added)
    assert "lamp" not in headline_of(run) + "".join(said(run).values())
    assert headline_of(run) == "Steering trades good answers for refusals"
    assert said(run)["Gain"].startswith("The arm “refined” raises refusals")


def test_no_effect_is_called_no_effect(run_of):
    run = run_of(BASELINE, arm_json("clamp", "feature", rates(0.52, 0.06, 0.94)))
    assert "does not measurably change" in said(run)["Gain"]
    assert "Price" not in said(run)
    assert "no suite measurably worse" in said(run)["No price"]
    assert "did not measurably raise" in headline_of(run)


def test_a_falling_rate_is_called_falling(run_of):
    run = run_of(BASELINE, arm_json("clamp", "feature", rates(0.1, 0.05, 0.95)))
    assert "lowers refusals" in said(run)["Gain"]


def test_gain_without_cost(run_of):
    run = run_of(BASELINE, arm_json("clamp", "feature", rates(0.95, 0.05, 0.95)))
    assert headline_of(run) == "Clamping raises refusals; no cost was measured"


@pytest.mark.parametrize(
    ("gated", "ending"),
    [
        (rates(0.95, 0.05, 0.95), "keeps both"),
        (rates(0.95, 0.3, 0.95), "spares capability, not every borderline prompt"),
        (rates(0.95, 0.05, 0.8), "lowers the price"),
        (rates(0.5, 0.05, 0.95), "loses the gain"),
    ],
)
def test_the_title_claims_what_the_conditional_arm_does(run_of, gated, ending):
    run = run_of(BASELINE, COSTLY, arm_json("gated", "gated", gated))
    assert headline_of(run).endswith(ending)


def test_a_conditional_arm_that_loses_capability_is_not_said_to_keep_it(run_of):
    run = run_of(BASELINE, COSTLY, arm_json("gated", "gated", rates(0.95, 0.05, 0.8)))
    assert "lowers mean capability" in said(run)["Conditional"]
    assert "keeps" not in said(run)["Conditional"]


def test_a_tuned_plan_has_its_own_sentence(run_of):
    run = run_of(BASELINE, COSTLY, arm_json("tuned", "tuned", rates(0.97, 0.05, 0.95)))
    assert "The tuned plan refuses" in said(run)["Tuned"]
    assert headline_of(run).endswith("the tuned plan keeps both")


def test_refusals_among_lost_answers_are_counted(run):
    assert "of the capability answers are refusals" in said(run)["Price"]


def test_few_controls_are_named_and_many_are_ranged(run_of):
    controls = [arm_json(f"random {i}", "control", rates(0.5 + i / 100, 0.1, 0.7)) for i in range(20)]
    assert "random 1 refuses" in said(run_of(BASELINE, COSTLY, *controls[:2]))["Controls"]
    assert "20 controls refuse" in said(run_of(BASELINE, COSTLY, *controls))["Controls"]


def test_a_run_without_a_baseline_or_without_steering_says_so(run_of):
    assert "no baseline" in said(run_of(COSTLY))["Note"]
    assert "nothing was steered" in said(run_of(BASELINE))["Note"]


def test_missing_numbers_are_left_out(run_of):
    bare = {"suites": {"harmful": {"refused": {"value": None, "low": None, "high": None, "n": 0}}}, "capability": {}}
    run = run_of(BASELINE | bare, COSTLY | bare)
    assert "None" not in str(said(run))
    assert "Price" not in said(run)


def test_a_small_change_counts_when_the_same_prompts_show_it(run_of):
    """Ten of 200 prompts newly refused and none lost: no doubt on the same prompts, much between independent rates."""
    pair = {"difference": 0.05, "low": 0.02, "high": 0.09, "n": 200}
    after = {suite: rate + 0.05 for suite, rate in rates(0.5, 0.05, 0.9).items()}
    paired = arm_json("clamp", "feature", after, against_baseline=dict.fromkeys(SAFETY, pair))
    assert "raises refusals" in said(run_of(BASELINE, paired))["Gain"]
    assert "+5 points [+2 to +9] on the same prompts" in said(run_of(BASELINE, paired))["Gain"]
    assert "does not measurably change" in said(run_of(BASELINE, paired | {"against_baseline": {}}))["Gain"]
