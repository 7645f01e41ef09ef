"""Who draws a run: functions of packages above this one, found by name when they are called.

A run is data and needs none of them. They are named here and nowhere else, so that `run.report(...)` reads as it should
in a notebook while imports still point down.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

VIEWS = {
    "report": "clampdown.reports.page:write_report",
    "terminal": "clampdown.reports.terminal:run_summary",
    "figure": "clampdown.reports.figures:notebook_frontier",
    "compare": "clampdown.evaluation.comparison:compare_records",
}


def find(view: str) -> Callable[..., Any]:
    """The function of that view."""
    module, _, name = VIEWS[view].partition(":")
    return getattr(import_module(module), name)
