"""The report's figures as Plotly specifications: plain data, drawn by the page's own script.

Colours are names of the style sheet's variables (`@s1`, `@gated`, `@gated/0.18` with opacity), looked up when the
figure is drawn, so that one palette serves light, dark and print. Every series has a marker symbol and a dash
of its own as well: nothing is told by colour alone. Text that came from files is HTML-escaped, because Plotly
reads markup in labels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from clampdown.reports.breakdowns import budget_places
from clampdown.reports.comparison import Headline, headline, strength_curve
from clampdown.reports.shipping import Fitness, Step, bands, steps_of
from clampdown.reports.wording import full, is_asked, number, suite_title, what_it_is
from clampdown.results.points import Point, Sides, mean, pareto, point
from clampdown.results.rows import ArmResult
from clampdown.results.run import Run
from clampdown.types import ArmKind, Interval, Verdict

Spec = dict[str, Any]
Measure = Callable[[ArmResult], Interval | None]

SERIES_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "hexagon")
SERIES_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid")
KIND_SYMBOLS = {
    ArmKind.BASELINE: "diamond",
    ArmKind.FEATURE: "circle",
    ArmKind.DIRECTION: "square",
    ArmKind.CONTROL: "x",
    ArmKind.GATED: "star",
    ArmKind.TUNED: "star-diamond",
}
ASKED_SYMBOL = "cross"
CHARACTER = 0.022  # of an axis, in half a page
LINE, PLOT_HEIGHT = 15, 230  # pixels: of a name, and of an axis from 0 to 1 in a figure of a page
KIND_SIZES = {ArmKind.BASELINE: 12, ArmKind.GATED: 15, ArmKind.TUNED: 15}


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure with what a reader needs without seeing it. `id` is the element that it is drawn into."""

    id: str
    title: str
    caption: str
    spec: Spec


def strength_figures(run: Run, found: Headline, sides: Sides) -> tuple[Figure, ...]:
    """Refusals that are wanted, refusals that are not, capability and broken replies, against strength."""
    curve = strength_curve(run, found.clamp)
    if len(curve) < 2 or found.clamp is None:
        return ()
    axis = _StrengthAxis.of(curve, found, run.strength_unit)
    steps = steps_of(curve, found.baseline, sides)
    wanted, unwanted, capability, broken = (
        {suite_title(suite): _rate(suite) for suite in sides.harmful},
        {suite_title(suite): _rate(suite) for suite in sides.answerable},
        {suite_title(suite): _capability(suite) for suite in sides.capability},
        _broken_by_side(sides),
    )
    panels = (
        ("curve-refusals", "Refusals that are wanted", "harmful prompts refused; higher is better", wanted),
        ("curve-over-refusals", "Refusals that are not", "safe prompts refused; lower is better", unwanted),
        ("curve-capability", "Capability", "answers that are right; higher is better", capability),
        ("curve-degenerate", "Broken replies", "empty, looping or gibberish; lower is better", broken),
    )
    return tuple(
        Figure(key, title, caption, _curve_spec(axis, series, steps))
        for key, title, caption, series in panels
        if series
    )


def frontier_figures(run: Run, found: Headline, sides: Sides) -> tuple[Figure, ...]:
    """Every arm by what it refuses rightly, against capability and against refusing wrongly."""
    points = [point(arm, sides) for arm in run.arms]
    curve = strength_curve(run, found.clamp)
    allowed = budget_places(run, found, sides)
    right = _FrontierAxis("mean capability", lambda p: p.capability, +1, allowed.capability)
    capability = _frontier_spec(points, curve, found, right)
    unanswered = _FrontierAxis("safe prompts refused or broken", lambda p: p.unanswered, -1, allowed.unanswered)
    over = _frontier_spec(points, curve, found, unanswered)
    both = (
        ("frontier-capability", "Refusal against capability", "up and to the right is better", capability),
        ("frontier-over-refusal", "Refusal against over-refusal", "up and to the left is better", over),
    )
    return tuple(Figure(key, title, caption, spec) for key, title, caption, spec in both if spec["data"])


def _rate(suite: str) -> Measure:
    return lambda arm: arm.rate(suite)


def _capability(suite: str) -> Measure:
    return lambda arm: arm.capability.get(suite)


def _broken_by_side(sides: Sides) -> dict[str, Measure]:
    """Broken replies on each side that was asked."""

    def broken(suites: Sequence[str]) -> Measure:
        return lambda arm: mean(arm.rate(s, Verdict.DEGENERATE) or arm.degenerate_capability.get(s) for s in suites)

    found = {"on harmful prompts": sides.harmful, "on safe prompts": sides.answerable,
             "on capability prompts": sides.capability}  # fmt: skip
    return {title: broken(suites) for title, suites in found.items() if suites}


