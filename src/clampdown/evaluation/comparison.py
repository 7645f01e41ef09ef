"""Two arms on the same prompts, suite by suite: what changed, by how much, and whether chance would do as well.

1. Where prompts have a right answer the outcome is "correct", elsewhere "refused".
2. Each suite gets the paired difference with its interval, exact McNemar's p, and the prompts that flipped.
3. Looking at many suites finds differences by luck: q-values are Benjamini-Hochberg's over the suites compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clampdown.evaluation import metrics
from clampdown.notebook import html_table, pandas
from clampdown.types import Interval, Record


@dataclass(frozen=True, slots=True)
class Flip:
    """One prompt whose outcome differs between the arms."""

    before: Record
    after: Record


@dataclass(frozen=True, slots=True)
class SuiteComparison:
    """One suite under two arms. `before` and `after` are rates over the prompts that both arms answered, `length` is
    the change of reply length in tokens, `degenerate` the change of the share of broken replies."""

    suite: str
    outcome: str
    before: Interval
    after: Interval
    change: metrics.Comparison
    degenerate: metrics.Comparison
    length: Interval
    flips: tuple[Flip, ...]
    q_value: float | None = None


def compare_arms(first: Iterable[Record], second: Iterable[Record], *, seed: int = 0) -> tuple[SuiteComparison, ...]:
    """Every suite that both arms answered, in the order of the first."""
    before, after = _by_suite(first), _by_suite(second)
    rows = [_suite(name, before[name], after[name], seed) for name in before if name in after]
    q_values = metrics.with_q_values([row.change for row in rows])
    return tuple(replace(row, q_value=q) for row, q in zip(rows, q_values, strict=True))


@dataclass(frozen=True, slots=True)
class ArmComparison:
    """Two arms compared, suite by suite: `second` minus `first`."""

    first: str
    second: str
    suites: tuple[SuiteComparison, ...]

    def __repr__(self) -> str:
        moved = ", ".join(f"{s.suite} {s.change.difference:+.2f}" for s in self.suites)
        return f"ArmComparison({self.first} -> {self.second}: {moved})"

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`, a row per suite. Raises `MissingPackageError` without pandas."""
        rows = [{"suite": s.suite, "outcome": s.outcome, "n": s.change.difference.n, "before": s.before.value,
                 "after": s.after.value, "difference": s.change.difference.value, "low": s.change.difference.low,
                 "high": s.change.difference.high, "gained": s.change.gained, "lost": s.change.lost,
                 "p_value": s.change.p_value, "q_value": s.q_value} for s in self.suites]  # fmt: skip
        return pandas().DataFrame(rows)

    def _repr_html_(self) -> str:
        headings = ("suite", "outcome", "n", "before", "after", "difference [95 %]", "gained", "lost", "p", "q")
        rows = (
            (s.suite, s.outcome, str(s.change.difference.n), f"{s.before:.2f}", f"{s.after:.2f}",
             s.change.difference.signed, str(s.change.gained), str(s.change.lost),
             small(s.change.p_value), small(s.q_value))
            for s in self.suites
        )  # fmt: skip
        caption = f"{self.first} \N{RIGHTWARDS ARROW} {self.second}, on the same prompts; p: exact McNemar"
        return html_table(headings, rows, caption)


def small(p: float | None) -> str:
    """A p-value in few characters; nothing where the arms never differed."""
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def compare_records(records: Iterable[Record], first: str, second: str) -> ArmComparison:
    """Two arms of one run."""
    rows = {name: [record for record in records if record.arm == name] for name in (first, second)}
    return ArmComparison(first, second, compare_arms(rows[first], rows[second]))


def _by_suite(records: Iterable[Record]) -> dict[str, list[Record]]:
    grouped: dict[str, list[Record]] = {}
    for record in records:
        grouped.setdefault(record.suite, []).append(record)
    return grouped


def _suite(name: str, first: Sequence[Record], second: Sequence[Record], seed: int) -> SuiteComparison:
    exact = any(metrics.correct(record) is not None for record in first)
    outcome = metrics.correct if exact else metrics.refused
    pairs = _pairs(first, second, outcome)
    return SuiteComparison(
        suite=name,
        outcome="correct" if exact else "refused",
        before=metrics.share([pair.before for pair in pairs], outcome),
        after=metrics.share([pair.after for pair in pairs], outcome),
        change=metrics.compare(first, second, outcome, seed=seed),
        degenerate=metrics.compare(first, second, metrics.degenerate, seed=seed),
        length=metrics.compare_lengths(first, second, seed=seed),
        flips=tuple(pair for pair in pairs if outcome(pair.before) != outcome(pair.after)),
    )


def _pairs(first: Sequence[Record], second: Sequence[Record], outcome: metrics.Outcome) -> list[Flip]:
    """Both records of every prompt whose outcome is known under both arms."""
    known = {record.prompt_id: record for record in first if outcome(record) is not None}
    return [
        Flip(known[record.prompt_id], record)
        for record in second
        if record.prompt_id in known and outcome(record) is not None
    ]
