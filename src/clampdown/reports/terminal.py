"""What a run and a finder found, for a terminal: arms or features as rows, fitted to the width.

1. Columns come in order of importance; as many are shown as fit, the verdict sentences wrap.
2. A cell is a percentage, followed by half the 95 % interval's width when there is room for it.
3. Rows are all arms when they are few, else the headline arms, one direction and the controls; the caption says how
   many are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clampdown.reports.comparison import Headline, headline
from clampdown.reports.internal_names import in_words
from clampdown.reports.tables import MEASURED, visible
from clampdown.reports.verdict import title, verdict
from clampdown.reports.wording import MISSING, UNIT, number, percent
from clampdown.results.points import UNSEEN_JAILBREAKS, Point, Sides, point
from clampdown.results.rows import ArmResult
from clampdown.results.run import Run
from clampdown.types import ArmKind, FeatureSet, Interval

ALL_ARMS_UP_TO = 14
LABELS_BESIDE_FROM = 70
FEATURES_SHOWN = 12
FEATURE_WIDTH = 9
SCORE_WIDTH = 11
MIN_TOKENS_WIDTH = 20
NAME_WIDTH = 23
CELL_WIDTH = 8
WIDE_CELL_WIDTH = 11
STYLES = {
    ArmKind.BASELINE: "bold",
    ArmKind.FEATURE: "yellow",
    ArmKind.DIRECTION: "magenta",
    ArmKind.CONTROL: "dim",
    ArmKind.GATED: "bold blue",
    ArmKind.TUNED: "bold green",
}


@dataclass(frozen=True, slots=True)
class _Column:
    """A measure with a heading of at most `CELL_WIDTH` characters per line."""

    title: str
    of: Callable[[Point], Interval | None]


def run_summary(run: Run, width: int) -> RenderableType:
    """Title, verdict and table, for a console of `width` columns."""
    sides = run.sides
    sentences = [(sentence.label, Text.assemble(*_spans(sentence.text))) for sentence in verdict(run, sides)]
    body = Group(Text(title(run, sides), style="bold"), Text(), _labelled(sentences, width))
    return Group(Padding(body, (1, 0)), trade_off_table(run, width))


def _labelled(sentences: Sequence[tuple[str, Text]], width: int) -> RenderableType:
    """The labels beside their sentences when there is room, else in front of them."""
    if width < LABELS_BESIDE_FROM:
        return Group(*(Text.assemble((f"{label}: ", "bold"), text) for label, text in sentences))
    grid = Table.grid(padding=(0, 2, 0, 0))
    for label, text in sentences:
        grid.add_row(Text(label, style="bold"), text)
    return grid


def trade_off_table(run: Run, width: int) -> Table:
    """Arms against the key suites. At 80 columns seven measures fit, at 60 five; very wide ones add intervals."""
    sides = run.sides
    found = headline(run, sides)
    columns = _columns(run, sides)
    room = max(CELL_WIDTH, width - NAME_WIDTH)
    cell = WIDE_CELL_WIDTH if room >= WIDE_CELL_WIDTH * len(columns) else CELL_WIDTH
    columns = columns[: max(1, room // cell)]
    arms = _rows(run, found)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("arm", width=min(NAME_WIDTH - 1, max(8, width - cell)), overflow="ellipsis", no_wrap=True)
    for column in columns:
        table.add_column(column.title, justify="right", width=cell - 1, no_wrap=True)
    names = _distinct([arm.name for arm in arms], min(NAME_WIDTH - 1, max(8, width - cell)) - 2)
    for name, arm in zip(names, arms, strict=True):
        marked = ("▸ " if arm in found.arms else "  ") + name
        cells = [_cell(column.of(point(arm, sides)), wide=cell == WIDE_CELL_WIDTH) for column in columns]
        table.add_row(escape(marked), *cells, style=STYLES[arm.kind])
    table.caption = _caption(run, arms, wide=cell == WIDE_CELL_WIDTH)
    table.caption_justify = "left"
    return table


def _distinct(names: Sequence[str], width: int) -> list[str]:
    """Names that are too long lose their ends, or their middles where the beginnings are the same."""
    begun = Counter(name[: width - 1] for name in names)
    tail = (width - 1) // 3
    return [
        name if len(name) <= width or begun[name[: width - 1]] == 1
        else f"{name[: width - 1 - tail]}…{name[len(name) - tail :]}"
        for name in names
    ]  # fmt: skip


def _columns(run: Run, sides: Sides) -> list[_Column]:
    """Most important first: attacks, over-refusal, capability, then single suites."""
    columns = []
    if UNSEEN_JAILBREAKS in sides.harmful:
        columns.append(_Column("unseen\njailbrk", lambda p: p.arm.rate(UNSEEN_JAILBREAKS)))
    columns += [
        _Column("safe,\nrefused", lambda p: p.over_refusal),
        _Column("capa-\nbility", lambda p: p.capability),
        _Column("all\nharmful", lambda p: p.refusal),
        _Column("arith-\nmetic", lambda p: p.arm.capability.get("arithmetic")),
        _Column("border-\nline", lambda p: p.arm.rate("borderline")),
        _Column("\nbroken", lambda p: p.degenerate),
    ]
    measured = [point(arm, sides) for arm in run.arms]
    return [column for column in columns if any(_has_value(column.of(p)) for p in measured)]


def _has_value(interval: Interval | None) -> bool:
    return interval is not None and interval.value is not None


def _cell(interval: Interval | None, wide: bool) -> str:
    if interval is None or interval.value is None:
        return MISSING
    text = percent(interval.value, unit="%")
    if not wide or interval.low is None or interval.high is None:
        return text
    return f"{text} ±{max(1, round(50 * (interval.high - interval.low)))}"


def _rows(run: Run, found: Headline) -> list[ArmResult]:
    """All arms when they are few; else those that a conclusion rests on, and of the directions the last."""
    if len(run.arms) <= ALL_ARMS_UP_TO:
        return list(run.arms)
    direction = [arm for arm in run.arms if arm.kind is ArmKind.DIRECTION][-1:]
    kept = [arm for arm in run.arms if arm in found.arms or arm in direction or arm.kind is ArmKind.CONTROL]
    extra = len(kept) - ALL_ARMS_UP_TO
    spared = [arm for arm in kept if arm.kind is ArmKind.CONTROL][:extra] if extra > 0 else []
    return [arm for arm in kept if arm not in spared]


def _caption(run: Run, arms: Sequence[ArmResult], *, wide: bool) -> str:
    spread = "± is half the 95% interval's width" if wide else "95% intervals are in the report"
    left_out = len(run.arms) - len(arms)
    return f"{spread}; {left_out} more arms in the report" if left_out else spread


def _spans(text: str) -> list[tuple[str, str]]:
    """`**` marks as bold. Terminals break lines at a no-break space, so the unit joins its number."""
    return [(part, "bold" if index % 2 else "") for index, part in enumerate(text.replace(UNIT, "%").split("**"))]


def print_features(found: FeatureSet, console: Console) -> None:
    """Print what a finder found, fitted to the console."""
    console.print(features_table(found, console.width))


def features_table(found: FeatureSet, width: int, top: int = FEATURES_SHOWN) -> Table:
    """The best features: the score that ranks them, then what was measured by clamping, then other scores and promoted
    tokens as room allows."""
    names = list(dict.fromkeys(name for feature in found.features for name in feature.scores))
    names.sort(key=lambda name: (name != found.ranked_by, not name.startswith(MEASURED)))
    room = width - FEATURE_WIDTH - MIN_TOKENS_WIDTH
    names = names[: max(1, room // SCORE_WIDTH)]
    tokens_width = width - FEATURE_WIDTH - SCORE_WIDTH * len(names)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left", caption_justify="left")
    table.title = f"{escape(found.finder)}, ranked by {escape(in_words(found.ranked_by))}"
    table.add_column("feature", justify="right", width=FEATURE_WIDTH - 1)
    for name in names:
        table.add_column(escape(in_words(name)), justify="right", width=SCORE_WIDTH - 1)
    if tokens_width >= MIN_TOKENS_WIDTH:
        table.add_column("promotes", width=tokens_width - 1, overflow="ellipsis", no_wrap=True)
    for feature in found.features[:top]:
        cells = [str(feature.feature), *(number(feature.scores.get(name)) for name in names)]
        tokens = [escape(" ".join(map(visible, feature.promoted_tokens)))] if tokens_width >= MIN_TOKENS_WIDTH else []
        table.add_row(*cells, *tokens)
    rest = len(found.features) - top
    table.caption = f"{rest} more features in the file" if rest > 0 else None
    return table
