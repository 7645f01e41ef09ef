"""Where in the model harmful and harmless prompts come apart, layer by layer: a scan as one HTML page.

Each row is a layer's (or an SAE feature's) projection of held-out prompts, in standard deviations from the mean of the
harmless ones: a mark per prompt, harmful above the line and harmless below it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clampdown.errors import StoreError
from clampdown.reports.page import asset, environment
from clampdown.reports.wording import number

WIDTH, HEIGHT, MARK = 520.0, 46.0, 17.0
WIDEST = 12.0
"""Standard deviations that are drawn; what lies further out is drawn at the edge."""


@dataclass(frozen=True, slots=True)
class Strip:
    """One row: its name, how well it separates, and where its marks stand, in the picture's units."""

    site: str
    what: str
    auroc: str
    d_prime: str
    best: bool
    harmful: tuple[float, ...]
    harmless: tuple[float, ...]


def build_scan_page(scan: Mapping[str, Any]) -> str:
    """The page of a `scan.json`. Raises `StoreError` for one without projections, as earlier versions wrote."""
    rows = scan.get("rows", [])
    if not rows or not all(row.get("harmful") and row.get("harmless") for row in rows):
        raise StoreError("this scan holds no projections to draw", hint="clampdown discover --scan makes it again")
    low, high = _ends(rows)
    strips = [_strip(row, low, high, best=row["auroc"] == max(each["auroc"] for each in rows)) for row in rows]
    return (
        environment()
        .get_template("scan.html.j2")
        .render(
            strips=strips,
            model=scan.get("model", ""),
            n=(len(rows[0]["harmful"]), len(rows[0]["harmless"])),
            zero=_place(0.0, low, high),
            ends=(number(low, 2), number(high, 2)),
            size=(WIDTH, HEIGHT),
            mark=MARK,
            style=asset("report.css"),
        )
    )


def _ends(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """One axis for all rows: what their prompts reach, within `WIDEST`."""
    every = [value for row in rows for side in ("harmful", "harmless") for value in row[side]]
    return max(min(every), -WIDEST), min(max(every), WIDEST)


def _place(value: float, low: float, high: float) -> float:
    share = (min(max(value, low), high) - low) / (high - low) if high > low else 0.5
    return round(WIDTH * share, 1)


def _strip(row: Mapping[str, Any], low: float, high: float, *, best: bool) -> Strip:
    places = [tuple(_place(value, low, high) for value in row[side]) for side in ("harmful", "harmless")]
    what = "difference of means" if row.get("feature") is None else f"feature {row['feature']} of {row['sae']}"
    d_prime = "" if row.get("d_prime") is None else f"d\N{PRIME} {row['d_prime']:.2f}"
    return Strip(row["site"], what, f"{row['auroc']:.3f}", d_prime, best, *places)
