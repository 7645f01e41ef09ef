"""Intervals and tests against scipy's own implementations, and the traps: no data, unscored replies, unpaired arms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap, norm

from clampdown.evaluation import intervals, metrics
from clampdown.types import Interval, Record, Split, Verdict

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
confidences = st.sampled_from([0.8, 0.9, 0.95, 0.99])


def record(i: int, verdict: Verdict = Verdict.COMPLIED, correct: bool | None = None, arm: str = "a") -> Record:
    return Record(arm, "s", f"p{i}", Split.TEST, None, "reply", 3, verdict, correct, "j")


@given(counts, confidences)
def test_wilson_is_scipys(count: tuple[int, int], confidence: float) -> None:
    k, n = count
    expected = binomtest(k, n).proportion_ci(confidence, method="wilson")
    found = intervals.wilson(k, n, confidence)
    assert (found.value, found.n) == (k / n, n)
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)


@given(counts, confidences)
def test_clopper_pearson_is_scipys(count: tuple[int, int], confidence: float) -> None:
    k, n = count
    expected = binomtest(k, n).proportion_ci(confidence, method="exact")
    found = intervals.clopper_pearson(k, n, confidence)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test_of_the_discordant_pairs(gained: int, lost: int) -> None:
    found = intervals.mcnemar(gained, lost)
    if gained + lost == 0:
        assert found is None
    else:
        assert found == pytest.approx(binomtest(gained, gained + lost, 0.5).pvalue)


def test_mcnemar_by_counting_every_outcome() -> None:
    """Five discordant pairs, all one way: 2 of the 2^5 equally likely outcomes are as extreme."""
    assert intervals.mcnemar(5, 0) == pytest.approx(2 / 32)


def test_too_little_data_is_none_and_never_zero() -> None:
    nothing = Interval(None, None, None, 0)
    assert intervals.wilson(0, 0) == intervals.clopper_pearson(0, 0) == metrics.accuracy([]) == nothing
    assert intervals.paired_bootstrap([], []) == nothing
    assert set(metrics.rates([]).values()) == {nothing}
    assert metrics.accuracy([record(0, correct=None)]) == nothing
    one = intervals.paired_bootstrap([0.0], [1.0])
    assert (one.value, one.low, one.high, one.n) == (1.0, None, None, 1)


@pytest.mark.parametrize("count", [(-1, 3), (4, 3)])
def test_impossible_counts_are_refused(count: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="successes out of"):
        intervals.wilson(*count)


def test_unscored_replies_are_counted_and_not_guessed() -> None:
    verdicts = [Verdict.REFUSED] * 6 + [Verdict.COMPLIED] * 2 + [Verdict.UNSCORED] * 2
    found = metrics.rates([record(i, v) for i, v in enumerate(verdicts)])
    assert (found[Verdict.REFUSED].value, found[Verdict.REFUSED].n) == (0.75, 8)
    assert (found[Verdict.UNSCORED].value, found[Verdict.UNSCORED].n) == (0.2, 10)


@given(st.lists(st.sampled_from(list(Verdict)), min_size=1))
def test_the_scored_verdicts_share_out_all_scored_replies(verdicts: list[Verdict]) -> None:
    found = metrics.rates([record(i, v) for i, v in enumerate(verdicts)])
    shares = [found[v].value for v in Verdict if v is not Verdict.UNSCORED]
    if None in shares:
        assert set(verdicts) == {Verdict.UNSCORED}
    else:
        assert sum(share or 0.0 for share in shares) == pytest.approx(1.0)


def test_comparison_pairs_by_prompt_whatever_the_order() -> None:
    first = [record(i, Verdict.REFUSED if i < 3 else Verdict.COMPLIED) for i in range(10)]
    second = [record(i, Verdict.REFUSED if i < 7 else Verdict.COMPLIED, arm="b") for i in reversed(range(10))]
    found = metrics.compare(first, second, metrics.refused)
    assert (found.gained, found.lost, found.difference.n) == (4, 0, 10)
    assert found.difference.value == pytest.approx(0.4)
    assert found.p_value == pytest.approx(0.125)


def test_attempts_at_one_objective_are_no_more_evidence_than_one() -> None:
    """Six objectives gained, each of four attempts: p is that of six prompts, not of twenty-four."""

    def attempts(verdict: Verdict, n: int) -> list[Record]:
        return [replace(record(i, verdict), objective=str(i // n)) for i in range(6 * n)]

    once = metrics.compare(attempts(Verdict.COMPLIED, 1), attempts(Verdict.REFUSED, 1), metrics.refused)
    four = metrics.compare(attempts(Verdict.COMPLIED, 4), attempts(Verdict.REFUSED, 4), metrics.refused)
    assert (four.gained, four.lost) == (24, 0)
    assert four.p_value == once.p_value == pytest.approx(2 / 2**6)


def test_prompts_that_one_arm_lacks_or_that_are_unscored_do_not_count() -> None:
    first = [record(0, Verdict.REFUSED), record(1, Verdict.UNSCORED), record(2, Verdict.COMPLIED)]
    second = [record(0), record(1), record(9)]
    assert [(pair.before, pair.after) for pair in metrics.paired(first, second, metrics.refused)] == [(True, False)]


def test_bootstrap_resamples_pairs_and_not_arms() -> None:
    """Every second score is the first plus 0.1: the paired difference has no spread, however far the scores spread."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=80)
    found = intervals.paired_bootstrap(first.tolist(), (first + 0.1).tolist())
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_bootstrap_of_many_differences_is_the_normal_interval() -> None:
    differences = np.random.default_rng(1).normal(0.3, 1.0, 400)
    found = intervals.paired_bootstrap([0.0] * 400, differences.tolist())
    half = norm.ppf(0.975) * differences.std(ddof=1) / np.sqrt(400)
    assert found.low == pytest.approx(differences.mean() - half, abs=0.01)
    assert found.high == pytest.approx(differences.mean() + half, abs=0.01)
    again = bootstrap((differences,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    assert (found.low, found.high) == (again.low, again.high)


def test_mean_over_suites_needs_every_suite() -> None:
    known = [Interval(0.5, 0, 1, 4), Interval(1.0, 0, 1, 400)]
    assert metrics.mean_of(known) == 0.75
    assert metrics.mean_of([*known, intervals.NO_DATA]) is None
    assert metrics.mean_of([]) is None
