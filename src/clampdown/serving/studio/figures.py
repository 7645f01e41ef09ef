"""The page's two pictures, as HTML that is laid out in shares: the frontier of a run, and a gate's scores.

Points are buttons, so they can be reached with the keyboard and touched; marks differ in shape as well as in colour;
and each picture has a table beside it that says the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from clampdown.reports.wording import KIND_TITLES, full
from clampdown.results.points import Point
from clampdown.serving.studio.frontier import PastRun
from clampdown.serving.studio.gates import GateScores, Promise, Rate
from clampdown.serving.studio.markup import text

BINS = 36


def frontier(past: PastRun, chosen: str = "") -> str:
    """Refusal of harmful prompts against capability, the way round of the report; points with a plan are buttons."""
    points = past.run.points
    drawn = [point for point in points if _drawn(point)]
    if not drawn:
        return f'<p class="empty">No arm of this run has both rates.</p>{_points_table(past, chosen)}'
    marks = "".join(_mark(past, point, point.arm.name == chosen) for point in _front_last(drawn))
    return (
        '<figure class="frontier"><div class="plane" role="group" aria-label="refusal of harmful prompts against '
        f'capability">{_grid()}{_front_line(drawn)}{marks}</div>'
        "<figcaption><span>→ right, of capability items</span><span>↑ refused, of harmful prompts</span>"
        f"{_key(drawn)}</figcaption></figure>{_points_table(past, chosen)}"
    )


def _drawn(point: Point) -> bool:
    return point.refusal.value is not None and point.capability.value is not None


def _front_last(points: Sequence[Point]) -> list[Point]:
    """Points of the front lie on top of others."""
    return sorted(points, key=lambda point: point.arm.frontier.pareto)


def _grid() -> str:
    lines = []
    for percent in (0, 25, 50, 75, 100):
        lines.append(f'<i class="v" style="left:{percent}%"><b>{percent}</b></i>')
        lines.append(f'<i class="h" style="bottom:{percent}%"><b>{percent}</b></i>')
    return f'<div class="grid" aria-hidden="true">{"".join(lines)}</div>'


def _front_line(points: Sequence[Point]) -> str:
    front = sorted((p.capability.value or 0.0, p.refusal.value or 0.0) for p in points if p.arm.frontier.pareto)
    path = " ".join(f"{100 * x:.2f},{100 - 100 * y:.2f}" for x, y in front)
    return (
        '<svg class="frontline" viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
        f'<polyline points="{path}" vector-effect="non-scaling-stroke"/></svg>'
    )


def _mark(past: PastRun, point: Point, chosen: bool) -> str:
    arm, loadable = point.arm, past.loadable(point.arm)
    name = text(_said(point, loadable))
    state = f"{' front' if arm.frontier.pareto else ''}{' chosen' if chosen else ''}"
    place = f"left:{100 * (point.capability.value or 0):.2f}%;bottom:{100 * (point.refusal.value or 0):.2f}%"
    common = f'class="point {arm.kind.value}{state}" style="{place}" title="{name}" aria-label="{name}"'
    if not loadable:
        return f'<span {common} role="img"></span>'
    return f'<button type="button" {common} data-arm="{text(arm.name)}" aria-pressed="{str(chosen).lower()}"></button>'


def _said(point: Point, loadable: bool) -> str:
    load = "" if loadable else " (no plan to load)"
    return f"{point.arm.name}: refuses {full(point.refusal)}, right {full(point.capability)}{load}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _key(points: Sequence[Point]) -> str:
    kinds = dict.fromkeys(point.arm.kind for point in points)
    marks = (f'<span class="entry"><span class="point {k.value}"></span>{text(KIND_TITLES[k])}</span>' for k in kinds)
    return f'<span class="key">{"".join(marks)}</span>'


def _points_table(past: PastRun, chosen: str) -> str:
    rows = "".join(_points_row(past, point, point.arm.name == chosen) for point in past.run.points)
    heads = ("arm", "harmful refused", "right", "safe refused", "broken")
    head = "".join(f'<th scope="col">{each}</th>' for each in heads)
    return (
        f'<div class="scroll"><table class="points"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _points_row(past: PastRun, point: Point, chosen: bool) -> str:
    name = text(point.arm.name)
    if past.loadable(point.arm):
        name = f'<button type="button" data-arm="{name}">{name}</button>'
    rates = (point.refusal, point.capability, point.over_refusal, point.degenerate)
    cells = "".join(f'<td title="{text(full(rate))}">{_percent(rate.value)}</td>' for rate in rates)
    return f'<tr class="{"chosen" if chosen else ""}"><th scope="row">{name}</th>{cells}</tr>'


def gate_scores(scores: GateScores, threshold: float) -> str:
    """Histograms of benign calibration prompts and of harmful validation prompts, with the threshold between."""
    low, high = scores.span
    harmful = [score for suite in scores.suites if suite.harmful for score in suite.scores]
    at = _share(threshold, low, high)
    rows = _bars("benign", "benign, calibration", scores.benign, (low, high))
    rows += _bars("harmful", "harmful, validation", harmful, (low, high))
    return (
        f'<figure class="gate" style="--at:{100 * at:.2f}%">{rows}<i class="threshold" aria-hidden="true"></i>'
        f"<figcaption><span>{low:.2f}</span><span>score; fires right of {threshold:.3f}</span><span>{high:.2f}</span>"
        "</figcaption></figure>"
    )


def _share(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5


def counts(values: Sequence[float], low: float, high: float, bins: int = BINS) -> list[int]:
    """How many values lie in each of `bins` equal bins from `low` to `high`."""
    found = [0] * bins
    for value in values:
        found[min(bins - 1, int(_share(value, low, high) * bins))] += 1
    return found


def _bars(kind: str, label: str, values: Sequence[float], span: tuple[float, float]) -> str:
    found = counts(values, *span)
    most = max(found) or 1
    bars = "".join(f'<i style="height:{100 * n / most:.1f}%"></i>' for n in found)
    return f'<div class="bars {kind}"><span>{label}, n = {len(values)}</span>{bars}</div>'


def gate_words(found: Promise, *, own: bool) -> str:
    """The guarantee in words, for the plan's own threshold or a moved one, and the trigger rates."""
    share = f"{found.triggered} of {found.n} benign calibration prompts trigger it"
    sure = f"{found.confidence:.0%} confidence"
    words = (
        f"{share}. At {sure} at most <strong>{found.bound:.2%}</strong> of such prompts do."
        if own
        else f"{share}. At {sure} at most <strong>{found.bound_any:.2%}</strong> of such prompts do, whichever "
        f"threshold you choose here. Fixed before these prompts were read, it would have {found.bound:.2%}."
    )
    return f'<p class="promise" role="status">{words}</p>{_rates_table(found.rates)}'


def _rates_table(rates: Sequence[Rate]) -> str:
    ordered = sorted(rates, key=lambda rate: not rate.harmful)
    rows = "".join(_rates_row(rate) for rate in ordered)
    head = '<th scope="col">validation prompts</th><th scope="col">fires</th><th scope="col">95 %</th><th></th>'
    return f'<div class="scroll"><table class="rates"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _rates_row(rate: Rate) -> str:
    fires = rate.fires
    side = "harmful" if rate.harmful else "benign"
    interval = "–" if fires.low is None or fires.high is None else f"{fires.low:.0%}–{fires.high:.0%}"
    name = text(rate.suite.replace("_", " "))
    bar = f'<span class="bar {side}" style="--share:{fires.value or 0:.3f}"></span>'
    return f'<tr><th scope="row">{name}</th><td>{_percent(fires.value)}</td><td>{interval}</td><td>{bar}</td></tr>'
