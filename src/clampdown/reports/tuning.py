"""How a plan was tuned, as tables: its budgets with their bounds, the finalists, the trials that no other beats.

Everything comes from the `tune` key of a run's summary; a run without it has none of these.
"""

from __future__ import annotations

from collections.abc import Sequence

from clampdown.reports.tables import EMPTY, Cell, Column, Row, Table, number_cell
from clampdown.reports.wording import number, percent
from clampdown.results.rows import BudgetRow, FinalistRow, Tuning
from clampdown.results.run import Run


def tuning_tables(run: Run) -> tuple[Table, ...]:
    """Budgets, finalists, frontier; none for a run that was not tuned."""
    if not run.tune:
        return ()
    return (budgets_table(run.tune), finalists_table(run.tune), trials_table(run.tune))


def tuning_sentence(tune: Tuning) -> str:
    """What was chosen out of how many, and which budgets stood in the way."""
    finalists = tune.finalists
    away = sum(bool(each.turned_away_by) for each in finalists)
    binding = ", ".join(f"{name} ({count})" for name, count in tune.binding.items())
    stood = (
        f"Plans kept out that refuse more, by budget: **{binding}**."
        if binding
        else "No budget kept a better plan out."
    )
    return (
        f"Chosen: **{tune.setting}**, of {tune.trials} trials. {len(finalists)} finalists were measured again on "
        f"prompts that no trial read, and {away} turned away by a bound. {stood}{_unchecked(tune)}"
    )


def _unchecked(tune: Tuning) -> str:
    names = ", ".join(tune.unchecked)
    return f" Not checked, because there were no prompts for it: **{names}**." if names else ""


def budgets_table(tune: Tuning) -> Table:
    test = {use.budget: use for use in tune.test}
    caption = (
        "Budgets against the unsteered model on the same prompts: estimate, upper bound at "
        f"{percent(tune.confidence)} confidence and n on validation prompts, and the estimate on the test split, "
        "which decided nothing. Benign KL is in nats per token, the others are shares of prompts."
    )
    columns = (Column("budget", kind="text"), *map(Column, ("limit", "estimate", "bound", "n", "used", "test")))
    rows = tuple(_budget_row(use, test.get(use.budget)) for use in tune.validation.budgets)
    return Table("tuning-budgets", caption, columns, rows)


def _budget_row(use: BudgetRow, test: BudgetRow | None) -> Row:
    used = use.bound / use.limit if use.bound is not None and use.limit else None
    return Row(
        (
            Cell(use.budget, use.budget),
            *map(number_cell, (use.limit, use.estimate, use.bound)),
            Cell(str(use.n), float(use.n)),
            Cell(EMPTY if used is None else percent(used), used),
            number_cell(test.estimate if test else None),
        )
    )


def finalists_table(tune: Tuning) -> Table:
    caption = (
        "Finalists on validation prompts that no trial read: refusals of harmful suites, and what turned each away."
    )
    suites = list(tune.validation.refusals)
    columns = (
        Column("plan", kind="text"),
        Column("refused", "mean of suites"),
        *(Column(suite.replace("_", " "), "refused") for suite in suites),
        Column("turned away by", kind="text"),
    )
    rows = tuple(_finalist_row(each, suites, chosen=each == tune.validation) for each in tune.finalists)
    return Table("tuning-finalists", caption, columns, rows)


def _finalist_row(each: FinalistRow, suites: Sequence[str], *, chosen: bool) -> Row:
    reason = ", ".join(each.turned_away_by) or ("chosen" if chosen else EMPTY)
    rates = (each.refusals[suite].value for suite in suites)
    shares = (Cell(EMPTY if rate is None else percent(rate), rate) for rate in (each.refusal, *rates))
    return Row((Cell(each.setting, each.setting), *shares, Cell(reason, reason)), strong=chosen)


def trials_table(tune: Tuning) -> Table:
    caption = (
        "The frontiers of the search, on the few validation prompts that trials read: trials that no other beats on "
        "both objectives, then those that no other plan without a gate beats. Cost is the mean share of the budgets "
        "that the estimates use; above 1 they are overdrawn."
    )
    columns = (Column("plan", kind="text"), Column("trial"), Column("refused"), Column("cost"))
    rows = tuple(
        Row(
            (
                Cell(each.name, each.name),
                Cell(str(each.number), float(each.number)),
                Cell(percent(each.score.refusal), each.score.refusal),
                Cell(number(each.cost), each.cost),
            )
        )
        for each in tune.frontier
    )
    return Table("tuning-frontier", caption, columns, rows)
