"""A sweep's arms are multiples of the feature's scale, and the rule that picks one is kept to the letter."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clampdown.errors import StrengthError
from clampdown.steering.plan import Edit
from clampdown.study.frontier import Axes
from clampdown.study.strengths import Candidate, Rule, candidates, choose, sweep_arms
from clampdown.types import ArmKind, Record, Split, Verdict
from tests.evaluation.conftest import arm, clamp, gate, suite
from tests.steering.conftest import SITE, make_plan


def test_every_multiple_becomes_an_arm() -> None:
    arms = sweep_arms(clamp(1.0, name="clamp 3"), [8.0], (0.5, 1.0, 1.5))
    assert [a.strength for a in arms] == [4.0, 8.0, 12.0]
    assert [a.plan.edits[0].strengths for a in arms if a.plan] == [(4.0,), (8.0,), (12.0,)]
    assert [a.name for a in arms] == ["clamp 3 x0.5", "clamp 3 x1", "clamp 3 x1.5"]
    assert {a.group for a in arms} == {"clamp 3"}
    assert len({a.plan.digest for a in arms if a.plan}) == 3


def test_each_feature_has_its_own_unit() -> None:
    edit = Edit(site=SITE.name, operator="clamp", features=(1, 2), strengths=(1.0, 1.0))
    (found,) = sweep_arms(make_plan(edit), [2.0, 5.0], (1.5,))
    assert found.plan is not None
    assert found.plan.edits[0].strengths == (3.0, 7.5)


def test_the_kind_follows_the_plan() -> None:
    dense = Edit(site=SITE.name, operator="add_direction", vector="v", strengths=(1.0,))
    plans = [clamp(1.0), make_plan(*clamp(1.0).edits, gate=gate(1)), make_plan(dense, vectors={"v": (1.0,) * 32})]
    kinds = [sweep_arms(plan, [1.0], (1.0,))[0].kind for plan in plans]
    assert kinds == [ArmKind.FEATURE, ArmKind.GATED, ArmKind.DIRECTION]


@pytest.mark.parametrize("unit", [0.0, -1.0, float("nan"), float("inf")])
def test_a_feature_without_a_scale_cannot_be_swept(unit: float) -> None:
    with pytest.raises(StrengthError):
        sweep_arms(clamp(1.0), [unit])


def found(strength: float, refusal: float | None, degenerate: float | None = 0.0) -> Candidate:
    return Candidate(arm(clamp(strength), f"x{strength:g}"), Axes(refusal, 0.0, degenerate, 1.0))


def test_the_smallest_strength_that_is_nearly_the_best_is_chosen() -> None:
    curve = [found(2.0, 0.90), found(0.5, 0.6), found(1.0, 0.96), found(1.5, 1.0)]
    chosen = choose(curve, Rule(share=0.95)).chosen
    assert chosen is not None
    assert chosen.arm.name == "x1"


def test_a_degenerate_strength_is_not_eligible_and_sets_no_goal() -> None:
    """Otherwise a broken model's score would be the one to reach."""
    choice = choose([found(1.0, 0.8), found(2.0, 1.0, degenerate=0.4)])
    assert choice.chosen is not None
    assert choice.chosen.arm.name == "x1"
    assert len(choice.candidates) == 2
    assert choose([found(2.0, 1.0, degenerate=0.4)]).chosen is None


def test_what_gains_nothing_over_the_baseline_is_never_chosen() -> None:
    assert choose([found(1.0, 0.7), found(2.0, 0.6)], baseline=0.7).chosen is None
    choice = choose([found(1.0, 0.71), found(2.0, 0.9)], baseline=0.7)
    assert choice.chosen is not None and choice.chosen.arm.name == "x2"


def test_no_data_is_never_chosen() -> None:
    assert choose([]).chosen is None
    assert choose([found(1.0, None), found(2.0, 0.9, None)]).chosen is None


@given(
    st.lists(
        st.builds(found, st.floats(0.1, 10), st.none() | st.floats(0, 1), st.none() | st.floats(0, 0.2)), max_size=8
    ),
    st.floats(0.5, 1.0),
    st.floats(0, 0.1),
    st.floats(0, 1),
)
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
def test_the_rule_to_the_letter(curve: list[Candidate], share: float, limit: float, baseline: float) -> None:
    choice = choose(curve, Rule(share, limit), baseline=baseline)
    eligible = [c for c in curve if c.axes.refusal is not None and c.axes.degenerate is not None
                and c.axes.degenerate <= limit]  # fmt: skip
    gains = [(c.axes.refusal or 0) - baseline for c in eligible]
    assert (choice.chosen is None) == (max(gains, default=0) <= 0)
    if choice.chosen is not None:
        best = max(gains)
        assert choice.chosen in eligible
        assert (choice.chosen.axes.refusal or 0) - baseline >= share * best
        for other in eligible:
            if (other.arm.strength or 0) < (choice.chosen.arm.strength or 0):
                assert (other.axes.refusal or 0) - baseline < share * best


def test_the_rule_says_itself() -> None:
    assert "0.9 of the best gain" in str(Rule(0.9, 0.02))
    assert "degenerate <= 0.02" in str(Rule(0.9, 0.02))


def test_candidates_are_measured_from_their_own_records() -> None:
    suites = [suite("harmful", 4, harmful=True)]
    arms = sweep_arms(clamp(1.0), [1.0], (1.0, 2.0))
    records = [
        Record(a.name, "harmful", p.id, Split.VALIDATION, None, "r", 3,
               Verdict.REFUSED if i <= n else Verdict.DEGENERATE, None, "j")
        for n, a in enumerate(arms) for i, p in enumerate(suites[0].prompts)
    ]  # fmt: skip
    weak, strong = candidates(arms, records, suites)
    assert (weak.axes.refusal, weak.axes.degenerate) == (0.25, 0.75)
    assert (strong.axes.refusal, strong.axes.degenerate) == (0.5, 0.5)
