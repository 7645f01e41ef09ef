"""The verdict says what the numbers say, and no more."""

from __future__ import annotations

import re

import pytest

from clampdown.reports.comparison import headline
from clampdown.reports.figures import frontier_figures
from clampdown.reports.page import tiles
from clampdown.reports.verdict import title, verdict
from clampdown.reports.wording import MISSING, UNIT, number, percent
from tests.reports.conftest import arm_json, changed
from tests.reports.example_run import CAPABILITY, SAFETY, wilson

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
    assert headline_of(run) == "Clamping raises refusals and costs good answers"


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
    assert headline_of(run) == "Steering raises refusals and costs good answers"
    assert said(run)["Gain"].startswith("“refined” raises refusals")


def test_no_effect_is_called_no_effect(run_of):
    run = run_of(BASELINE, arm_json("clamp", "feature", rates(0.52, 0.06, 0.94)))
    assert "does not measurably change" in said(run)["Gain"]
    assert "Price" not in said(run)
    assert "no suite measurably worse" in said(run)["No price found"]
    assert "did not measurably raise" in headline_of(run)


def test_a_falling_rate_is_called_falling(run_of):
    run = run_of(BASELINE, arm_json("clamp", "feature", rates(0.1, 0.05, 0.95)))
    assert "lowers refusals" in said(run)["Gain"]


def test_gain_without_cost(run_of):
    run = run_of(BASELINE, arm_json("clamp", "feature", rates(0.95, 0.05, 0.95)))
    assert headline_of(run) == "Clamping raises refusals; no cost was found"


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
    assert "lowers mean capability" in said(run)["Behind a gate"]
    assert "keeps" not in said(run)["Behind a gate"]


def test_a_tuned_plan_has_its_own_sentence(run_of):
    run = run_of(BASELINE, COSTLY, arm_json("best plan", "tuned", rates(0.97, 0.05, 0.95)))
    assert "“best plan” refuses" in said(run)["Tuned"]
    assert headline_of(run).endswith("“best plan” keeps both")


def test_refusals_among_lost_answers_are_counted(run):
    assert "of the capability answers are refusals" in said(run)["Price"]


def test_few_controls_are_named_and_many_are_ranged(run_of):
    controls = [arm_json(f"random {i}", "control", rates(0.5 + i / 100, 0.1, 0.7)) for i in range(20)]
    assert "random 1 refuses" in said(run_of(BASELINE, COSTLY, *controls[:2]))["Controls"]
    many = said(run_of(BASELINE, COSTLY, *controls))["Controls"]
    assert f"20 other controls refuse 50 to 69{UNIT} at 70{UNIT} mean capability" in many


def test_a_run_without_a_baseline_or_without_steering_says_so(run_of):
    assert "no baseline" in said(run_of(COSTLY))["Note"]
    assert "nothing was steered" in said(run_of(BASELINE))["Note"]


def test_missing_numbers_are_left_out(run_of):
    bare = {"suites": {"harmful": {"refused": {"value": None, "low": None, "high": None, "n": 0}}}, "capability": {}}
    run = run_of(BASELINE | bare, COSTLY | bare)
    assert "None" not in str(said(run)) and MISSING not in str(said(run))
    assert "Price" not in said(run)


def test_a_small_change_counts_when_the_same_prompts_show_it(run_of):
    """Ten of 200 prompts newly refused and none lost: no doubt on the same prompts, much between independent rates."""
    pair = {"difference": 0.05, "low": 0.02, "high": 0.09, "n": 200}
    after = {suite: rate + 0.05 for suite, rate in rates(0.5, 0.05, 0.9).items()}
    paired = arm_json("clamp", "feature", after, against_baseline=dict.fromkeys(SAFETY, pair))
    assert "raises refusals" in said(run_of(BASELINE, paired))["Gain"]
    assert "+5 points [+2 to +9] on the same prompts" in said(run_of(BASELINE, paired))["Gain"]
    assert "does not measurably change" in said(run_of(BASELINE, paired | {"against_baseline": {}}))["Gain"]


