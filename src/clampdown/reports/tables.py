"""The report's tables as plain values: cells with a text, a sort key and a small detail such as an interval.

A sort key of None is "no data" and sorts last in both directions. Nothing here is HTML: the template escapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clampdown.reports.comparison import Headline
from clampdown.reports.examples import Change, Paired
from clampdown.reports.internal_names import TRUTH, WORDS, in_words
from clampdown.reports.wording import DASH, number, percent, sample_sizes, span, suite_title, what_it_is
from clampdown.results.points import Sides, mean, point
from clampdown.results.rows import ArmResult, ScreenedRow
from clampdown.results.run import Run
from clampdown.types import FeatureScore, FeatureSet, Interval

FEATURES_SHOWN = 100
LONGEST_VALUE = 160
LONGEST_LIST = 24
MEASURED = ("clamp", "causal", "validation")
EMPTY = DASH
MEASURES_ABREAST = 8


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


def arms_tables(run: Run, found: Headline, sides: Sides) -> tuple[Table, ...]:
    """Every arm with every measure, in as many tables as fit a page's width side by side with the arms' names."""
    groups = {
        "harmful, refused": [_rate_measure(run, suite) for suite in sides.harmful],
        "safe, refused": [_rate_measure(run, suite) for suite in sides.answerable],
        "capability, right": [_capability_measure(run, suite) for suite in sides.capability],
        "by likelihood, right": _likelihood_measures(run),
        "side effects": _side_effects(run),
    }
    pages = _pages([(title, measures) for title, measures in groups.items() if measures])
    return tuple(_arms_page(run, found, page, index) for index, page in enumerate(pages))


Group = tuple[str, Sequence[_Measure]]


def _pages(groups: Sequence[Group]) -> list[list[Group]]:
    """The groups in order, each page at most `MEASURES_ABREAST` measures wide; a wider group goes over several."""
    cut = [
        (title, measures[i : i + MEASURES_ABREAST])
        for title, measures in groups
        for i in range(0, len(measures), MEASURES_ABREAST)
    ]
    pages: list[list[Group]] = []
    for group in cut:
        if not pages or sum(len(each) for _, each in (*pages[-1], group)) > MEASURES_ABREAST:
            pages.append([])
        pages[-1].append(group)
    return pages


def _arms_page(run: Run, found: Headline, groups: Sequence[Group], index: int) -> Table:
    measures = [measure for _, group in groups for measure in group]
    lead = (Column("arm", kind="text"), Column("strength"))
    rows = tuple(
        Row((*_lead_cells(arm), *(measure.cell(arm) for measure in measures)), arm in found.arms) for arm in run.arms
    )
    return Table(
        f"arms-{index}",
        "Rates in per cent with 95 % intervals below.",
        (*lead, *(measure.column for measure in measures)),
        rows,
        (("", len(lead)), *((title, len(group)) for title, group in groups)),
    )


def _lead_cells(arm: ArmResult) -> tuple[Cell, Cell]:
    return (
        Cell(arm.name, arm.name.casefold(), what_it_is(arm), mark=arm.kind.value),
        Cell(EMPTY if arm.strength is None else number(arm.strength), arm.strength),
    )


def _rate_measure(run: Run, suite: str) -> _Measure:
    note = sample_sizes(arm.rate(suite) for arm in run.arms)
    return _Measure(Column(suite_title(suite), note), lambda arm: share_cell(arm.rate(suite)))


def _capability_measure(run: Run, suite: str) -> _Measure:
    note = sample_sizes(arm.capability.get(suite) for arm in run.arms)
    return _Measure(Column(suite_title(suite), note), lambda arm: share_cell(arm.capability.get(suite)))


def _likelihood_measures(run: Run) -> list[_Measure]:
    """Suites answered by the options' likelihood: another measure than generated answers, and called so."""
    suites = dict.fromkeys(suite for arm in run.arms for suite in arm.capability_by_likelihood)
    return [
        _Measure(
            Column(suite_title(suite), sample_sizes(arm.capability_by_likelihood.get(suite) for arm in run.arms)),
            lambda arm, suite=suite: share_cell(arm.capability_by_likelihood.get(suite)),
        )
        for suite in suites
    ]


def _side_effects(run: Run) -> list[_Measure]:
    """Broken replies always; what a run did not measure for any arm gets no column."""
    sides = run.sides
    broken = _Measure(Column("broken replies", "all suites"), lambda arm: share_cell(point(arm, sides).degenerate))
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


def feature_tables(found: FeatureSet, chosen: Sequence[str]) -> tuple[Table, ...]:
    """A finder's features, best first: what ranks them and what was measured by steering, beside their tokens; then,
    where there are more, all other scores."""
    scores = list(dict.fromkeys(name for feature in found.features for name in feature.scores))
    if found.ranked_by in scores:
        scores.insert(0, scores.pop(scores.index(found.ranked_by)))
    first = [name for name in scores if name == found.ranked_by or name.startswith(MEASURED)]
    rest = [name for name in scores if name not in first]
    shown = found.features[:FEATURES_SHOWN]
    left_out = len(found.features) - len(shown)
    caption = f"{len(shown)} features, best first" + (f"; {left_out} more in the file." if left_out else ".")
    columns = (
        Column("feature", kind="text"),
        *(Column(in_words(name), "ranked by" if name == found.ranked_by else "") for name in first),
        Column("promotes", kind="tokens"),
        Column("demotes", kind="tokens"),
        Column("fires most on", kind="prompts"),
    )
    rows = tuple(_feature_row(feature, first, str(feature.feature) in chosen) for feature in shown)
    main = Table(f"features-{found.finder}", caption, columns, rows)
    return (main, *_score_pages(found, shown, rest, chosen))


def _score_pages(
    found: FeatureSet, shown: Sequence[FeatureScore], names: Sequence[str], chosen: Sequence[str]
) -> Iterator[Table]:
    for i in range(0, len(names), MEASURES_ABREAST):
        page = names[i : i + MEASURES_ABREAST]
        columns = (Column("feature", kind="text"), *(Column(in_words(name)) for name in page))
        rows = tuple(
            Row((_feature_cell(f, chosen), *(number_cell(f.scores.get(n)) for n in page)), str(f.feature) in chosen)
            for f in shown
        )
        yield Table(f"scores-{found.finder}-{i}", "Further scores of the same features.", columns, rows)


def _feature_cell(feature: FeatureScore, chosen: Sequence[str]) -> Cell:
    return Cell(str(feature.feature), float(feature.feature), "chosen" if str(feature.feature) in chosen else "")


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


def _feature_row(feature: FeatureScore, scores: Sequence[str], chosen: bool) -> Row:
    cells = (
        Cell(str(feature.feature), float(feature.feature), "chosen" if chosen else ""),
        *(number_cell(feature.scores.get(name)) for name in scores),
        Cell("", None, items=tuple(map(visible, feature.promoted_tokens))),
        Cell("", None, items=tuple(map(visible, feature.demoted_tokens))),
        Cell("", None, items=feature.top_prompts),
    )
    return Row(cells, chosen)


def visible(token: str) -> str:
    """A token with its white space made visible."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def facts(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested table as (name, value) pairs, long values cut: for provenance and plans.

    A table called `extra` is no level of its own: its entries stand beside the others.
    """
    pairs: list[tuple[str, str]] = []
    for key, value in tree.items():
        name = f"{prefix}{in_words(str(key))}"
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
    text = in_words(str(value)) if str(value) in WORDS else TRUTH.get(str(value), str(value))
    return text if len(text) <= LONGEST_VALUE else f"{text[:24]}… ({len(text)} characters)"
