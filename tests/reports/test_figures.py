"""Figures are valid Plotly, hold the summary's numbers, and use only colours that the style sheet defines and tells
apart from the paper."""

from __future__ import annotations

import json
import re
from typing import Any

import plotly.graph_objects as go
import pytest

from clampdown.reports.comparison import headline
from clampdown.reports.figures import KIND_SYMBOLS, SERIES_SYMBOLS, frontier_figures, strength_figures
from clampdown.reports.page import TEMPLATES
from clampdown.results.points import point
from clampdown.types import ArmKind
from tests.reports.conftest import SAFETY, arm_json

CSS = (TEMPLATES / "report.css").read_text(encoding="utf-8")
TOKEN = re.compile(r"@([a-z0-9-]+)(/[0-9.]+)?")


def palettes() -> list[dict[str, str]]:
    """The light and the dark palette of the style sheet, name -> #rrggbb."""
    blocks = [block for block in re.findall(r"\{([^{}]*)\}", CSS) if "--paper:" in block]
    return [dict(re.findall(r"--([a-z0-9-]+):\s*(#[0-9a-f]{6})", block)) for block in blocks]


def luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def figures(run) -> list[Any]:
    sides = run.sides
    found = headline(run, sides)
    return [*strength_figures(run, found, sides), *frontier_figures(run, found, sides)]


def resolved(spec: dict[str, Any]) -> dict[str, Any]:
    return json.loads(re.sub(r'"@[a-z0-9-]+(/[0-9.]+)?"', '"#123456"', json.dumps(spec)))


def test_figures_are_valid_plotly(run):
    found = figures(run)
    assert [f.id for f in found] == [
        "curve-refusals",
        "curve-over-refusals",
        "curve-capability",
        "curve-degenerate",
        "frontier-capability",
        "frontier-over-refusal",
    ]
    for figure in found:
        go.Figure(resolved(figure.spec))  # raises on any unknown property or value


def test_curves_hold_the_summary_numbers(run):
    (spec,) = (f.spec for f in figures(run) if f.id == "curve-refusals")
    line = next(t for t in spec["data"] if t.get("name") == "jailbreaks, unseen families")
    clamps = [a for a in run.arms if a.feature == "312" and a.kind is ArmKind.FEATURE]
    assert line["y"] == [run.arms[0].rate("jailbroken_unseen").value] + [
        a.rate("jailbroken_unseen").value for a in clamps
    ]
    assert line["x"][1:] == [a.strength for a in clamps]
    band = spec["data"][spec["data"].index(line) - 1]
    assert band["y"][: len(clamps)] == [a.rate("jailbroken_unseen").high for a in clamps]
    assert all("n = 40" in text for text in line["customdata"])


def test_every_arm_is_on_the_frontier(run):
    sides = run.sides
    (spec,) = (f.spec for f in figures(run) if f.id == "frontier-capability")
    drawn = {xy for t in spec["data"] if t["mode"] == "markers" for xy in zip(t["x"], t["y"], strict=True)}
    points = [point(arm, sides) for arm in run.arms]
    assert drawn == {(p.capability.value, p.refusal.value) for p in points}
    assert sum(len(t["x"]) for t in spec["data"] if t["mode"] == "markers") == len(run.arms)


def test_kinds_and_series_differ_by_symbol_too():
    assert set(KIND_SYMBOLS) == set(ArmKind)
    assert len(set(KIND_SYMBOLS.values())) == len(KIND_SYMBOLS)
    assert len(set(SERIES_SYMBOLS)) == len(SERIES_SYMBOLS)


def test_names_from_files_are_escaped_in_labels(run_of):
    evil = "<a href='https://example.org'>x</a>"
    arms = [arm_json("baseline", "baseline"), arm_json(evil, "feature", {"harmful": 0.9}, strength=1.0)]
    arms.append(arm_json("second", "feature", strength=2.0))
    run = run_of(*arms, strength_unit="<b>u")
    assert "<a href" not in json.dumps([f.spec for f in figures(run)])
    assert "<b>u" not in json.dumps([f.spec for f in figures(run)])


def test_colours_exist_in_both_palettes(run):
    light, dark = palettes()
    assert light.keys() == dark.keys()
    used = {name for f in figures(run) for name, _ in TOKEN.findall(json.dumps(f.spec))}
    used |= {f"s{i + 1}" for i in range(len(SERIES_SYMBOLS))} | {kind.value for kind in ArmKind}
    assert used <= light.keys()


@pytest.mark.parametrize("palette", palettes(), ids=["light", "dark"])
def test_colours_stand_out_from_the_paper(palette):
    """WCAG 2: 4.5 to 1 for what is also text, 3 to 1 for marks."""
    texts = {"ink", "ink-soft", "baseline", "feature", "gated", "tuned"}
    marks = {"direction", "control", *(f"s{i}" for i in range(1, 8))}
    low = {n: contrast(palette[n], palette["paper"]) for n in texts if contrast(palette[n], palette["paper"]) < 4.5}
    low |= {n: contrast(palette[n], palette["paper"]) for n in marks if contrast(palette[n], palette["paper"]) < 3}
    assert not low
    assert contrast(palette["ink-soft"], palette["panel"]) >= 4.5


def test_a_gap_stays_a_gap(run_of):
    arms = [arm_json("baseline", "baseline")]
    arms += [arm_json(f"c{s}", "feature", strength=s, features=[1]) for s in (1.0, 2.0, 3.0)]
    arms[2]["suites"]["harmful"]["refused"] = {"value": None, "low": None, "high": None, "n": 0}
    found = figures(run_of(*arms))
    line = next(t for t in found[0].spec["data"] if t.get("name") == "harmful")
    assert line["y"][2] is None
    assert not line.get("connectgaps")


def test_labels_of_arms_that_lie_together_are_stacked(run_of):
    arms = [arm_json("b", "baseline"), arm_json("c", "feature"), arm_json("g", "gated")]
    (spec, *_) = (f.spec for f in figures(run_of(*arms)) if f.id == "frontier-capability")
    shifts = [label["yshift"] for label in spec["layout"]["annotations"]]
    assert len(set(shifts)) == 3


def test_the_frontier_has_room_for_the_names_of_arms_that_refuse_everything(run_of):
    """A stack of names above 100 % would be cut at the figure's edge."""
    names = ["baseline", "clamp", "gated"]

    def top(refused):
        arms = [arm_json(name, name.replace("clamp", "feature"), dict.fromkeys(SAFETY, refused)) for name in names]
        (spec, *_) = (f.spec for f in figures(run_of(*arms)) if f.id == "frontier-capability")
        highest = max(label["y"] + label["yshift"] / 230 for label in spec["layout"]["annotations"])
        assert highest < spec["layout"]["yaxis"]["range"][1]
        return spec["layout"]["yaxis"]["range"][1]

    assert top(1.0) > top(0.2) == 1.1
