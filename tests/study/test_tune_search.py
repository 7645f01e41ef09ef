"""The search: the same seed asks the same questions, a killed run goes on as it would have, and good regions win."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from clampdown.errors import NotEnoughDataError, StoreError
from clampdown.study.budgets import CAPABILITY, OVER_REFUSAL, Use
from clampdown.study.tune.search import (
    HAND_MADE,
    NO_GATE,
    Combination,
    Effort,
    Score,
    Setting,
    Space,
    Trial,
    TrialLog,
    finalists,
    pareto,
    search,
)

DROPPED = Combination((1,), "add", "prompt")
COMBINATIONS = tuple(
    one
    for features in ((1,), (2,), (1, 2))
    for operator in ("add", "clamp")
    for scope in ("all", "prompt")
    if (one := Combination(features, operator, scope)) != DROPPED
)
SPACE = Space(COMBINATIONS, (NO_GATE, "dense", "probe10"), (0.01, 0.05))
EFFORT = Effort(trials=40, batch=7, seed=3)


def score(setting: Setting) -> Score:
    """Refusals rise with the strength; without a gate, or at every token, it costs."""
    refusal = min(1.0, 0.3 * setting.multiple + 0.2 * (1 in setting.combination.features))
    loss = 0.02 * setting.multiple * (setting.gate == NO_GATE) + 0.03 * (setting.combination.scope == "all")
    uses = (Use(OVER_REFUSAL, 0.02, loss, None, 50), Use(CAPABILITY, 0.02, 2 * loss, None, 50))
    return Score(refusal, {"harmful": refusal}, uses)


class Measure:
    """Counts what it was asked, and may be killed at one of its calls."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.asked: list[Setting] = []
        self.calls, self.dies_at = 0, dies_at

    def __call__(self, first: int, settings: Sequence[Setting]) -> list[Score]:
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        self.calls += 1
        self.asked += settings
        return [score(setting) for setting in settings]


def run(path: Path, measure: Measure | None = None, effort: Effort = EFFORT) -> tuple[Trial, ...]:
    return search(SPACE, measure or Measure(), effort, TrialLog(path))


def test_the_same_seed_asks_the_same_and_another_seed_does_not(tmp_path: Path) -> None:
    first = run(tmp_path / "a.jsonl")
    assert len(first) == 40 and [trial.number for trial in first] == list(range(40))
    assert run(tmp_path / "b.jsonl") == first
    assert run(tmp_path / "c.jsonl", effort=Effort(40, 7, seed=4)) != first


@pytest.mark.parametrize("dies_at", [0, 1, 4, 5])
def test_a_killed_search_goes_on_as_it_would_have(tmp_path: Path, dies_at: int) -> None:
    whole = run(tmp_path / "whole.jsonl")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed.jsonl", Measure(dies_at))
    rest = Measure()
    assert run(tmp_path / "killed.jsonl", rest) == whole
    assert len(rest.asked) == 40 - 7 * dies_at


