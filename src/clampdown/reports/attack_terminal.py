"""What attacks showed for a terminal: one table, then the sentences that are about the gate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from clampdown.reports.attack_page import WAYS, interval
from clampdown.types import Interval


def attack_table(found: Mapping[str, Any]) -> Table:
    """Attack success by arm and way in, with intervals."""
    ways = [(key, title) for key, title, _ in WAYS if any(interval(a[key]) for a in found["arms"].values())]
    budget = found["budget"]
    shown = Table(
        title=f"attack success, {found['objectives']['n']} objectives, {budget['queries']} queries, "
        f"{budget['steps']} gradient steps, scored by {found['judge']}",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in ("arm", *(title for _, title in ways), "gate fired", "gate missed", "edit failed"):
        shown.add_column(column, justify="left" if column == "arm" else "right")
    for name, arm in found["arms"].items():
        gate = arm["gate"]
        fired = "-" if not gate or gate["fired"] is None else f"{gate['fired']:.2f}"
        lost = (str(gate["missed"]), str(gate["fired_and_failed"])) if gate else ("-", "-")
        shown.add_row(name, *(_cell(key, interval(arm[key])) for key, _ in ways), fired, *lost)
    return shown


def _cell(key: str, found: Interval | None) -> str:
    """The first column with its bounds below; the others' are on the page."""
    if found is None:
        return "-"
    known = key == WAYS[0][0] and found.low is not None and found.high is not None
    return f"{found:.2f}\n{found.low:.2f}–{found.high:.2f}" if known else f"{found:.2f}"
