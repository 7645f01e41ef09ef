"""The layer scan's page: a mark for each prompt at its place on one axis, and nothing is drawn without data."""

from __future__ import annotations

import re
from typing import Any

import pytest

from clampdown.errors import StoreError
from clampdown.reports.scan_page import WIDTH, build_scan_page


def row(site: str, harmful: list[float], harmless: list[float], auroc: float, **more: Any) -> dict[str, Any]:
    sides = {"harmful": harmful, "harmless": harmless}
    return {"site": site, "sae": None, "feature": None, "auroc": auroc, "d_prime": 1.0, "n": 4, **sides, **more}


def marks(page: str, side: str) -> list[list[float]]:
    """Places of the marks, strip by strip."""
    strips = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    return [[float(x) + 1 for x in re.findall(rf'class="{side}" x="([-0-9.]+)"', strip)] for strip in strips]


def test_marks_stand_on_one_axis_whose_ends_are_said() -> None:
    rows = [row("blocks.0.x", [0.0, 1.0], [-1.0, 0.0], 0.9), row("blocks.1.x", [3.0, 3.0], [-1.0, 1.0], 1.0)]
    page = build_scan_page({"model": "a<b>", "rows": rows})
    assert marks(page, "harmful") == [[WIDTH / 4, WIDTH / 2], [WIDTH, WIDTH]]
    assert marks(page, "harmless") == [[0.0, WIDTH / 4], [0.0, WIDTH / 2]]
    assert "-1 to 3" in page and "a&lt;b&gt;" in page and "a<b>" not in page
    assert page.count('class="strip best"') == 1


def test_far_marks_stand_at_the_edge() -> None:
    page = build_scan_page({"model": "m", "rows": [row("s", [400.0, 6.0], [0.0, 0.0], 1.0)]})
    assert marks(page, "harmful") == [[WIDTH, WIDTH / 2]]


def test_a_scan_without_projections_is_an_error() -> None:
    with pytest.raises(StoreError, match="no projections"):
        build_scan_page({"model": "m", "rows": [{"site": "s", "auroc": 0.5}]})