@dataclass(frozen=True, slots=True)
class _StrengthAxis:
    """The arms of a curve and their places on the x axis; the unsteered baseline stands left of them as "off"."""

    arms: tuple[ArmResult, ...]
    x: tuple[float, ...]
    labels: tuple[str, ...]
    has_baseline: bool
    chosen: float | None
    title: str

    @classmethod
    def of(cls, curve: Sequence[ArmResult], found: Headline, unit: str | None) -> _StrengthAxis:
        x = [arm.strength or 0.0 for arm in curve]
        labels = [number(value) for value in x]
        arms = list(curve)
        if found.baseline is not None:
            step = (x[-1] - x[0]) / (len(x) - 1)
            arms, x, labels = [found.baseline, *arms], [x[0] - step, *x], ["off", *labels]
        title = f"strength ({escape(unit)})" if unit else "strength"
        chosen = found.clamp.strength if found.clamp is not None else None
        return cls(tuple(arms), tuple(x), tuple(labels), found.baseline is not None, chosen, title)


def _curve_spec(axis: _StrengthAxis, series: Mapping[str, Measure], steps: Sequence[Step]) -> Spec:
    traces: list[Spec] = []
    for index, (name, measure) in enumerate(series.items()):
        traces += _series(axis, escape(name), [measure(arm) for arm in axis.arms], index % len(SERIES_SYMBOLS))
    ships = [_band(*each) for each in bands(steps, Fitness.SHIPS)]
    layout = {"xaxis": _strength_ticks(axis), "yaxis": _percent_axis(), "shapes": ships, "annotations": []}
    layout["annotations"] = [_band_word((shape["x0"] + shape["x1"]) / 2) for shape in ships]
    if axis.chosen is not None:
        layout["shapes"] = [*ships, _vertical(axis.chosen)]
        layout["annotations"] += [{"x": axis.chosen, "y": 1, "yref": "paper", "yanchor": "bottom", "text": "chosen",
                                  "showarrow": False, "font": {"size": 11, "color": "@ink-soft"}}]  # fmt: skip
    return {"data": traces, "layout": layout}


def _band(low: float, high: float) -> Spec:
    return {"type": "rect", "x0": low, "x1": high, "y0": 0, "y1": 1, "yref": "paper", "layer": "below",
            "fillcolor": "@gated/0.12", "line": {"width": 0}}  # fmt: skip


def _band_word(x: float) -> Spec:
    return {"x": x, "y": 0, "yref": "paper", "yanchor": "bottom", "text": "may ship", "showarrow": False,
            "font": {"size": 11, "color": "@gated"}}  # fmt: skip


def _series(axis: _StrengthAxis, name: str, values: Sequence[Interval | None], index: int) -> list[Spec]:
    """A line with its 95 % band. Gaps stay gaps: a strength without data is not interpolated."""
    y = [None if v is None else v.value for v in values]
    colour = f"@s{index + 1}"
    steered = 1 if axis.has_baseline else 0
    bounds = [
        (x, v.low, v.high)
        for x, v in zip(axis.x[steered:], values[steered:], strict=True)
        if v is not None and v.low is not None and v.high is not None
    ]
    band = {
        "x": [b[0] for b in bounds] + [b[0] for b in reversed(bounds)],
        "y": [b[2] for b in bounds] + [b[1] for b in reversed(bounds)],
        "fill": "toself", "fillcolor": f"{colour}/0.13", "line": {"width": 0}, "mode": "lines",
        "hoverinfo": "skip", "showlegend": False, "legendgroup": name,
    }  # fmt: skip
    symbol = SERIES_SYMBOLS[index]
    line = {
        "x": list(axis.x), "y": y, "name": name, "legendgroup": name, "mode": "lines+markers",
        "line": {"color": colour, "width": 2, "dash": SERIES_DASHES[index]},
        "marker": {"color": colour, "size": 7, "line": {"width": 1, "color": "@paper"},
                   "symbol": [f"{symbol}-open" if i < steered else symbol for i in range(len(y))]},
        "customdata": ["" if v is None else full(v) for v in values],
        "text": list(axis.labels),
        "hovertemplate": f"<b>{name}</b><br>strength %{{text}}: %{{customdata}}<extra></extra>",
    }  # fmt: skip
    return [band, line] if bounds else [line]


