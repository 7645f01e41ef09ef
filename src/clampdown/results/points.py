"""Where an arm stands in the trade-off: pure functions of intervals and arms.

Suites fall on two sides: those where refusing is right (harmful) and those where answering is right. An arm's rate
on a side is the plain mean over its suites, so that a large suite does not drown a small one. Its interval follows from
the parts' own intervals by the square-and-add rule for independent estimates (MOVER; Newcombe 1998, Zou & Donner 2008).

A change from the baseline is the mean of the suites' paired differences, measured prompt by prompt on the same prompts:
what a prompt's own difficulty does to both arms cancels. Runs that hold no paired differences get the difference of the
two rates as if they were of different prompts, which is wider.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from clampdown.notebook import html_table, pandas
from clampdown.results import views
from clampdown.results.rows import ArmResult, Paired
from clampdown.types import ArmKind, Interval, Verdict

UNSEEN_JAILBREAKS = "jailbroken_unseen"
Measure = Literal["refusal", "over_refusal", "capability", "likelihood", "degenerate"]
NOTHING = Interval(None, None, None, 0)
HARMFUL_SUITES = ("harmful", "jailbroken_seen", UNSEEN_JAILBREAKS, "multi_turn")


@dataclass(frozen=True, slots=True)
class Sides:
    """The run's suites by what is right to do, in the summary's order."""

    harmful: tuple[str, ...]
    answerable: tuple[str, ...]
    capability: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Point:
    """An arm's place in the trade-off: means over the suites of each side, with 95 % intervals.

    `capability` is of generated answers, `likelihood` of answers chosen by the options' likelihood. `degenerate` is
    over all suites. `unanswered` is the share of safe prompts refused or broken: a model that only babbles refuses
    nothing, and must not look good for it. `changes` are paired differences to the baseline, for measures that have
    them in all suites.
    """

    arm: ArmResult
    refusal: Interval
    over_refusal: Interval
    capability: Interval
    likelihood: Interval
    degenerate: Interval
    unanswered: Interval
    changes: Mapping[Measure, Interval] = field(default_factory=dict)


def sides_of(arms: Sequence[ArmResult], harmful_suites: Sequence[str] | None) -> Sides:
    """Which suites are on which side. A suite is harmful if the run says so, else by its name."""
    names = list(dict.fromkeys(name for arm in arms for name in arm.suites))
    harmful = HARMFUL_SUITES if harmful_suites is None else harmful_suites
    return Sides(
        tuple(name for name in names if name in harmful),
        tuple(name for name in names if name not in harmful),
        tuple(dict.fromkeys(name for arm in arms for name in arm.capability)),
    )


def mean(intervals: Iterable[Interval | None], *, least: float = 0.0) -> Interval:
    """Unweighted mean of independent estimates; without data if any part is missing, never a mean of the rest.

    `least` is the smallest value there can be: 0 for rates, -1 for differences of rates.
    """
    parts = list(intervals)
    n = sum(part.n for part in parts if part is not None)
    values = [part.value for part in parts if part is not None and part.value is not None]
    if not parts or len(values) < len(parts):
        return Interval(None, None, None, n)
    value = sum(values) / len(values)
    low, high = (_spread(parts, bound) / len(parts) for bound in ("low", "high"))
    if math.isnan(low) or math.isnan(high):
        return Interval(value, None, None, n)
    return Interval(value, max(least, value - low), min(1.0, value + high), n)


def _either(one: Interval | None, other: Interval | None) -> Interval | None:
    """Share of two outcomes that exclude each other; their negative correlation makes square-and-add conservative."""
    if one is None or other is None or one.value is None or other.value is None:
        return None
    value = one.value + other.value
    low, high = _spread((one, other), "low"), _spread((one, other), "high")
    if math.isnan(low) or math.isnan(high):
        return Interval(value, None, None, one.n)
    return Interval(value, max(0.0, value - low), min(1.0, value + high), one.n)


def difference(after: Interval, before: Interval) -> Interval:
    """after - before with its interval; bounds are None when a part has none."""
    n = min(after.n, before.n)
    if after.value is None or before.value is None:
        return Interval(None, None, None, n)
    value = after.value - before.value
    down = math.hypot(_arm_length(after, "low"), _arm_length(before, "high"))
    up = math.hypot(_arm_length(after, "high"), _arm_length(before, "low"))
    if math.isnan(down) or math.isnan(up):
        return Interval(value, None, None, n)
    return Interval(value, value - down, value + up, n)


def change(after: Point, before: Point, measure: Measure) -> Interval:
    """after - before: paired where `before` is the baseline and the run measured it, else from the two rates."""
    paired = after.changes.get(measure) if before.arm.kind is ArmKind.BASELINE else None
    return difference(getattr(after, measure), getattr(before, measure)) if paired is None else paired


def suite_change(after: ArmResult, before: ArmResult, suite: str) -> Interval:
    """As `change`, of one suite: right answers in a capability suite, refusals elsewhere."""
    paired = after.against_baseline.get(suite)
    if before.kind is ArmKind.BASELINE and paired is not None and paired.low is not None:
        return paired.interval
    missing = Interval(None, None, None, 0)
    rates = [arm.capability.get(suite) or arm.rate(suite) or missing for arm in (after, before)]
    return difference(rates[0], rates[1])


def _spread(parts: Sequence[Interval | None], bound: str) -> float:
    """Root of the summed squared distances from each value to its bound; NaN if a bound is unknown."""
    return math.hypot(*(_arm_length(part, bound) for part in parts if part is not None))


def _arm_length(part: Interval, bound: str) -> float:
    edge = part.low if bound == "low" else part.high
    return math.nan if edge is None or part.value is None else abs(part.value - edge)


def point(arm: ArmResult, sides: Sides) -> Point:
    """Where an arm stands."""
    return Point(
        arm,
        refusal=mean(arm.rate(suite) for suite in sides.harmful),
        over_refusal=mean(arm.rate(suite) for suite in sides.answerable),
        capability=mean(arm.capability.get(suite) for suite in sides.capability),
        likelihood=mean(arm.capability_by_likelihood.values()),
        degenerate=mean(_broken(arm, sides).values()),
        unanswered=mean(_either(arm.rate(s), arm.rate(s, Verdict.DEGENERATE)) for s in sides.answerable),
        changes=_changes(arm, sides),
    )


def _broken(arm: ArmResult, sides: Sides) -> dict[str, Interval | None]:
    """Broken replies by suite; of capability suites where the judge told them."""
    safety = {suite: arm.rate(suite, Verdict.DEGENERATE) for suite in (*sides.harmful, *sides.answerable)}
    return safety | {s: i for s, i in arm.degenerate_capability.items() if i.n and s in sides.capability}


def _changes(arm: ArmResult, sides: Sides) -> dict[Measure, Interval]:
    """Paired differences to the baseline, for measures that have them in all of their suites."""
    paired, likely = arm.against_baseline, arm.likelihood_against_baseline
    parts: dict[Measure, list[Interval | None]] = {
        "refusal": [_moved(paired.get(suite)) for suite in sides.harmful],
        "over_refusal": [_moved(paired.get(suite)) for suite in sides.answerable],
        "capability": [_moved(paired.get(suite)) for suite in sides.capability],
        "likelihood": [_moved(likely.get(suite)) for suite in arm.capability_by_likelihood],
        "degenerate": [paired[suite].degenerate if suite in paired else None for suite in _broken(arm, sides)],
    }
    return {name: mean(each, least=-1.0) for name, each in parts.items() if each and None not in each}


def _moved(found: Paired | None) -> Interval | None:
    return None if found is None or found.low is None else found.interval


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats on both axes (more is better), left to right.

    Of equal points the first is kept.
    """
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1], i))
    best, kept = -math.inf, []
    for index in order:
        if points[index][1] > best:
            best = points[index][1]
            kept.append(index)
    return kept[::-1]


