"""Parts of the report that only some runs have: gates' curves, methods, budgets, categories, explanation, origins."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clampdown.reports.breakdowns import budget_places, category_tables
from clampdown.reports.comparison import headline
from clampdown.reports.examples import BUCKETS_PER_SUITE, Change, Paired, change_between, examples_of
from clampdown.reports.figures import frontier_figures
from clampdown.reports.methods_side_by_side import claims_table, method_figures, methods_table
from clampdown.reports.operating import ArmGate, Curve, curves, gates_of, guarantee, operating_figure
from clampdown.reports.origins import files_table, plans_table
from clampdown.reports.page import build_page, gate_sentence
from clampdown.reports.tables import MEASURES_ABREAST, arms_tables, facts, feature_tables
from clampdown.reports.wording import suite_title
from clampdown.results.points import point
from clampdown.results.run import Run
from clampdown.types import Record, Split, Verdict
from tests.reports.conftest import arm_json, changed
from tests.reports.example_run import BUDGETS, CAPABILITY, THRESHOLD


def resolved(spec: dict[str, Any]) -> dict[str, Any]:
    return json.loads(re.sub(r'"@[a-z0-9-]+(/[0-9.]+)?"', '"#123456"', json.dumps(spec)))


# --- gates --------------------------------------------------------------------------------------------------------

numbers = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=20)


@given(numbers, st.integers(-6, 6).map(float))
def test_a_curve_is_the_plain_count_above_each_threshold(scores: list[float], threshold: float) -> None:
    curve = Curve("s", tuple(sorted(scores)), "@s1", "circle", "solid", 1.0)
    assert curve.share_above(threshold) == sum(score > threshold for score in scores) / len(scores)


def test_at_its_own_threshold_a_curve_is_the_rate_at_which_the_gate_fired(run):
    found, sides = headline(run, run.sides), run.sides
    (gate,) = found.gated.gates
    assert gate.threshold == THRESHOLD
    shown = {curve.name: curve for curve in curves(gate, sides)}
    for suite in (*sides.harmful, *sides.answerable):
        fired = found.gated.gate_fired[suite]
        assert shown[suite_title(suite)].share_above(gate.threshold) == pytest.approx(fired.value)
    assert sum(len(curve.scores) for curve in shown.values()) == sum(r.arm == found.gated.name for r in run.records)


def test_the_operating_figure_shows_threshold_budget_and_guarantee(run):
    (gate,) = gates_of(run, headline(run, run.sides))
    figure = operating_figure(gate, run.sides, 0)
    assert figure is not None
    go.Figure(resolved(figure.spec))
    (promise,) = [trace for trace in figure.spec["data"] if trace["name"].startswith("guaranteed")]
    assert (promise["x"], promise["y"]) == ([THRESHOLD], [0.0075])
    lines = [(shape["x0"], shape["y0"]) for shape in figure.spec["layout"]["shapes"]]
    assert lines == [(THRESHOLD, 0), (0, 0.01)]
    for trace in figure.spec["data"][:-1]:
        assert trace["y"] == sorted(trace["y"], reverse=True), "fewer prompts lie above a higher threshold"


def test_a_guarantee_says_on_which_prompts_it_holds(run):
    (gate,) = headline(run, run.sides).gated.gates
    assert "400 benign prompts" in gate_sentence(gate)
    assert guarantee(gate) == "at most 0.75\u00a0% of benign prompts, 95\u00a0% confidence, n = 400"
    turned = changed(gate, guarantee=changed(gate.promise, on="harmful"))
    assert "400 harmful prompts" in gate_sentence(turned)
    assert "of harmful prompts" in guarantee(turned)
    assert guarantee(changed(gate, guarantee=None)) == ""


def test_each_gate_of_a_two_sided_plan_has_its_own_rates(run):
    """`gate_fired` of such an arm is true when either branch acted: it must not stand for either gate."""
    found = headline(run, run.sides)
    (gate,) = found.gated.gates
    second = changed(gate, branch="otherwise", guarantee=changed(gate.promise, budget=None), threshold=THRESHOLD + 1)
    two = replace(found, gated=changed(found.gated, gates=(gate, second)))
    gates = gates_of(run, two)
    assert [each.title.split(" of ")[0] for each in gates] == ["The gate", "The second gate"]
    for each in gates:
        for suite, rate in each.rates.items():
            scores = each.gate.scores[suite]
            assert rate.value == sum(score > each.gate.threshold for score in scores) / len(scores)
    fired = {suite: rate.value for suite, rate in found.gated.gate_fired.items()}
    assert {suite: rate.value for suite, rate in gates[0].rates.items()} == fired
    figure = operating_figure(gates[1], run.sides, 1)
    assert figure is not None
    assert len(figure.spec["layout"]["shapes"]) == 1


def test_a_run_that_keeps_no_gates_with_its_arms_shows_the_summarys(run):
    found = headline(run, run.sides)
    bare = replace(found, gated=changed(found.gated, gates=()))
    (only,) = gates_of(run, bare)
    assert only.gate is run.gate
    assert only.rates == found.gated.gate_fired
    assert operating_figure(only, run.sides, 0) is None
    assert ArmGate(None, run.gate).rates == {}


# --- methods ------------------------------------------------------------------------------------------------------


def test_every_method_is_a_series_with_its_matched_arm_open(run):
    sides = run.sides
    figures = method_figures(run, sides)
    assert [figure.id for figure in figures] == ["methods-capability", "methods-over-refusal"]
    by_name = {arm.name: point(arm, sides) for arm in run.arms}
    for figure, measure in zip(figures, ("capability", "unanswered"), strict=True):
        go.Figure(resolved(figure.spec))
        traces = {trace["name"]: trace for trace in figure.spec["data"]}
        assert {"control", "system prompt", "baseline", "first", "dense", "behind a gate"} == set(traces)
        first = traces["first"]
        best = by_name["clamp 312 at 1.5"]
        assert (first["x"][0], first["y"][0]) == (getattr(best, measure).value, best.refusal.value)
        assert [symbol.endswith("-open") for symbol in first["marker"]["symbol"]] == [False, True]
        assert len(traces["dense"]["x"]) == 1


def test_the_methods_table_has_a_row_per_arm_and_claims_are_answered(run):
    table = methods_table(run, run.sides)
    assert table is not None
    assert [(row.cells[0].text, row.cells[1].text) for row in table.rows] == [
        ("first", "own best"),
        ("first", "at equal KL"),
        ("dense", "own best"),
        ("behind a gate", "own best"),
        ("behind a gate", "at equal KL"),
    ]
    assert "0.02 nats" in table.caption
    claims = claims_table(run)
    assert claims is not None
    assert [row.cells[2].text for row in claims.rows] == ["reproduced", "no data"]


# --- budgets and categories ---------------------------------------------------------------------------------------


def test_budget_lines_stand_at_the_baseline_moved_by_what_is_allowed(run):
    found, sides = headline(run, run.sides), run.sides
    before, places = point(found.baseline, sides), budget_places(run, found, sides)
    assert places.capability == pytest.approx(before.capability.value - BUDGETS["capability loss"])
    moved = BUDGETS["over-refusal"] + BUDGETS["broken, safe"]
    assert places.unanswered == pytest.approx(before.unanswered.value + moved)
    for figure, x in zip(frontier_figures(run, found, sides), (places.capability, places.unanswered), strict=True):
        assert [shape["x0"] for shape in figure.spec["layout"]["shapes"]] == [x]
    free = changed(run, tune=None)
    assert all("shapes" not in figure.spec["layout"] for figure in frontier_figures(free, found, sides))


def test_categories_are_the_records_own_rates(run):
    found, sides = headline(run, run.sides), run.sides
    tables = {each.suite: each.table for each in category_tables(found, sides)}
    assert set(tables) == set(run.arms[0].suites) | set(CAPABILITY)
    for suite in ("jailbroken_unseen", "arithmetic"):
        for row in tables[suite].rows:
            for arm, cell in zip(found.arms, row.cells[2:], strict=True):
                mine = [r for r in run.records if (r.arm, r.suite, r.category) == (arm.name, suite, row.cells[0].text)]
                hits = [r.correct if suite == "arithmetic" else r.verdict is Verdict.REFUSED for r in mine]
                assert cell.sort == (pytest.approx(sum(hits) / len(hits)) if len(hits) >= 5 else None)


def test_the_suite_that_varies_most_is_open(run):
    tables = category_tables(headline(run, run.sides), run.sides)
    (shown,) = [each for each in tables if each.open]
    assert shown.spread == max(each.spread for each in tables) > 0
    rates = [[row.cells[i].sort for row in shown.table.rows] for i in (2, 3, 4)]
    known = [[rate for rate in column if rate is not None] for column in rates]
    assert shown.spread == pytest.approx(max(max(column) - min(column) for column in known))


# --- tables that fit --------------------------------------------------------------------------------------------


def test_all_arms_stand_in_tables_that_fit_a_page_and_no_measure_is_lost(run):
    found = headline(run, run.sides)
    tables = arms_tables(run, found, run.sides)
    assert all(len(table.columns) <= 2 + MEASURES_ABREAST for table in tables)
    assert all([row.cells[0].text for row in table.rows] == [arm.name for arm in run.arms] for table in tables)
    titles = [column.title for table in tables for column in table.columns[2:]]
    assert [suite_title(suite) for suite in run.suite_names] == titles[: len(run.suite_names)]
    groups = [title for table in tables for title, _ in table.groups if title]
    assert groups == [
        "harmful, refused",
        "safe, refused",
        "capability, right",
        "by likelihood, right",
        "side effects",
    ]


def test_scores_and_settings_are_said_in_words(run):
    (main, *more) = feature_tables(run.feature_sets[0], ["312"])
    titles = [column.title for table in (main, *more) for column in table.columns]
    assert {"composite", "difference of means, scaled"} <= set(titles)
    assert not [title for title in titles if "_" in title]
    counts = dict(facts({"seed": 0, "n": 1, "found": False, "literal": True}))
    assert list(counts.values()) == ["0", "1", "no", "yes"], "numbers are no truths, though Python says 0 == False"
    shown = dict(facts({"w_diff": 0.5, "literal": "False", "ranked_by": "clamp_refusal_at_kl", "kl": 0.02}))
    assert shown == {
        "weight of the difference": "0.5",
        "formula exactly as published": "no",
        "ranked by": "refusal gained at equal KL",
        "KL at which clamps are compared": "0.02",
    }


def test_the_system_prompt_has_its_own_mark_and_name(run):
    (spec, *_) = (f.spec for f in frontier_figures(run, headline(run, run.sides), run.sides))
    traces = {trace["name"]: trace for trace in spec["data"] if "name" in trace}
    assert len(traces["system prompt"]["x"]) == 1
    assert traces["system prompt"]["marker"]["symbol"] != traces["control"]["marker"]["symbol"]
    assert "<b>system prompt</b>" in [label["text"] for label in spec["layout"]["annotations"]]
    assert "system prompt" in {
        trace["name"] for figure in method_figures(run, run.sides) for trace in figure.spec["data"]
    }


# --- examples -----------------------------------------------------------------------------------------------------


def test_a_rare_flip_is_shown_however_many_others_there_are():
    """Many kinds of bucket in which arms begin to refuse must not hide the one prompt that is no longer refused."""

    def record(arm: str, prompt: str, verdict: Verdict) -> Record:
        return Record(arm, "s", prompt, Split.TEST, None, "reply", 1, verdict, None, "j")

    common = (Verdict.REFUSED, Verdict.DEGENERATE, Verdict.COMPLIED)
    outcomes = [(b, c) for b in common for c in common if (b, c) != (Verdict.COMPLIED, Verdict.COMPLIED)] * 3
    rows = [
        tuple(record(arm, f"p{i}", verdict) for arm, verdict in zip("abc", (Verdict.COMPLIED, *pair), strict=True))
        for i, pair in enumerate(outcomes)
    ]
    rows.append(
        tuple(
            record(arm, "rare", v)
            for arm, v in zip("abc", (Verdict.REFUSED, Verdict.COMPLIED, Verdict.REFUSED), strict=True)
        )
    )
    paired = Paired("s", tuple(rows))
    buckets = examples_of(paired, ["a", "b", "c"], {}).buckets
    assert len(buckets) > BUCKETS_PER_SUITE
    shown = {made for bucket in buckets for made in enumerate(bucket.changes)}
    every = {(i, change_between(row[0], after)) for row in rows for i, after in enumerate(row[1:])}
    assert {made for made in every if made[1] is not Change.SAME} <= shown
    assert (0, Change.STOPS_REFUSING) in shown


# --- the page -----------------------------------------------------------------------------------------------------


def test_the_page_has_every_part_that_the_run_has(run):
    html = build_page(run)
    for part in (
        'id="methods"',
        'id="categories"',
        'id="table-tuning-budgets"',
        'id="gate-operating-0"',
        'id="table-claims"',
    ):
        assert html.count(part) == 1, part


def test_a_run_without_them_has_none_of_these_parts(run_of):
    plain = build_page(run_of(arm_json("baseline", "baseline"), arm_json("clamp", "feature", strength=1.0)))
    for part in (
        "methods",
        "categories",
        "table-budgets",
        "gate-operating",
        "explained",
        "table-claims",
        "table-plans",
    ):
        assert f'id="{part}' not in plain, part


def test_the_explanation_is_linked_when_it_lies_there(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    found = {"schema": 1, "kind": "explanation", "plan": "p <b>", "cost": {"kl": 0.25, "n_tokens": 1200}}
    (copy / "explain.json").write_text(json.dumps(found), encoding="utf-8")
    assert Run.read(copy).explanation is None, "without its page there is nothing to link to"
    (copy / "explain.html").write_text("<p>why</p>", encoding="utf-8")
    html = build_page(Run.read(copy))
    assert 'href="explain.html"' in html
    assert "p &lt;b&gt;" in html
    assert "<strong>0.25 nats</strong> per token of benign text (n = 1,200 tokens)" in html
    (copy / "explain.json").write_text("{", encoding="utf-8")
    assert Run.read(copy).explanation is None


def test_every_file_stands_with_its_hash_and_every_arm_with_its_plan(run_dir, run):
    files = files_table(run)
    assert files is not None
    assert {row.cells[0].text for row in files.rows} >= {"summary.json", "records.jsonl", "plan.toml", "manifest.json"}
    for row in files.rows:
        assert row.cells[2].sort == hashlib.sha256(Path(run_dir / row.cells[0].text).read_bytes()).hexdigest()
    plans = plans_table(run)
    assert plans is not None
    assert len(plans.rows) == len(run.arms)