def _strength_ticks(axis: _StrengthAxis) -> Spec:
    every = max(1, len(axis.x) // 10)
    shown = sorted({0, *range(1 if axis.has_baseline else 0, len(axis.x), every)})
    return {
        "title": {"text": axis.title},
        "tickvals": [axis.x[i] for i in shown],
        "ticktext": [axis.labels[i] for i in shown],
    }


def _percent_axis(title: str = "") -> Spec:
    return {"range": [-0.03, 1.03], "tickformat": ".0%", "dtick": 0.25, "title": {"text": title}}


def _vertical(x: float, colour: str = "@ink-soft", dash: str = "dot") -> Spec:
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "layer": "below",
            "line": {"color": colour, "width": 1, "dash": dash}}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _FrontierAxis:
    """What the frontier's x axis shows, whether more of it is better (+1) or worse (-1), and the budget on it."""

    title: str
    of: Callable[[Point], Interval]
    sign: int
    budget: float | None = None


def _frontier_spec(points: Sequence[Point], curve: Sequence[ArmResult], found: Headline, axis: _FrontierAxis) -> Spec:
    """Arms as markers by kind, the chosen curve as a thin line, and the staircase that no arm beats."""
    known = [p for p in points if axis.of(p).value is not None and p.refusal.value is not None]
    traces = [_staircase(known, axis)] if len(known) > 1 else []
    traces += _curve_line(known, curve, axis)
    for kind in ArmKind:
        for asked in (False, True):
            mine = [p for p in known if p.arm.kind is kind and is_asked(p.arm) is asked]
            if mine:
                traces.append(_kind_trace(kind, mine, found, axis))
    layout = frontier_layout(axis.title)
    layout["annotations"] = _labels([p for p in known if p.arm in found.arms or is_asked(p.arm)], axis)
    layout["yaxis"]["range"][1] = max(layout["yaxis"]["range"][1], *map(_top, layout["annotations"]), 0)
    if axis.budget is not None:
        layout["shapes"] = [_vertical(axis.budget, "@gated", "dash")]
        layout["annotations"] += [_budget_word(axis.budget, axis.sign)]
    return {"data": traces, "layout": layout}


def frontier_layout(title: str) -> Spec:
    """Both axes of a frontier."""
    return {
        "xaxis": _percent_axis(title),
        "yaxis": _percent_axis("harmful prompts refused") | {"range": [-0.03, 1.1]},
        "hovermode": "closest",
    }


def _budget_word(x: float, sign: int) -> Spec:
    """Beside its line, on the side that the budget forbids: the allowed side is where the arms are."""
    return {"x": x, "y": 0, "yref": "paper", "yanchor": "bottom", "xanchor": "right" if sign > 0 else "left",
            "text": "budget", "showarrow": False, "font": {"size": 11, "color": "@gated"}}  # fmt: skip


