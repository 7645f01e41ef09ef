"""The report's tables as plain values: cells with a text, a sort key and a small detail such as an interval.

A sort key of None is "no data" and sorts last in both directions. Nothing here is HTML: the template escapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clampdown.reports.comparison import Headline
from clampdown.reports.examples import Change, Paired
from clampdown.reports.wording import DASH, KIND_TITLES, number, percent, sample_sizes, span, suite_title
from clampdown.results.points import Sides, mean
from clampdown.results.rows import ArmResult, ScreenedRow
from clampdown.results.run import Run
from clampdown.types import FeatureScore, FeatureSet, Interval, Verdict

FEATURES_SHOWN = 100
LONGEST_VALUE = 160
LONGEST_LIST = 24
MEASURED = ("clamp", "causal", "validation")
EMPTY = DASH


@dataclass(frozen=True, slots=True)
class Cell:
    """`text` is shown, `detail` below it in small type, `sort` orders. `items` unfold (top prompts, tokens)."""

    text: str
    sort: float | str | None = None
    detail: str = ""
    items: tuple[str, ...] = ()
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Column:
    """`note` is small type under the title; `kind` is text, number, tokens or prompts."""

    title: str
    note: str = ""
    kind: str = "number"


@dataclass(frozen=True, slots=True)
class Row:
    """`mark` names a colour of the style sheet (an arm's kind); `strong` rows are those the run chose."""

    cells: tuple[Cell, ...]
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """`groups` are headings over runs of columns: (title, how many columns)."""

    id: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    groups: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class _Measure:
    """A column of the arm table: where its number is, and how it reads."""

    column: Column
    cell: Callable[[ArmResult], Cell]


def share_cell(interval: Interval | None) -> Cell:
    """A rate in per cent with its interval below; the unit is in the table's caption."""
    if interval is None or interval.value is None:
        return Cell(EMPTY)
    return Cell(percent(interval.value, unit="", digits=1), interval.value, span(interval))


def number_cell(value: float | None) -> Cell:
    return Cell(EMPTY) if value is None else Cell(number(value), value)


def arms_table(run: Run, found: Headline, sides: Sides) -> Table:
    """Every arm with every measure."""
    groups = {
        "harmful, refused": [_rate_measure(run, suite) for suite in sides.harmful],
        "safe, refused": [_rate_measure(run, suite) for suite in sides.answerable],
        "capability, right": [_capability_measure(run, suite) for suite in sides.capability],
        "side effects": _side_effects(run, sides),
    }
    groups = {title: measures for title, measures in groups.items() if measures}
    measures = [measure for group in groups.values() for measure in group]
    lead = (Column("arm", kind="text"), Column("strength"))
    rows = tuple(
        Row((*_lead_cells(arm), *(measure.cell(arm) for measure in measures)), arm in found.arms) for arm in run.arms
    )
    return Table(
        "arms",
        "Rates in per cent with 95 % intervals below.",
        (*lead, *(measure.column for measure in measures)),
        rows,
        (("", len(lead)), *((title, len(group)) for title, group in groups.items())),
    )


def _lead_cells(arm: ArmResult) -> tuple[Cell, Cell]:
    return (
        Cell(arm.name, arm.name.casefold(), KIND_TITLES[arm.kind], mark=arm.kind.value),
        Cell(EMPTY if arm.strength is None else number(arm.strength), arm.strength),
    )


def _rate_measure(run: Run, suite: str) -> _Measure:
    note = sample_sizes(arm.rate(suite) for arm in run.arms)
    return _Measure(Column(suite_title(suite), note), lambda arm: share_cell(arm.rate(suite)))


def _capability_measure(run: Run, suite: str) -> _Measure:
    note = sample_sizes(arm.capability.get(suite) for arm in run.arms)
    return _Measure(Column(suite_title(suite), note), lambda arm: share_cell(arm.capability.get(suite)))


def _side_effects(run: Run, sides: Sides) -> list[_Measure]:
    """Broken replies always; what a run did not measure for any arm gets no column."""
    suites = sides.harmful + sides.answerable
    broken = _Measure(
        Column("broken replies", "all suites"),
        lambda arm: share_cell(mean(arm.rate(suite, Verdict.DEGENERATE) for suite in suites)),
    )
    refused = _Measure(
        Column("refused", "of capability"), lambda arm: share_cell(mean(arm.refused_capability.values()))
    )
    divergence = _Measure(
        Column("KL benign", "nats per token"),
        lambda arm: number_cell(arm.kl_benign),
    )
    norm = _Measure(
        Column(
            "edit size",
            "\N{DOUBLE VERTICAL LINE}Δx\N{DOUBLE VERTICAL LINE} / \N{DOUBLE VERTICAL LINE}x\N{DOUBLE VERTICAL LINE}",
        ),
        lambda arm: number_cell(arm.edit_norm),
    )
    return [
        measure for measure in (broken, refused, divergence, norm)
        if any(measure.cell(arm).sort is not None for arm in run.arms)
    ]  # fmt: skip


def changes_table(paired: Sequence[Paired], found: Headline) -> Table:
    """How many prompts each headline arm flipped, and which way, against the baseline on the same prompts."""
    steered = found.arms[1:]
    titles = ["now refused, or now right", "no longer", "broken"]
    tested = any(arm.against_baseline for arm in steered)
    columns = [Column(title) for title in titles] + [Column("p", "paired")] * tested
    rows = tuple(
        Row((Cell(suite_title(each.suite), each.suite), _count(len(each.rows)), *_changes(each, steered, tested)))
        for each in paired
    )
    groups = (("", 2), *((arm.name, len(columns)) for arm in steered))
    caption = "Prompts whose outcome differs from the baseline's." + (" p: exact McNemar test." if tested else "")
    lead = (Column("suite", kind="text"), Column("prompts"))
    return Table("changes", caption, (*lead, *(columns * len(steered))), rows, groups)


def _changes(paired: Paired, steered: Sequence[ArmResult], tested: bool) -> list[Cell]:
    cells: list[Cell] = []
    for position, arm in enumerate(steered, 1):
        counts = paired.counts(position)
        cells += [
            _count(counts[Change.NOW_REFUSES] + counts[Change.GAINED]),
            _count(counts[Change.STOPS_REFUSING] + counts[Change.LOST]),
            _count(counts[Change.BROKE]),
        ]
        if tested:
            change = arm.against_baseline.get(paired.suite)
            p = None if change is None else change.p_value
            cells.append(Cell(EMPTY) if p is None else Cell("<0.001" if p < 0.001 else number(p, 2), p))
    return cells


def _count(n: int) -> Cell:
    return Cell(str(n), float(n))


def feature_table(found: FeatureSet, chosen: Sequence[str]) -> Table:
    """A finder's features, best first, with every score that any of them has.

    What ranks them and what was measured by steering comes before the tokens, everything else after them.
    """
    scores = list(dict.fromkeys(name for feature in found.features for name in feature.scores))
    if found.ranked_by in scores:
        scores.insert(0, scores.pop(scores.index(found.ranked_by)))
    first = [name for name in scores if name == found.ranked_by or name.startswith(MEASURED)]
    rest = [name for name in scores if name not in first]
    columns = (
        Column("feature", kind="text"),
        *(Column(_spaced(name), "ranked by" if name == found.ranked_by else "") for name in first),
        Column("promotes", kind="tokens"),
        Column("demotes", kind="tokens"),
        Column("fires most on", kind="prompts"),
        *(Column(_spaced(name)) for name in rest),
    )
    shown = found.features[:FEATURES_SHOWN]
    left_out = len(found.features) - len(shown)
    caption = f"{len(shown)} features, best first" + (f"; {left_out} more in the file." if left_out else ".")
    rows = tuple(_feature_row(feature, (first, rest), str(feature.feature) in chosen) for feature in shown)
    return Table(f"features-{found.finder}", caption, columns, rows)


def screening_table(run: Run) -> Table | None:
    """Every candidate that was read from prefills: what it gained and cost there, and why it was not kept."""
    if not run.screening:
        return None
    dropped = sum(bool(each.dropped) for each in run.screening)
    caption = (
        f"{len(run.screening)} candidates read at the first reply token, {len(run.screening) - dropped} of them kept "
        "for generation. Change of the refusal log-odds on harmful prompts and KL on benign ones, in nats, on as many "
        "prompts of each kind as each candidate reached."
    )
    columns = (
        Column("candidate", kind="text"),
        Column("refusal log-odds", "change, nats"),
        Column("benign KL", "nats"),
        Column("prompts"),
        Column("strength", "raw activation"),
        Column("kept?", kind="text"),
    )
    return Table("screening", caption, columns, tuple(_screening_row(each) for each in run.screening))


def _screening_row(each: ScreenedRow) -> Row:
    reason = each.dropped or ""
    cells = (
        Cell(each.plan, each.plan),
        number_cell(each.gain),
        number_cell(each.kl),
        number_cell(each.n_prompts),
        number_cell(each.strength),
        Cell(reason or "kept", reason or "kept"),
    )
    return Row(cells, not reason)


def _feature_row(feature: FeatureScore, scores: tuple[Sequence[str], Sequence[str]], chosen: bool) -> Row:
    """`scores`: names before the tokens, names after them."""
    cells = (
        Cell(str(feature.feature), float(feature.feature), "chosen" if chosen else ""),
        *(number_cell(feature.scores.get(name)) for name in scores[0]),
        Cell("", None, items=tuple(map(visible, feature.promoted_tokens))),
        Cell("", None, items=tuple(map(visible, feature.demoted_tokens))),
        Cell("", None, items=feature.top_prompts),
        *(number_cell(feature.scores.get(name)) for name in scores[1]),
    )
    return Row(cells, chosen)


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def visible(token: str) -> str:
    """A token with its white space made visible."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def facts(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested table as (name, value) pairs, long values cut: for provenance and plans.

    A table called `extra` is no level of its own: its entries stand beside the others.
    """
    pairs: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            pairs += facts(value, prefix if key == "extra" else f"{name} · ")
        elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
            for index, item in enumerate(value, 1):
                pairs += facts(item, f"{name} {index} · " if len(value) > 1 else f"{name} · ")
        else:
            pairs.append((name, _shown(value)))
    return pairs


def _shown(value: Any) -> str:
    if value is None or value == "":
        return EMPTY
    if isinstance(value, float):
        return number(value, 5)
    if isinstance(value, list | tuple):
        if not value:
            return EMPTY
        value = ", ".join(map(str, value)) if len(value) <= LONGEST_LIST else f"{len(value)} values"
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:24]}… ({len(text)} characters)"
