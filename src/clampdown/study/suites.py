"""`clampdown suites`: the table of public suites, and what a local copy of one holds."""

from __future__ import annotations

from collections import Counter

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clampdown.evaluation.catalog import ENTRIES, SuiteEntry, entry, load_suites
from clampdown.types import Suite

_EXAMPLE_LENGTH = 100


def listed() -> RenderableType:
    """One row per entry of the table."""
    table = Table(title=f"{len(ENTRIES)} public suites", box=None, header_style="bold")
    for column in ("name", "prompts are", "scored by", "rows", "licence"):
        table.add_column(column, justify="right" if column == "rows" else "left", no_wrap=column == "name")
    for found in ENTRIES:
        rows = "?" if found.rows is None else f"{found.rows:,}"
        table.add_row(found.name, found.kind.value, found.scoring.value, rows, found.licence)
    return Group(table, Text("Load one with --suites NAME (from the hub) or NAME=FILE (a local copy)."))


def shown(spec: str) -> RenderableType:
    """NAME: the entry. NAME=FILE or FILE: also what the file holds. Raises `PromptSetError`."""
    name, given, _ = spec.partition("=")
    if "." in name:
        return _contents(load_suites(spec))
    found = _facts(entry(name))
    return Group(found, _contents(load_suites(spec))) if given else found


def _facts(found: SuiteEntry) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    place = " ".join(part for part in (found.hub, found.config, found.split, found.revision) if part)
    facts = {
        "suite": found.name,
        "prompts are": found.kind.value,
        "scored by": found.scoring.value,
        "rows": "not checked" if found.rows is None else str(found.rows),
        "licence": found.licence,
        "source": found.source,
        "hub": f"{place}{' (gated: accept its terms there)' if found.gated else ''}" if found.hub else "no",
        "package": f"{found.in_package.package}, whose data files are read" if found.in_package else "",
        "note": found.note,
    }
    for name, value in facts.items():
        if value:
            table.add_row(Text(name, style="bold"), Text(value))
    return table


def _contents(suites: tuple[Suite, ...]) -> RenderableType:
    """Counts, labels, largest categories and a first prompt of each suite."""
    table = Table(title="what it holds")
    for column in ("suite", "prompts", "refusing is", "categories", "first prompt"):
        table.add_column(column, overflow="fold")
    for suite in suites:
        categories = Counter(prompt.category for prompt in suite.prompts if prompt.category)
        largest = ", ".join(f"{name} {n}" for name, n in categories.most_common(3))
        more = f" and {len(categories) - 3} more" if len(categories) > 3 else ""
        first = " ".join(suite.prompts[0].text.split())[:_EXAMPLE_LENGTH]
        right = "right" if suite.harmful else "wrong"
        table.add_row(suite.name, str(len(suite.prompts)), right, Text(largest + more), Text(first))
    return table