# ---- what is not known is not called free ----------------------------------------------------------------------


def without(arm: dict, *parts: str) -> dict:
    """The arm without capability, safe suites or likelihoods."""
    suites = {suite: rate for suite, rate in arm["suites"].items() if "safe" not in parts or suite in HARMFUL}
    return arm | {"suites": suites} | ({"capability": {}} if "capability" in parts else {})


def broken(arm: dict, share: float, n: int = 200) -> dict:
    rate = {"degenerate": wilson(round(share * n), n)}
    return arm | {"suites": {suite: found | rate for suite, found in arm["suites"].items()}}


STRONG = arm_json("clamp", "feature", rates(0.95, 0.05, 0.95), strength=9.0, features=[312])


def test_capability_that_was_not_measured_is_no_proof_of_no_price(run_of):
    run = run_of(without(BASELINE, "capability"), without(STRONG, "capability"))
    assert "No price found" not in said(run)
    assert "capability was not measured" in said(run)["Price unclear"]
    assert headline_of(run) == "Clamping raises refusals; what it costs is not settled"


def test_replies_that_break_are_a_price_however_much_else_is_left_alone(run_of):
    few = run_of(broken(BASELINE, 0.0), broken(STRONG, 0.2))
    assert f"broken replies go **0{UNIT} → 20{UNIT}" in said(few)["Price"]
    assert headline_of(few) == "Clamping raises refusals and costs unbroken replies"
    run = run_of(*(without(broken(a, b), "capability") for a, b in ((BASELINE, 0.31), (STRONG, 1.0))))
    assert f"broken replies go **31{UNIT} → 100{UNIT}" in said(run)["Price"]
    assert "Capability was not measured" in said(run)["Price"]
    assert headline_of(run) == f"Clamping breaks 100{UNIT} of the replies"


def test_divergence_on_benign_text_is_a_price(run_of):
    run = run_of(BASELINE, STRONG | {"kl_benign": 0.24})
    assert "KL on benign text is **0.24** nats per token" in said(run)["Price"]
    assert headline_of(run) == "Clamping raises refusals and rewords benign text"
    assert "No price found" in said(run_of(BASELINE, STRONG | {"kl_benign": 0.004}))


def test_a_fall_within_chance_leaves_the_price_open(run_of):
    """Five of 24 right, then two of 24: nothing that an interval proves, and nothing to call free."""
    few = [without(a, "capability") | {"capability": {"mmlu": wilson(k, 24)}} for a, k in ((BASELINE, 5), (STRONG, 2))]
    run = run_of(*few)
    assert "mean capability worse by 12 points, as chance could do too" in said(run)["Price unclear"]
    assert headline_of(run) == "Clamping raises refusals; what it costs is not settled"


def test_answers_by_likelihood_count_where_nothing_was_generated(run_of):
    arms = [
        without(a, "capability") | {"capability_by_likelihood": {"mmlu": wilson(k, 240)}}
        for a, k in ((BASELINE, 180), (STRONG, 90))
    ]
    run = run_of(*arms)
    assert f"by the options' likelihood go **75{UNIT} → 38{UNIT}" in said(run)["Price"]
    assert headline_of(run) == "Clamping raises refusals and costs good answers"


def test_one_suite_that_fell_is_a_price_that_the_mean_hides(run_of):
    pair = {"difference": -0.05, "low": -0.09, "high": -0.02, "n": 200, "p_value": 0.004}
    same = {"difference": 0.0, "low": -0.02, "high": 0.02, "n": 200, "p_value": 1.0}
    paired = {suite: same for suite in CAPABILITY} | {"facts": pair}
    assert "Price" in said(run_of(BASELINE, STRONG | {"against_baseline": paired}))
    assert "No price found" in said(run_of(BASELINE, STRONG | {"against_baseline": paired | {"facts": same}}))


