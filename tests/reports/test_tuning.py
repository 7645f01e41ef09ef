"""The report of a tuned run: its budgets, finalists and frontier are on the page, and no other run has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clampdown.reports.page import build_page
from clampdown.reports.tuning import tuning_sentence, tuning_tables
from clampdown.results.run import Run
from tests.reports.conftest import arm_json, changed


def interval(value: float) -> dict[str, Any]:
    return {"value": value, "low": None, "high": None, "n": 20}


def use(budget: str, bound: float | None) -> dict[str, Any]:
    return {"budget": budget, "limit": 0.02, "estimate": 0.005, "bound": bound, "n": 400, "holds": True}


def finalist(name: str, refusal: float, away: list[str]) -> dict[str, Any]:
    budgets = [use("over-refusal", 0.015), use("benign KL", None)]
    rates = {"harmful": interval(refusal), "multi_turn": interval(refusal)}
    return {"setting": name, "refusal": refusal, "refusals": rates, "budgets": budgets, "turned_away_by": away}


CHOSEN, OTHER = finalist("clamp 1 <b>", 0.9, []), finalist("add 2", 0.95, ["capability loss"])
TUNE = {
    "setting": "clamp 1 <b>",
    "trials": 7,
    "confidence": 0.95,
    "validation": CHOSEN,
    "finalists": [CHOSEN, OTHER],
    "frontier": [{"number": 3, "name": "clamp 1 <b>", "cost": 0.25, "score": {"refusal": 0.9}}],
    "binding": {"capability loss": 1},
    "test": [use("over-refusal", 0.03)],
}


def test_the_page_shows_bounds_finalists_and_what_turned_them_away(run_of: Callable[..., Run]) -> None:
    run = run_of(arm_json("baseline", "baseline"), arm_json("tuned", "tuned"), tune=TUNE)
    budgets, finalists, frontier = tuning_tables(run)
    shown = [cell.text.replace("\N{NO-BREAK SPACE}", "") for cell in budgets.rows[0].cells]
    assert shown == ["over-refusal", "0.02", "0.005", "0.015", "400", "75%", "0.005"]
    assert [row.strong for row in finalists.rows] == [True, False]
    assert finalists.rows[1].cells[-1].text == "capability loss"
    assert frontier.rows[0].cells[1].text == "3"
    assert "**capability loss (1)**" in tuning_sentence(run.tune)
    assert "Not checked" not in tuning_sentence(run.tune)
    assert "**capability loss**." in tuning_sentence(changed(run.tune, unchecked=("capability loss",)))
    page = build_page(run)
    assert "How the plan was tuned" in page and "clamp 1 &lt;b&gt;" in page and "clamp 1 <b>" not in page


def test_a_run_that_was_not_tuned_has_no_such_section(run_of: Callable[..., Run]) -> None:
    run = run_of(arm_json("baseline", "baseline"))
    assert tuning_tables(run) == ()
    assert "How the plan was tuned" not in build_page(run)
