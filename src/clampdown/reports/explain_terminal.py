"""The explanation of a plan's cost for a terminal: the sentences, then the pushes of its size by their cost."""

from __future__ import annotations

import re

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clampdown.explanation import Explanation
from clampdown.reports.explain_page import sentences
from clampdown.reports.tables import visible
from clampdown.reports.wording import UNIT, number, percent

MOVED_SHOWN = 6


def explanation_summary(found: Explanation, width: int) -> RenderableType:
    """For a console of `width` columns."""
    parts: list[RenderableType] = [Text(f"Why {found.plan} costs what it costs", style="bold"), Text()]
    parts += [_marked(text) for text in sentences(found)]
    parts += [Text("\ncost of pushes of this size", style="bold"), _damage(found, width)]
    parts += [Text("\npredictions that moved most", style="bold"), _moved(found, width)]
    parts += [Text(f"not measured: {note}", style="dim") for note in found.notes]
    return Padding(Group(*parts), (1, 0))


def _marked(sentence: str) -> Text:
    """`**` marks as bold."""
    text = Text()
    for i, piece in enumerate(re.split(r"\*\*", sentence.replace(UNIT, " %"))):
        text.append(piece, style="bold" if i % 2 else "")
    return text


def _damage(found: Explanation, width: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("push", no_wrap=True, overflow="ellipsis", max_width=max(20, width - 44))
    for title in ("KL", "same token", "right by\nlikelihood"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_row("unsteered", "0", "100 %", _accuracy(found.baseline_accuracy))
    for row in sorted(found.damage, key=lambda each: -(each.kl or 0.0)):
        agreement = percent(row.top1_agreement).replace(UNIT, " %")
        style = "bold" if row.kind == "plan" else ""
        table.add_row(Text(row.name), number(row.kl), agreement, _accuracy(row.accuracy), style=style)
    return table


def _accuracy(accuracy: object) -> str:
    values = [i.value for i in accuracy.values() if i.value is not None] if isinstance(accuracy, dict) else []
    return percent(sum(values) / len(values)).replace(UNIT, " %") if values else "n/a"


def _moved(found: Explanation, width: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("KL", justify="right", no_wrap=True)
    for title in ("unsteered", "steered"):
        table.add_column(title, no_wrap=True, overflow="ellipsis", max_width=14)
    table.add_column("after", no_wrap=True, overflow="ellipsis", max_width=max(12, width - 42))
    for moved in found.moved[:MOVED_SHOWN]:
        context = visible(moved.context)[-max(12, width - 42) :]
        table.add_row(number(moved.kl), Text(visible(moved.before)), Text(visible(moved.after)), Text(context))
    return table
