"""Methods side by side: the frontier by method, the table of their arms, and the papers' claims.

Every method has its own colour and symbol: filled where it is at its own best, open where it was brought to one benign
KL; a thin line joins the two. Random features at that KL are what any method has to beat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from clampdown.reports.figures import ASKED_SYMBOL, SERIES_SYMBOLS, Figure, frontier_layout, hover
from clampdown.reports.tables import EMPTY, Cell, Column, Row, Table, number_cell, share_cell
from clampdown.reports.wording import KIND_TITLES, SYSTEM_PROMPT, is_asked, number
from clampdown.results.points import Point, Sides, mean, point
from clampdown.results.rows import ArmResult, MethodLine
from clampdown.results.run import Run
from clampdown.types import ArmKind, Interval

Spec = dict[str, Any]
OF_METHOD = {ArmKind.TUNED: "tuned", ArmKind.GATED: "gated"}
ANSWERS = {True: "reproduced", False: "not reproduced", None: "no data"}


def method_figures(run: Run, sides: Sides) -> tuple[Figure, ...]:
    """Refusal against capability and against over-refusal, a series per method; none for runs without methods."""
    points = {arm.name: point(arm, sides) for arm in run.arms}
    if not any(line.best in points for line in run.methods):
        return ()
    axes: tuple[tuple[str, str, str, Callable[[Point], Interval]], ...] = (
        ("methods-capability", "up and to the right is better", "mean capability", lambda p: p.capability),
        ("methods-over-refusal", "up and to the left is better", "safe prompts refused or broken", _unanswered),
    )
    return tuple(
        Figure(key, f"Methods: refusal against {title}", caption, _spec(run, points, title, of))
        for key, caption, title, of in axes
    )


def _unanswered(p: Point) -> Interval:
    return p.unanswered


def _spec(run: Run, points: dict[str, Point], title: str, of: Callable[[Point], Interval]) -> Spec:
    traces = [_kind(run, points, of, ArmKind.CONTROL, asked=asked) for asked in (False, True)]
    for index, line in enumerate(run.methods):
        traces += _method(line, points, of, index)
    traces.append(_kind(run, points, of, ArmKind.BASELINE))
    return {"data": [trace for trace in traces if trace["x"]], "layout": frontier_layout(title)}


def _kind(
    run: Run, points: dict[str, Point], of: Callable[[Point], Interval], kind: ArmKind, *, asked: bool = False
) -> Spec:
    """What methods are compared with; the baseline is open, so that a method that changes nothing is seen inside it."""
    shown = [points[arm.name] for arm in run.arms if arm.kind is kind and is_asked(arm) is asked]
    known = [p for p in shown if of(p).value is not None and p.refusal.value is not None]
    base = kind is ArmKind.BASELINE
    symbol, size = ("diamond-open", 18) if base else (ASKED_SYMBOL, 11) if asked else ("x", 7)
    return {
        "x": [of(p).value for p in known], "y": [p.refusal.value for p in known], "mode": "markers",
        "name": SYSTEM_PROMPT if asked else KIND_TITLES[kind],
        "text": [hover(p) for p in known], "hovertemplate": "%{text}<extra></extra>",
        "marker": {"symbol": symbol, "size": size, "color": f"@{kind.value}",
                   "line": {"width": 2 if base else 1, "color": "@baseline" if base else "@paper"}},
    }  # fmt: skip


def _method(line: MethodLine, points: dict[str, Point], of: Callable[[Point], Interval], index: int) -> list[Spec]:
    pair = [points[name] for name in (line.best, line.matched) if name in points]
    known = [p for p in pair if of(p).value is not None and p.refusal.value is not None]
    if not known:
        return []
    series = index % len(SERIES_SYMBOLS)
    colour = f"@{OF_METHOD.get(known[0].arm.kind, f's{series + 1}')}"
    symbol = "star" if known[0].arm.kind in OF_METHOD else SERIES_SYMBOLS[series]
    best, others = known[:1], known[1:]
    return [{
        "x": [of(p).value for p in known], "y": [p.refusal.value for p in known], "mode": "lines+markers",
        "name": escape(line.method), "text": [hover(p) for p in known], "hovertemplate": "%{text}<extra></extra>",
        "line": {"color": f"{colour}/0.5", "width": 1},
        "marker": {"symbol": [symbol] * len(best) + [f"{symbol}-open"] * len(others), "color": colour,
                   "size": [14 if symbol == "star" else 11] * len(known), "line": {"width": 1.5, "color": colour}},
        "error_y": _whiskers([p.refusal for p in best], len(others), colour),
        "error_x": _whiskers([of(p) for p in best], len(others), colour),
    }]  # fmt: skip


def _whiskers(intervals: Sequence[Interval], without: int, colour: str) -> Spec:
    """The interval of the method's own best; the matched arm's is in the table."""
    high = [(i.high - i.value) if i.high is not None and i.value is not None else 0.0 for i in intervals]
    low = [(i.value - i.low) if i.low is not None and i.value is not None else 0.0 for i in intervals]
    return {"type": "data", "symmetric": False, "array": [*high, *[0.0] * without],
            "arrayminus": [*low, *[0.0] * without], "color": colour, "thickness": 1, "width": 0}  # fmt: skip


def methods_table(run: Run, sides: Sides) -> Table | None:
    """A row per arm of each method; None for runs without methods. Controls stand in the table of all arms."""
    if not run.methods:
        return None
    by_name = {arm.name: arm for arm in run.arms}
    rows: list[Row] = []
    for line in run.methods:
        rows += [
            _row(line.method, how, by_name[name], sides, strong=how == "own best")
            for how, name in (("own best", line.best), ("at equal KL", line.matched))
            if name in by_name
        ]
    at = "one benign KL" if run.matched_kl is None else f"{number(run.matched_kl)} nats per token of benign text"
    caption = (
        "Per cent with 95 % intervals. “Own best” is the strength that validation prompts chose, “at equal KL” the "
        f"same edit at {at}."
    )
    columns = (
        Column("method", kind="text"),
        Column("strength", kind="text"),
        Column("harmful refused", "mean of suites"),
        Column("safe refused", "mean of suites"),
        Column("capability", "generated"),
        Column("capability", "by likelihood"),
        Column("KL benign", "nats per token"),
    )
    return Table("methods", caption, columns, tuple(rows))


def _row(method: str, how: str, arm: ArmResult, sides: Sides, *, strong: bool) -> Row:
    p = point(arm, sides)
    likely = mean(arm.capability_by_likelihood.values()) if arm.capability_by_likelihood else None
    return Row(
        (
            Cell(method, method.casefold(), mark=arm.kind.value),
            Cell(how, how),
            *(share_cell(interval) for interval in (p.refusal, p.over_refusal, p.capability, likely)),
            number_cell(arm.kl_benign),
        ),
        strong,
    )


def claims_table(run: Run) -> Table | None:
    """What the papers claim, and what this run says; None for runs that tested no claims."""
    if not run.claims:
        return None
    columns = (
        Column("paper", kind="text"),
        Column("claim", kind="text"),
        Column("here", kind="text"),
        Column("evidence", kind="prompts"),
    )
    rows = tuple(
        Row((
            Cell(claim.paper, claim.paper),
            Cell(claim.claim, claim.claim),
            Cell(ANSWERS[claim.reproduced], ANSWERS[claim.reproduced]),
            Cell(claim.evidence or EMPTY),
        ))
        for claim in run.claims
    )  # fmt: skip
    return Table("claims", "Paired differences to the unsteered model; * p < 0.05 (Bonferroni over a side's suites).",
                 columns, rows)  # fmt: skip