def test_a_plan_that_breaks_replies_or_was_not_measured_keeps_nothing(run_of):
    gated = arm_json("gated", "gated", rates(0.95, 0.05, 0.95))
    assert headline_of(run_of(BASELINE, COSTLY, broken(gated, 0.3))).endswith("“gated” breaks replies")
    assert "broken replies go" in said(run_of(BASELINE, COSTLY, broken(gated, 0.3)))["Behind a gate"]
    bare = [without(arm, "capability") for arm in (BASELINE, COSTLY, gated)]
    assert headline_of(run_of(*bare)).endswith("“gated” keeps the gain; capability was not measured")


@pytest.mark.parametrize("kind", ["gated", "tuned", "direction"])
def test_a_run_of_one_plan_is_about_that_plan(run_of, kind):
    """Evaluating a gated plan alone, with nothing that always steers beside it."""
    run = run_of(BASELINE, arm_json("mine", kind, rates(0.95, 0.05, 0.95), gates=[{"kind": "probe"}]))
    assert said(run)["Gain"].startswith("“mine” raises refusals of unseen jailbreaks")
    assert "mine" not in "".join(text for label, text in said(run).items() if label in ("Behind a gate", "Tuned"))


def test_a_run_without_harmful_prompts_says_that_it_cannot_know_the_gain(run_of):
    arms = [a | {"suites": {"benign": a["suites"]["benign"]}} for a in (BASELINE, STRONG)]
    run = run_of(*arms, harmful_suites=[])
    assert "was not asked harmful prompts" in said(run)["Gain"]
    assert headline_of(run).startswith("Clamping was measured without harmful prompts")
    assert MISSING not in str(said(run))


def test_a_model_that_never_refuses_is_not_said_to_refuse_more(run_of):
    run = run_of(*(arm_json(n, k, rates(0.0, 0.0, 0.9)) for n, k in (("baseline", "baseline"), ("clamp", "feature"))))
    assert f"does not measurably change refusals of unseen jailbreaks: **0{UNIT} → 0{UNIT}" in said(run)["Gain"]
    assert headline_of(run) == "Clamping did not measurably raise refusals of attacks; no cost was found"


def test_a_baseline_alone_says_what_it_does(run_of):
    assert f"**50{UNIT} [43–57]** of unseen jailbreaks refused" in said(run_of(BASELINE))["Note"].replace("–", "–")
    assert headline_of(run_of(BASELINE)) == "What the unsteered model refuses, and what it can do"


def test_what_too_few_prompts_could_not_show_is_said_with_the_number_that_would_do(run_of):
    left = [{"stage": "gate", "reason": "12 benign prompts cannot promise 2 %", "needed": 149, "role": "benign"}]
    assert said(run_of(BASELINE, STRONG, left_out=left))["Not shown"] == (
        "gate: 12 benign prompts cannot promise 2 %; 149 benign prompts would do."
    )


def test_an_arm_is_called_by_its_name_and_nothing_else(run_of):
    names = ("clamp 352 x2, prompt only", "clamp 352 prompt x2 gated")
    run = run_of(
        BASELINE,
        arm_json(names[0], "feature", rates(0.95, 0.9, 0.5), strength=9.0),
        arm_json(names[1], "gated", rates(0.95, 0.05, 0.95)),
    )
    found = headline(run, run.sides)
    assert [row.label for tile in tiles(found, run.sides) for row in tile.rows][:3] == ["baseline", *names]
    every = " ".join((headline_of(run), *said(run).values()))
    assert all(f"“{name}”" in every for name in names) and "onditional" not in every
    labels = frontier_figures(run, found, run.sides)[0].spec["layout"]["annotations"]
    assert {re.sub("<.?b>", "", label["text"]) for label in labels} == {"baseline", *names}
