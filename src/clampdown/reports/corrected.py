"""Refusal rates beside what they are once the judge's measured error is taken into account: a table of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clampdown.reports.tables import Cell, Column, Row, Table, share_cell
from clampdown.reports.wording import number, span, suite_title
from clampdown.results.run import Run
from clampdown.types import Interval


def corrected_table(run: Run) -> Table | None:
    """One row per arm and suite; None for a run of which no reply was labelled, and for a file in another form."""
    found = run.corrected
    if found is None:
        return None
    try:
        rows = tuple(_row(each) for each in found["rates"])
        errors = [Interval(**found[name]) for name in ("sensitivity", "specificity")]
        caption = (
            f"Refused, in %, as judged and corrected (Rogan and Gladen 1978) by {found['labelled']} labelled replies "
            f"of this run. The judge's sensitivity there: {_said(errors[0])}, its specificity: {_said(errors[1])}."
        )
    except (KeyError, TypeError):
        return None
    columns = (Column("arm", kind="text"), Column("suite", kind="text"), Column("as judged"), Column("corrected"))
    return Table("corrected", caption, columns, rows)


def _row(each: Mapping[str, Any]) -> Row:
    return Row(
        (
            Cell(each["arm"], each["arm"]),
            Cell(suite_title(each["suite"]), each["suite"]),
            share_cell(Interval(**each["raw"])),
            share_cell(Interval(**each["corrected"])),
        )
    )


def _said(value: Interval) -> str:
    return "unknown" if value.value is None else f"{number(100 * value.value)} % ({span(value)})"
