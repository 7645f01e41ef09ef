"""Tables for notebooks: what `_repr_html_` of results, feature sets and cards returns, and pandas where it is there.

Everything is escaped: names and tokens come from files and models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import import_module
from typing import Any

from clampdown.extras import extra

ROWS_SHOWN = 20


def html_table(headings: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table that scrolls sideways when it is wide; of many rows the first `ROWS_SHOWN`, and how many are left out."""
    every = list(rows)
    left_out = len(every) - ROWS_SHOWN
    caption += f" ({left_out} more rows)" if left_out > 0 else ""
    head = "".join(f'<th scope="col" style="text-align:left">{_lines(each)}</th>' for each in headings)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in every[:ROWS_SHOWN])
    return (
        '<div style="overflow-x:auto"><table>'
        f'<caption style="text-align:left;caption-side:top">{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    return f'<td style="text-align:left;white-space:nowrap">{_lines(text)}</td>'


def _lines(text: str) -> str:
    return escape(text).replace("\n", "<br>")


def pandas() -> Any:
    """The package. Raises `MissingPackageError`."""
    with extra("pandas", "a data frame"):
        return import_module("pandas")
