"""Where everything on the page came from: each arm's plan by its digest, each file of the run by its hash."""

from __future__ import annotations

from clampdown.reports.tables import EMPTY, Cell, Column, Row, Table
from clampdown.reports.wording import number, what_it_is
from clampdown.results.run import Run

SHORT = 16


def plans_table(run: Run) -> Table | None:
    """What each arm steered with; None when no arm states a plan."""
    if not any(arm.plan for arm in run.arms):
        return None
    columns = (
        Column("arm", kind="text"),
        Column("what it is", kind="text"),
        Column("operator", kind="text"),
        Column("features", kind="text"),
        Column("strength"),
        Column("plan's digest", kind="text"),
    )
    rows = tuple(
        Row((
            Cell(arm.name, arm.name.casefold(), mark=arm.kind.value),
            Cell(what_it_is(arm), what_it_is(arm)),
            Cell(arm.operator or EMPTY, arm.operator),
            Cell(arm.feature or EMPTY, arm.feature),
            Cell(EMPTY if arm.strength is None else number(arm.strength), arm.strength),
            Cell((arm.plan or EMPTY)[:SHORT], arm.plan),
        ))
        for arm in run.arms
    )  # fmt: skip
    caption = (
        "The digest names a plan's whole content; the first strength is shown. Asking and no steering have no plan."
    )
    return Table("plans", caption, columns, rows)


def files_table(run: Run) -> Table | None:
    """The files that the page was made from."""
    if not run.files:
        return None
    columns = (Column("file", kind="text"), Column("bytes"), Column("sha256", kind="text"))
    rows = tuple(
        Row((Cell(f.name, f.name), Cell(f"{f.size:,}", float(f.size)), Cell(f.sha256[:SHORT], f.sha256)))
        for f in run.files
    )
    return Table("files", "As they were when this page was written.", columns, rows)
