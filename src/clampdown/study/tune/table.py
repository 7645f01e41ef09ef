"""What `clampdown tune` chose, for a terminal: the plan, the budgets with their bounds, refusals on the test split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

WIDE = 76
"""Columns from which intervals are shown beside the shares."""


def shown(summary: Mapping[str, Any], width: int) -> RenderableType:
    """The choice, its budgets, its refusals."""
    found = summary["tune"]
    lines = [Text.assemble(("chosen: ", "bold"), found["setting"]), Text(_searched(found), style="dim")]
    parts = [
        *lines,
        Text(),
        _budgets(summary),
        Text(_binding(found)),
        *_unchecked(found),
        Text(),
        _refusals(summary, width),
    ]
    return Padding(Group(*parts), (1, 0))


def _searched(found: Mapping[str, Any]) -> str:
    away = sum(bool(each["turned_away_by"]) for each in found["finalists"])
    return (
        f"of {found['trials']} trials; {len(found['finalists'])} finalists measured again on prompts that no trial "
        f"read, {away} turned away by a bound"
    )


def _budgets(summary: Mapping[str, Any]) -> Table:
    found = summary["tune"]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, title_justify="left")
    table.title = f"budgets, against the unsteered model ({found['confidence']:.0%} upper bounds)"
    table.add_column("budget", no_wrap=True)
    for name in ("limit", "seen", "bound", "n", "used", "test"):
        table.add_column(name, justify="right", no_wrap=True)
    test = {use["budget"]: use["estimate"] for use in found["test"]}
    for use in found["validation"]["budgets"]:
        used = "" if use["bound"] is None else f"{use['bound'] / use['limit']:.0%}"
        cells = (use["limit"], use["estimate"], use["bound"])
        table.add_row(use["budget"], *map(_number, cells), str(use["n"]), used, _number(test.get(use["budget"])))
    return table


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g}" if abs(value) < 0.0995 else f"{value:.2f}"


def _binding(found: Mapping[str, Any]) -> str:
    """Which budgets kept plans out that refuse more."""
    if not found["binding"]:
        return "No budget binds: no plan that was tried refuses more."
    each = ", ".join(f"{name} ({count})" for name, count in sorted(found["binding"].items(), key=lambda row: -row[1]))
    return f"Binding, with the number of plans kept out that refuse more: {each}."


def _unchecked(found: Mapping[str, Any]) -> list[Text]:
    """A budget that no prompt was there for must not pass for one that holds."""
    names = found.get("unchecked")
    return [Text(f"Not checked, because there are no prompts for it: {', '.join(names)}.", "yellow")] if names else []


def _refusals(summary: Mapping[str, Any], width: int) -> Table:
    """Test split: every safety suite, harmful ones first, then right answers."""
    arms = {arm["kind"]: arm for arm in summary["arms"] if arm["kind"] in ("baseline", "tuned")}
    arms["system prompt"] = next((arm for arm in summary["arms"] if arm["system_prompt"]), None)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, title_justify="left")
    table.title = "test split, read once: % refused, then % right (95 % interval)"
    table.add_column("suite", no_wrap=True)
    shown_arms = {name: arm for name, arm in arms.items() if arm is not None}
    for name in shown_arms:
        table.add_column("unsteered" if name == "baseline" else name, justify="right", no_wrap=True)
    harmful = summary["harmful_suites"]
    suites = sorted(arms["baseline"]["suites"], key=lambda suite: suite not in harmful)
    for suite in suites:
        cells = [_share(arm["suites"][suite]["refused"], width) for arm in shown_arms.values()]
        table.add_row(escape(suite), *cells, style="" if suite in harmful else "dim")
    for suite in arms["baseline"]["capability"]:
        cells = [_share(arm["capability"][suite], width) for arm in shown_arms.values()]
        table.add_row(f"{escape(suite)}, right", *cells)
    return table


def _share(interval: Mapping[str, Any], width: int) -> str:
    if interval["value"] is None:
        return "n/a"
    share = f"{100 * interval['value']:.0f}"
    if width < WIDE or interval["low"] is None:
        return share
    return f"{share} ({100 * interval['low']:.0f}-{100 * interval['high']:.0f})"