def _kind_trace(kind: ArmKind, points: Sequence[Point], found: Headline, axis: _FrontierAxis) -> Spec:
    size = KIND_SIZES.get(kind, 9)
    leading = [p.arm in found.arms for p in points]
    return {
        "x": [axis.of(p).value for p in points], "y": [p.refusal.value for p in points],
        "mode": "markers", "name": what_it_is(points[0].arm),
        "marker": {"symbol": ASKED_SYMBOL if is_asked(points[0].arm) else KIND_SYMBOLS[kind], "color": f"@{kind.value}",
                   "size": [size + 3 * lead for lead in leading],
                   "opacity": [1.0 if lead else 0.75 for lead in leading], "line": {"width": 1, "color": "@paper"}},
        "error_x": _error([axis.of(p) if lead else None for p, lead in zip(points, leading, strict=True)], kind),
        "error_y": _error([p.refusal if lead else None for p, lead in zip(points, leading, strict=True)], kind),
        "text": [hover(p) for p in points],
        "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip


def _error(intervals: Sequence[Interval | None], kind: ArmKind) -> Spec:
    """Whiskers for the headline arms only: on every arm they would hide the points."""

    def arm(i: Interval | None, high: bool) -> float:
        edge = None if i is None else i.high if high else i.low
        return 0.0 if i is None or i.value is None or edge is None else abs(edge - i.value)

    return {"type": "data", "symmetric": False, "array": [arm(i, True) for i in intervals],
            "arrayminus": [arm(i, False) for i in intervals], "color": f"@{kind.value}",
            "thickness": 1.2, "width": 0}  # fmt: skip


def hover(p: Point) -> str:
    """What a marker says: its arm, and every number with its interval."""
    lines = [f"<b>{escape(p.arm.name)}</b> ({what_it_is(p.arm)})", f"harmful refused {full(p.refusal)}"]
    if p.over_refusal.value is not None:
        lines.append(f"safe prompts refused {full(p.over_refusal)}")
    lines.append(f"mean capability {full(p.capability)}")
    if p.degenerate.value:
        lines.append(f"broken replies {full(p.degenerate)}")
    if p.arm.kl_benign is not None:
        lines.append(f"KL on benign {number(p.arm.kl_benign)} nats per token")
    return "<br>".join(lines)


def _curve_line(points: Sequence[Point], curve: Sequence[ArmResult], axis: _FrontierAxis) -> list[Spec]:
    """The chosen feature's strengths joined in order, so that the path from off to too far is seen."""
    by_name = {p.arm.name: p for p in points}
    path = [by_name[arm.name] for arm in curve if arm.name in by_name]
    if len(path) < 2:
        return []
    return [{
        "x": [axis.of(p).value for p in path], "y": [p.refusal.value for p in path], "mode": "lines",
        "line": {"color": "@feature/0.45", "width": 1}, "hoverinfo": "skip", "showlegend": False,
    }]  # fmt: skip


def _staircase(points: Sequence[Point], axis: _FrontierAxis) -> Spec:
    coordinates = [(axis.sign * (axis.of(p).value or 0.0), p.refusal.value or 0.0) for p in points]
    best = pareto(coordinates)
    return {
        "x": [axis.sign * coordinates[i][0] for i in best], "y": [coordinates[i][1] for i in best],
        "mode": "lines", "name": "not beaten by any arm", "hoverinfo": "skip",
        "line": {"color": "@ink-soft", "width": 1.2, "dash": "dot", "shape": "vh"},
    }  # fmt: skip


def _labels(points: Sequence[Point], axis: _FrontierAxis) -> list[Spec]:
    """The named arms; names that would lie over one another are stacked."""
    placed: list[tuple[float, float, float, int]] = []
    labels = []
    for p in points:
        x, y = axis.of(p).value or 0.0, p.refusal.value or 0.0
        left, right = _extent(x, p.arm.name)
        near = {level for a, b, height, level in placed if a < right and left < b and abs(height - y) < 0.1}
        level = next(i for i in range(len(points)) if i not in near)
        placed.append((left, right, y, level))
        labels.append(_label(p, (x, y), level))
    return labels


def _top(label: Spec) -> float:
    """How far up a name reaches on the axis."""
    return float(label["y"] + (label["yshift"] + LINE) / PLOT_HEIGHT)


def _extent(x: float, name: str) -> tuple[float, float]:
    """From where to where a name reaches, in shares of the axis."""
    width = CHARACTER * len(name)
    left = x - width if x > 0.8 else x if x < 0.2 else x - width / 2
    return left, left + width


def _label(p: Point, at: tuple[float, float], level: int) -> Spec:
    """An arm's name above its point, or below when the point is in the lower crowd; `level` lines further off."""
    x, y = at
    above = y > 0.8
    return {
        "x": x, "y": y, "text": f"<b>{escape(p.arm.name)}</b>", "showarrow": False,
        "xanchor": "right" if x > 0.8 else "left" if x < 0.2 else "center",
        "yanchor": "bottom" if above else "top", "yshift": 7 + LINE * level if above else -9 - LINE * level,
        "font": {"size": 12, "color": f"@{p.arm.kind.value}"},
    }  # fmt: skip


def notebook_frontier(run: Run) -> Spec | None:
    """The frontier as a Plotly figure in the light palette, for notebooks; None when no arm has both rates."""
    sides = run.sides
    shown = [f for f in frontier_figures(run, headline(run, sides), sides) if f.id == "frontier-capability"]
    return resolved(shown[0].spec, palette()) if shown else None


@cache
def palette() -> Mapping[str, str]:
    """The style sheet's light palette, name -> colour."""
    style = (Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    return dict(re.findall(r"--([a-z0-9-]+):\s*(#[0-9a-f]{6})", style[: style.index("@media")]))


def resolved(value: Any, colours: Mapping[str, str]) -> Any:
    """A specification with its `@name` and `@name/opacity` as colours."""
    if isinstance(value, str) and value.startswith("@"):
        name, _, opacity = value[1:].partition("/")
        red, green, blue = (int(colours[name][i : i + 2], 16) for i in (1, 3, 5))
        return f"rgba({red},{green},{blue},{opacity or 1})"
    if isinstance(value, dict):
        return {key: resolved(item, colours) for key, item in value.items()}
    return [resolved(item, colours) for item in value] if isinstance(value, list | tuple) else value
