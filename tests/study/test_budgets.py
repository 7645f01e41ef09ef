"""Budgets: bounds that cover, prompts that nobody generated, and the n that would do."""

from __future__ import annotations

import math

import pytest
from scipy.stats import multinomial

from clampdown.errors import NotEnoughDataError, PlanError
from clampdown.evaluation.metrics import correct, refused
from clampdown.study.budgets import (
    CAPABILITY,
    KL,
    OVER_REFUSAL,
    BenignKl,
    Budgets,
    Change,
    Evidence,
    Use,
    changes,
    check_provable,
    net_bound,
    weigh,
)
from clampdown.types import Record, Split, Verdict

SAME = Change(worse=False, better=False, cluster=None)


def prompts(n: int, worse: int = 0, better: int = 0) -> list[Change]:
    return [Change(i < worse, worse <= i < worse + better, i) for i in range(n)]


def used(changed: list[Change], kl: BenignKl | None = None) -> dict[str, Use]:
    found = weigh(Evidence({OVER_REFUSAL: changed}, kl or BenignKl(())), Budgets())
    return {use.budget: use for use in found}


@pytest.mark.parametrize("n", [8, 25])
@pytest.mark.parametrize(("worse", "better"), [(0.02, 0.0), (0.1, 0.1), (0.3, 0.05), (0.05, 0.3), (0.5, 0.5)])
def test_the_bound_of_the_difference_covers_it_at_any_n(n: int, worse: float, better: float) -> None:
    """Every outcome of n prompts with its exact probability: the bound lies below the truth at most 5 % of the time."""
    missed = 0.0
    for up in range(n + 1):
        for down in range(n + 1 - up):
            if net_bound(up, down, n, 0.95) < worse - better:
                missed += multinomial.pmf([up, down, n - up - down], n, [worse, better, 1 - worse - better])
    assert missed <= 0.05


def test_prompts_that_stay_prove_only_what_their_number_allows() -> None:
    """A gate that was shut on all rows is an event that was not seen: about 3 / n, never nothing."""
    bounds = [used(prompts(n))[OVER_REFUSAL].bound for n in (50, 100, 200, 400)]
    for n, bound in zip((50, 100, 200, 400), bounds, strict=True):
        assert bound is not None and 3 / n < bound < 3.2 / n
    assert used(prompts(400))[OVER_REFUSAL].estimate == 0


def test_rows_behind_a_shut_gate_count_as_much_as_rows_that_were_generated() -> None:
    generated = prompts(40, worse=1)
    unread = [Change(worse=False, better=False, cluster=("unread", i)) for i in range(360)]
    assert used([*generated, *unread])[OVER_REFUSAL] == used(prompts(400, worse=1))[OVER_REFUSAL]


def test_prompts_of_one_objective_count_once() -> None:
    twins = [Change(worse=i < 2, better=i == 3, cluster=i // 2) for i in range(100)]
    assert used(twins)[OVER_REFUSAL].bound == pytest.approx(net_bound(1, 0, 50, 0.95))
    assert used(twins)[OVER_REFUSAL].estimate == pytest.approx((2 - 1) / 100)


@pytest.mark.parametrize("limit", [0.01, 0.02, 0.05])
def test_the_n_that_is_named_would_do_and_one_less_would_not(limit: float) -> None:
    budgets = Budgets(capability=limit)
    with pytest.raises(NotEnoughDataError) as error:
        check_provable({CAPABILITY: 5}, budgets)
    needed = int((error.value.hint or "").split("at least ")[1].split()[0])
    check_provable({CAPABILITY: needed}, budgets)
    assert net_bound(0, 0, needed, budgets.confidence) <= limit
    with pytest.raises(NotEnoughDataError):
        check_provable({CAPABILITY: needed - 1}, budgets)


def test_kl_behind_a_gate_is_its_rate_times_the_kl_with_the_gate_open() -> None:
    values = tuple(1.0 + 0.1 * (i % 3) for i in range(60))
    mean = sum(values) / 60
    shut, seldom, always = (used([], BenignKl(values, fired, 300))[KL] for fired in (0, 3, 300))
    assert shut.estimate == 0 and seldom.estimate == pytest.approx(mean / 100)
    assert always.estimate == pytest.approx(mean)
    assert None not in (shut.bound, seldom.bound, always.bound)
    assert 0 < (shut.bound or 0) < (seldom.bound or 0) < (always.bound or 0)
    assert (always.bound or 0) > mean
    spread = used([], BenignKl(tuple(mean + 10 * (v - mean) for v in values), 3, 300))[KL]
    assert (spread.bound or 0) > (seldom.bound or 0)


def test_too_little_is_no_bound_and_holds_no_budget() -> None:
    for kl in (BenignKl(()), BenignKl((0.001,)), BenignKl((math.inf, math.inf))):
        assert not used([], kl)[KL].holds


def test_a_change_is_what_got_worse_in_the_sense_of_the_suite() -> None:
    def record(prompt: str, verdict: Verdict, right: bool | None) -> Record:
        return Record("a", "s", prompt, Split.VALIDATION, None, "", 1, verdict, right, "j")

    yes, no = Verdict.REFUSED, Verdict.COMPLIED
    before = [record("1", no, True), record("2", yes, False), record("3", Verdict.UNSCORED, None)]
    after = [record("1", yes, False), record("2", no, True), record("3", yes, None)]
    of_refusals = [(c.worse, c.better) for c in changes(before, after, refused, good=False)]
    of_answers = [(c.worse, c.better) for c in changes(before, after, correct, good=True)]
    assert of_refusals == of_answers == [(True, False), (False, True)]


@pytest.mark.parametrize("wrong", [{"over_refusal": 0.0}, {"capability": 1.0}, {"confidence": 1.5}, {"kl": 0.0}])
def test_a_budget_that_no_sample_can_prove_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError):
        Budgets(**wrong)


def test_a_bound_over_objectives_is_not_below_the_share_of_prompts() -> None:
    """One objective with a fifth of all prompts got worse: 1 objective of 161, but 0.2 of the prompts."""
    found = [Change(True, False, "large")] * 40 + [Change(False, False, i) for i in range(160)]
    use = weigh(Evidence({OVER_REFUSAL: found}, BenignKl(())), Budgets())[0]
    assert use.estimate == 0.2
    assert use.bound is not None and use.bound >= 0.2
    assert not use.holds
