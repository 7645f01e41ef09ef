"""Refusal rates of a run beside what they are once the judge's own error is taken into account."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from clampdown.evaluation.correction import Correction, corrected_refusals, read_own_labels
from clampdown.store import read_records, write_json
from clampdown.types import Interval

FILE = "corrected.json"


def run_correction(directory: Path, labels: Path) -> RenderableType:
    """Write `corrected.json` into the run's directory and return the table. Raises `PromptSetError`, `StoreError`."""
    found = corrected_refusals(read_records(directory / "records.jsonl"), read_own_labels(labels))
    error = found.error
    write_json(
        directory / FILE,
        {
            "schema": 1,
            "kind": "corrected_refusals",
            "labelled": found.labelled,
            "sensitivity": error.sensitivity,
            "specificity": error.specificity,
            "rates": found.rates,
        },
    )
    return _shown(found)


def _shown(found: Correction) -> RenderableType:
    table = Table(title="refused: as judged, and corrected", title_justify="left", box=None, pad_edge=False)
    for heading in ("arm", "suite", "n", "as judged", "corrected"):
        table.add_column(heading, justify="left" if heading in ("arm", "suite") else "right")
    for row in found.rates:
        table.add_row(escape(row.arm), escape(row.suite), str(row.raw.n), _bounded(row.raw), _bounded(row.corrected))
    error = found.error
    line = (
        f"by {found.labelled} labelled replies the judge's sensitivity is {_bounded(error.sensitivity)} and its "
        f"specificity {_bounded(error.specificity)} (Rogan-Gladen; intervals: Lang-Reiczigel)"
    )
    return Group(table, Text(line))


def _bounded(value: Interval) -> str:
    if value.low is None or value.high is None:
        return f"{value:.2f}"
    return f"{value:.2f} [{value.low:.2f}, {value.high:.2f}]"
