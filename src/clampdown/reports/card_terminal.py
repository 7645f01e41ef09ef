"""A feature card and a comparison of two rankings, for a terminal of any width.

Tokens are coloured by activation where the terminal has colours; each example also names its peak in words, so nothing
is said by colour alone. Template tokens are dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clampdown.cards import Card, Example, Firing, Histogram, Token, TokenEffect
from clampdown.featuresets import Agreement
from clampdown.reports.card_page import histogram_note, peak_token
from clampdown.reports.tables import visible
from clampdown.reports.wording import MISSING, UNIT, number, percent, span, suite_title

SIDE_BY_SIDE_FROM = 84
EXAMPLES_SHOWN, EFFECTS_SHOWN, NEIGHBOURS_SHOWN = 6, 8, 6
LEVELS = " ▁▂▃▄▅▆▇█"
PALE, HOT, COLD = (255, 240, 224), (255, 140, 50), (96, 168, 255)


def card_summary(card: Card, width: int) -> RenderableType:
    """The card for a console of `width` columns."""
    parts: list[RenderableType] = [
        Text(f"Feature {card.feature}", style="bold"),
        Text(
            f"{card.provenance.sae} at {card.site}, {card.provenance.model}; one of {card.d_sae:,} features",
            style="dim",
        ),
    ]
    if card.neuronpedia:
        parts.append(Text(card.neuronpedia, style="underline"))
    parts += [Text(), _effects("promotes", card.promoted, width), _effects("demotes", card.demoted, width)]
    if card.firing:
        parts += [_heading("fires on (share of prompts, 95 % interval)"), _firing(card.firing, width)]
    parts += [_heading("how strongly"), *_histogram(card.histogram)]
    parts += [_heading("prompts that activate it most")]
    parts += [_example(example, card.scale) for example in card.examples[:EXAMPLES_SHOWN]] or [Text("none")]
    parts += [_heading("nearest features"), _neighbours(card, width)]
    if card.scores:
        parts += [_heading("scores"), _scores(card, width)]
    return Padding(Group(*parts), (1, 0))


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _effects(label: str, effects: Sequence[TokenEffect], width: int) -> Text:
    text = Text(f"{label:9}", style="bold", no_wrap=True, overflow="ellipsis")
    for effect in effects[:EFFECTS_SHOWN]:
        text.append(f"{visible(effect.text)} ", style="not bold")
        text.append(f"{effect.effect:+.1f}  ", style="not bold dim")
    text.truncate(width, overflow="ellipsis")
    return text


def _firing(rows: Sequence[Firing], width: int) -> Table:
    """Both rates beside each other; their intervals where there is room, the mean peak where there is more."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    spread = width >= 72
    table.add_column("suite", no_wrap=True, overflow="ellipsis", min_width=10)
    for title in ("content", "start"):
        table.add_column(title, justify="right", no_wrap=True)
        if spread:
            table.add_column("", justify="right", style="dim", no_wrap=True)
    table.add_column("mean peak", justify="right", no_wrap=True)
    for row in rows:
        cells = []
        for interval in (row.on_content, row.at_start):
            cells += [percent(interval.value).replace(UNIT, "%"), *([span(interval)] if spread else [])]
        table.add_row(suite_title(row.suite), *cells, number(row.mean_peak))
    sizes = sorted({row.on_content.n for row in rows})
    table.caption = (
        f"content: any content token; start: the assistant's; n = {'-'.join(map(str, sizes[:: len(sizes) - 1 or 1]))}"
    )
    table.caption_justify = "left"
    return table


def _histogram(histogram: Histogram) -> list[Text]:
    """Block characters, one per bin; an occupied bin is never empty."""
    found = [Text(histogram_note(histogram).replace(UNIT, "%"))]
    if histogram.counts:
        highest = max(histogram.counts)
        blocks = "".join(LEVELS[-(-8 * count // highest)] for count in histogram.counts)
        found.append(Text(f"0 {blocks} {number(histogram.edges[-1])}"))
    return found


def _example(example: Example, scale: float) -> Text:
    """The conversation on as many lines as it takes, below its peak."""
    text = Text()
    text.append(f"{number(example.peak)} at “{peak_token(example)}”", style="bold")
    text.append(f"  {suite_title(example.suite)}\n", style="dim")
    for token in example.tokens:
        text.append(token.text.replace("\n", "⏎"), style=_style(token, scale))
    return text


def _style(token: Token, scale: float) -> str:
    if not token.content:
        return "dim"
    share = min(1.0, abs(token.value) / scale) if scale else 0.0
    if not share:
        return ""
    full = HOT if token.value > 0 else COLD
    red, green, blue = (round(p + (f - p) * share) for p, f in zip(PALE, full, strict=True))
    return f"rgb(20,20,20) on rgb({red},{green},{blue})"


def _neighbours(card: Card, width: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("feature", "cosine", "together"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("promotes", no_wrap=True, overflow="ellipsis")
    for n in card.neighbours[:NEIGHBOURS_SHOWN]:
        tokens = Text("  ".join(map(visible, n.promoted)))
        table.add_row(str(n.feature), f"{n.cosine:.2f}", percent(n.together).replace(UNIT, "%"), tokens)
    return table


def _scores(card: Card, width: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("score", no_wrap=True, overflow="ellipsis")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("place", justify="right", no_wrap=True)
    table.add_column("finder", no_wrap=True, overflow="ellipsis")
    wide = width >= SIDE_BY_SIDE_FROM
    if wide:
        table.add_column("pooling", no_wrap=True)
        table.add_column("prompts", justify="right", no_wrap=True)
    for s in card.scores:
        source = [s.source.pooling or "", "" if s.source.n is None else str(s.source.n)] if wide else []
        table.add_row(
            Text(s.name.replace("_", " ")), number(s.value), f"{s.place}/{s.among}", Text(s.source.finder), *source
        )
    return table


def agreement_summary(found: Agreement, width: int) -> RenderableType:
    """Rank correlation, overlap at the top, and the features whose places differ most."""
    names = [f"{label} by {score.replace('_', ' ')}" for label, score in zip(found.labels, found.scores, strict=True)]
    lines = [Text(f"{names[0]}  against  {names[1]}", style="bold")]
    rho = MISSING if found.spearman is None else f"{found.spearman:+.3f}"
    lines.append(Text(f"rank correlation (Spearman)  {rho}   n = {found.n} features with both scores"))
    for k, share in found.overlap.items():
        lines.append(Text(f"overlap of the best {k:<3}       {percent(share).replace(UNIT, '%')}"))
    if found.without_counterpart:
        lines.append(
            Text(f"{found.without_counterpart} ranked features have no counterpart in the other SAE", style="dim")
        )
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.title, table.title_justify, table.title_style = "biggest movers", "left", "bold"
    same = all(m.feature == m.counterpart for m in found.movers)
    table.add_column("feature", justify="right", no_wrap=True)
    if not same:
        table.add_column("is", justify="right", no_wrap=True)
    for name in names:
        table.add_column(f"place in {name}", justify="right", overflow="fold")
    for m in found.movers:
        table.add_row(str(m.feature), *([] if same else [str(m.counterpart)]), *map(str, m.places))
    return Padding(Group(*lines, Text(), table), (1, 0))