def test_a_kill_in_the_middle_of_a_line_costs_one_batch(tmp_path: Path) -> None:
    whole = run(tmp_path / "log.jsonl")
    raw = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(raw[: len(raw) // 2])
    rest = Measure()
    assert run(tmp_path / "log.jsonl", rest) == whole
    assert (tmp_path / "log.jsonl").read_bytes() == raw
    assert len(rest.asked) < 30


def test_a_finished_search_measures_nothing_again(tmp_path: Path) -> None:
    whole, again = run(tmp_path / "log.jsonl"), Measure()
    assert run(tmp_path / "log.jsonl", again) == whole
    assert not again.asked


def test_the_log_of_another_search_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "log.jsonl")
    with pytest.raises(StoreError, match="holds another search"):
        run(tmp_path / "log.jsonl", effort=Effort(40, 7, seed=9))


def test_what_screening_dropped_is_never_measured(tmp_path: Path) -> None:
    measure = Measure()
    run(tmp_path / "log.jsonl", measure)
    assert {setting.combination for setting in measure.asked} <= set(COMBINATIONS)
    assert all((setting.budget is None) == (setting.gate == NO_GATE) for setting in measure.asked)


def test_the_search_learns_where_budgets_hold_and_refusals_are_many(tmp_path: Path) -> None:
    trials = run(tmp_path / "log.jsonl", effort=Effort(60, 6, seed=0))

    def good(some: Sequence[Trial]) -> int:
        return sum(not t.score.over and (t.score.refusal or 0) > 0.6 for t in some)

    assert good(trials[30:]) > 2 * good(trials[:16])


def test_a_plan_that_could_not_be_measured_is_a_trial_without_a_result(tmp_path: Path) -> None:
    def broken(first: int, settings: Sequence[Setting]) -> list[Score]:
        return [Score(None, {}, (), "NaN") if s.multiple > 1 else score(s) for s in settings]

    trials = search(SPACE, broken, EFFORT, TrialLog(tmp_path / "log.jsonl"))
    unmeasured = [trial for trial in trials if trial.score.refusal is None]
    kept = [*pareto(trials), *finalists(trials, 40)]
    assert unmeasured and kept and not any(trial in kept for trial in unmeasured)
    assert search(SPACE, broken, EFFORT, TrialLog(tmp_path / "log.jsonl")) == trials


def test_the_frontier_is_what_no_trial_beats(tmp_path: Path) -> None:
    trials = run(tmp_path / "log.jsonl")

    def beaten(one: Trial) -> bool:
        a, b = one.score.refusal or 0, one.score.cost
        return any(
            (t.score.refusal or 0) >= a and t.score.cost <= b and ((t.score.refusal or 0) > a or t.score.cost < b)
            for t in trials
        )

    points = {(t.score.refusal, t.score.cost) for t in trials if not beaten(t)}
    assert {(t.score.refusal, t.score.cost) for t in pareto(trials)} == points


def test_finalists_are_the_best_within_the_budgets_and_differ(tmp_path: Path) -> None:
    trials = run(tmp_path / "log.jsonl")
    chosen = finalists(trials, 6)
    fair = [trial for trial in trials if not trial.score.over]
    assert all(trial in fair for trial in chosen)
    assert chosen[0].score.refusal == max(trial.score.refusal or 0 for trial in fair)
    assert len({str(trial.setting) for trial in chosen}) == len(chosen) == 6
    assert {trial.setting.budget for trial in chosen[:2]} == {trial.setting.budget for trial in fair}


def test_an_empty_space_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughDataError):
        search(Space((), (NO_GATE,), ()), Measure(), EFFORT, TrialLog(tmp_path / "log.jsonl"))


def test_the_search_begins_where_it_is_told_and_asks_only_for_promises_that_there_are(tmp_path: Path) -> None:
    own = Combination((7, 8), HAND_MADE, "prompt")
    starts = tuple(Setting(own, 1.0, HAND_MADE, 0.02, 0.95, down) for down in (False, True))
    promises = frozenset({(HAND_MADE, 0.02, 0.95), ("dense", 0.01, 0.9)})
    space = Space(
        (*COMBINATIONS, own), (NO_GATE, "dense", HAND_MADE), (0.01, 0.02),
        confidences=(0.9, 0.95), sides=(False, True), starts=starts, promises=promises,
    )  # fmt: skip
    measure = Measure()
    trials = search(space, measure, EFFORT, TrialLog(tmp_path / "log.jsonl"))
    assert tuple(trial.setting for trial in trials[:2]) == starts
    asked = {(s.gate, s.budget, s.confidence) for s in measure.asked if s.gate != NO_GATE}
    assert asked == promises
    assert {s.down for s in measure.asked if s.gate == NO_GATE} == {False}
    assert {s.down for s in measure.asked} == {False, True}
    assert search(space, (again := Measure()), EFFORT, TrialLog(tmp_path / "log.jsonl")) == trials
    assert not again.asked


def test_what_is_beside_features_is_asked_for_only_where_it_can_be(tmp_path: Path) -> None:
    """Directions pass through no SAE, and strength grows behind gates only, of which the score is known."""
    cones = tuple(Combination((), "floor_direction", scope, k) for k in (1, 3) for scope in ("all", "prompt"))
    space = Space(
        (*COMBINATIONS, *cones), (NO_GATE, "dense", "probe10"), (0.01, 0.05), error_terms=("keep", "correct"),
        leasts=(0.5, 1.0), growing=frozenset({("dense", budget, 0.95) for budget in (0.01, 0.05)}),
    )  # fmt: skip
    measure = Measure()
    found = search(space, measure, Effort(40, 20, seed=1), TrialLog(tmp_path / "log.jsonl"))
    asked = measure.asked
    assert {s.combination.directions for s in asked} == {0, 1, 3} and {s.error_term for s in asked} == {
        "keep",
        "correct",
    }
    assert {s.gate for s in asked if s.least < 1} == {"dense"}
    for setting in asked:
        plain = setting.gate == NO_GATE or setting.combination.directions
        assert not plain or setting.error_term == "keep"
        assert ("directions" in str(setting)) == bool(setting.combination.directions)
        assert ("error term correct" in str(setting)) == (setting.error_term == "correct")
        assert ("from 50% of it" in str(setting)) == (setting.least == 0.5)
    assert search(space, Measure(0), Effort(40, 20, seed=1), TrialLog(tmp_path / "log.jsonl")) == found