def shown(interval: Interval) -> str:
    """A share in per cent with its interval and n; says so when it was not measured."""
    if interval.value is None:
        return "not measured"
    if interval.low is None or interval.high is None:
        return f"{100 * interval.value:.0f}"
    return f"{100 * interval.value:.0f} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]\nn = {interval.n}"


@dataclass(frozen=True, slots=True)
class Frontier:
    """The arms that no other beats, in the order of the run. `run` is what they are arms of: its figure shows all."""

    points: tuple[Point, ...]
    run: Any = field(repr=False)

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[Point]:
        return iter(self.points)

    def __repr__(self) -> str:
        return f"Frontier({', '.join(p.arm.name for p in self.points) or 'no arm has both rates'})"

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`, a row per arm. Raises `MissingPackageError` without pandas."""
        return pandas().DataFrame([_axes_row(p) for p in self.points])

    def _repr_html_(self) -> str:
        headings = ("arm", "harmful refused", "safe refused", "right", "broken")
        rows = ((p.arm.name, *map(shown, (p.refusal, p.over_refusal, p.capability, p.degenerate))) for p in self.points)
        return html_table(headings, rows, "Arms that no other beats: means over suites, per cent [95 % interval]")

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        figure = views.find("figure")(self.run)
        drawn = {} if figure is None else {"application/vnd.plotly.v1+json": figure}
        return {"text/plain": repr(self), "text/html": self._repr_html_(), **drawn}


def _axes_row(p: Point) -> dict[str, Any]:
    row: dict[str, Any] = {"arm": p.arm.name, "kind": p.arm.kind.value, "strength": p.arm.strength}
    for name in ("refusal", "over_refusal", "capability", "degenerate"):
        found: Interval = getattr(p, name)
        row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high, f"{name}_n": found.n}
    return row
