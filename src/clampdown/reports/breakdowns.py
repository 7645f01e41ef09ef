"""A closer look at the headline arms: refusals by category, and where a search's budgets lie on the frontier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from clampdown.reports.comparison import Headline
from clampdown.reports.tables import Cell, Column, Row, Table, share_cell
from clampdown.results.points import Sides, point
from clampdown.results.rows import ArmResult
from clampdown.results.run import Run
from clampdown.types import Interval


@dataclass(frozen=True, slots=True)
class SuiteCategories:
    """One suite's categories as a table. `spread` is the largest difference between two categories under one arm;
    `open` marks the suite where it is largest."""

    suite: str
    table: Table
    spread: float = 0.0
    open: bool = False


def category_tables(found: Headline, sides: Sides) -> tuple[SuiteCategories, ...]:
    """Per suite with more than one category: what each headline arm refuses of it, or gets right."""
    suites = [*sides.harmful, *sides.answerable, *sides.capability]
    tables = (_of_suite(suite, found.arms, suite in sides.capability) for suite in suites)
    kept = [each for each in tables if each is not None]
    widest = max(kept, key=lambda each: each.spread, default=None)
    return tuple(replace(each, open=each is widest) for each in kept)


def _of_suite(suite: str, arms: Sequence[ArmResult], capability: bool) -> SuiteCategories | None:
    names = list(dict.fromkeys(name for arm in arms for name in arm.categories.get(suite, {})))
    if len(names) < 2:
        return None
    what = "right" if capability else "refused"
    columns = (Column("category", kind="text"), Column("prompts"), *(Column(arm.name, what) for arm in arms))
    rows = tuple(_row(suite, name, arms, capability) for name in names)
    caption = f"Per cent {what}, with 95 % intervals; a dash where there are too few prompts to say."
    rates = ([_rate(arm, suite, name, capability) for name in names] for arm in arms)
    return SuiteCategories(suite, Table(f"category-{suite}", caption, columns, rows), max(map(_spread, rates)))


def _spread(rates: Sequence[Interval | None]) -> float:
    known = [rate.value for rate in rates if rate is not None and rate.value is not None]
    return max(known) - min(known) if known else 0.0


def _row(suite: str, name: str, arms: Sequence[ArmResult], capability: bool) -> Row:
    rates = [_rate(arm, suite, name, capability) for arm in arms]
    n = max((rate.n for rate in rates if rate is not None), default=0)
    return Row((Cell(name.replace("_", " "), name), Cell(str(n), float(n)), *map(share_cell, rates)))


def _rate(arm: ArmResult, suite: str, name: str, capability: bool) -> Interval | None:
    found = arm.categories.get(suite, {}).get(name)
    return None if found is None else found.correct if capability else found.refused


@dataclass(frozen=True, slots=True)
class BudgetPlaces:
    """Where the budgets lie on the frontiers' x axes; None where there is none."""

    capability: float | None
    unanswered: float | None


def budget_places(run: Run, found: Headline, sides: Sides) -> BudgetPlaces:
    """The baseline's place moved by what was allowed: capability lost; safe prompts refused or broken."""
    budgets = run.tune.validation.budgets if run.tune else ()
    limits = {use.budget: use.limit for use in budgets if use.limit is not None}
    if found.baseline is None or not limits:
        return BudgetPlaces(None, None)
    before = point(found.baseline, sides)
    lost, refused, broken = (limits.get(name) for name in ("capability loss", "over-refusal", "broken, safe"))
    return BudgetPlaces(
        None if lost is None or before.capability.value is None else before.capability.value - lost,
        None
        if refused is None or before.unanswered.value is None
        else before.unanswered.value + refused + (broken or 0.0),
    )
