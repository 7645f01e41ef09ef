"""The terminal's table fits its width and shows the trade-off first."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from clampdown.reports.terminal import features_table, run_summary, trade_off_table
from tests.reports.conftest import arm_json


def printed(renderable, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(renderable)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [32, 40, 60, 72, 80, 100, 120, 160])
def test_it_fits(run, width):
    lines = printed(run_summary(run, width), width)
    assert max(map(len, lines)) <= width
    rows = [line for line in lines if line.startswith("▸")]
    assert [line.split()[1] for line in rows] == ["baseline", "clamp", "gated"]
    assert all(len(line.rstrip()) == len(rows[0].rstrip()) for line in rows), "no row wraps"


def test_narrow_terminals_keep_the_key_columns(run):
    wide = "\n".join(printed(trade_off_table(run, 80), 80))
    narrow = "\n".join(printed(trade_off_table(run, 60), 60))
    assert all(word in wide for word in ("unseen", "safe,", "capa-", "arith-", "broken"))
    assert all(word in narrow for word in ("unseen", "safe,", "capa-"))
    assert "broken" not in narrow


def test_wide_terminals_show_the_spread(run):
    assert "±" in "\n".join(printed(trade_off_table(run, 120), 120))


def test_many_controls_do_not_push_the_plan_off_the_table(run_of):
    controls = [arm_json(f"random {i}", "control") for i in range(40)]
    run = run_of(
        arm_json("baseline", "baseline"), arm_json("c", "feature"), *controls, arm_json("g", "gated", {"harmful": 0.9})
    )
    lines = printed(trade_off_table(run, 80), 80)
    assert len([line for line in lines if line.startswith("▸")]) == 3
    assert "more arms in the report" in "\n".join(lines)
    assert len(lines) < 22


@pytest.mark.parametrize("width", [40, 60, 80])
def test_long_names_that_begin_alike_stay_apart(run_of, width):
    names = ["clamp 352 x2, prompt only", "clamp 352 x2, prompt only, gated", "clamp 352 x1, every token"]
    arms = [arm_json(name, "feature") for name in names]
    lines = printed(trade_off_table(run_of(arm_json("baseline", "baseline"), *arms), width), width)
    shown = [line[2:22].rstrip() for line in lines if line[2:].startswith("clamp")]
    assert len(set(shown)) == 3
    assert [name.rpartition("…")[2] in full for name, full in zip(shown, names, strict=True)]
    assert shown[1].endswith("gated")


def test_names_are_not_markup(run_of):
    run = run_of(arm_json("[bold]x[/bold]", "baseline"))
    assert "[bold]x[/bold]" in "\n".join(printed(trade_off_table(run, 80), 80))


def test_unknown_numbers_are_said_to_be_unknown(run_of):
    arm = arm_json("clamp", "feature")
    arm["suites"]["jailbroken_unseen"] = {}
    assert "n/a" in "\n".join(printed(trade_off_table(run_of(arm_json("b", "baseline"), arm), 80), 80))


@pytest.mark.parametrize("width", [32, 40, 60, 80, 120])
def test_features_fit_and_the_ranking_score_comes_first(run, width):
    lines = printed(features_table(run.feature_sets[0], width), width)
    assert max(map(len, lines)) <= width
    assert "contrast, ranked by composite" in " ".join(" ".join(lines[:3]).split())
    first = next(line for line in lines if line.split()[:1] == ["312"])
    assert float(first.split()[1]) == pytest.approx(run.feature_sets[0].features[0].scores["composite"], rel=0.01)
    assert "12 more features" in " ".join(lines[-2:])
