"""Two arms side by side over their suites as one HTML page: differences, and every prompt that flipped, to be read.

What stands here is plain: whoever compared hands over rates, differences and replies as they are to be shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clampdown.reports.page import asset, environment
from clampdown.reports.tables import Cell, Column, Row, Table
from clampdown.reports.wording import MINUS, percent, span, suite_title
from clampdown.store import content_hash
from clampdown.types import Interval, Verdict


@dataclass(frozen=True, slots=True)
class Said:
    """One arm's reply to a prompt, its verdict, and whether it was right where there is a right answer."""

    text: str
    verdict: Verdict
    correct: bool | None


@dataclass(frozen=True, slots=True)
class Flipped:
    """A prompt whose outcome differs. `gained`: the second arm has the suite's outcome, the first has not."""

    prompt: str
    gained: bool
    first: Said
    second: Said


@dataclass(frozen=True, slots=True)
class ComparedSuite:
    """One suite under both arms. `outcome` is what is counted (refused, correct); `p_value` is exact McNemar's."""

    suite: str
    outcome: str
    first: Interval
    second: Interval
    difference: Interval
    p_value: str
    flips: tuple[Flipped, ...]

    def side(self, gained: bool) -> tuple[Flipped, ...]:
        return tuple(flip for flip in self.flips if flip.gained is gained)


@dataclass(frozen=True, slots=True)
class ComparedArms:
    """Two arms by name, and what their suites show."""

    first: str
    second: str
    suites: tuple[ComparedSuite, ...]

    @property
    def table(self) -> Table:
        columns = (
            Column("suite", kind="text"),
            Column("counted", kind="text"),
            Column(self.first, "%"),
            Column(self.second, "%"),
            Column("difference", "points"),
            Column("gained", "prompts"),
            Column("lost", "prompts"),
            Column("p"),
        )
        return Table(
            f"compared-{content_hash([self.first, self.second])[:8]}",
            "Second minus first, on the same prompts, with 95 % intervals; p: exact McNemar.",
            columns,
            tuple(Row(_cells(suite)) for suite in self.suites),
        )


def build_compared_page(arms: Sequence[ComparedArms], notes: Sequence[str] = ()) -> str:
    """The whole page."""
    template = environment().get_template("compared.html.j2")
    return template.render(arms=arms, notes=notes, style=asset("report.css"))


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", MINUS)


def _between(moved: Interval) -> str:
    return "" if moved.low is None or moved.high is None else f"{_points(moved.low)} to {_points(moved.high)}"


def _cells(suite: ComparedSuite) -> tuple[Cell, ...]:
    moved = suite.difference
    points = Cell("") if moved.value is None else Cell(_points(moved.value), moved.value, _between(moved))
    rates = [
        Cell(percent(each.value, unit="", digits=1), each.value, span(each)) for each in (suite.first, suite.second)
    ]
    counts = [len(suite.side(gained)) for gained in (True, False)]
    return (
        Cell(suite_title(suite.suite), suite.suite),
        Cell(suite.outcome, suite.outcome),
        *rates,
        points,
        *(Cell(str(count), float(count)) for count in counts),
        Cell(suite.p_value, suite.p_value),
    )
