"""A feature card as one HTML file that opens offline: no script, no font, no image from elsewhere.

Token colours are a share of the strongest activation shown, mixed by the style sheet, so that both modes keep their own
contrast. What a colour says is also said in words: each example names its peak, every token has its value as a tooltip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clampdown.cards import Card, CardScore, Example, Histogram, Neighbour, Token, TokenEffect
from clampdown.reports.page import TileRow, asset, environment
from clampdown.reports.tables import Cell, Column, Row, Table, facts, number_cell, visible
from clampdown.reports.wording import DASH, number, percent, suite_title
from clampdown.store import to_jsonable, write_atomic

PLOT_WIDTH, PLOT_HEIGHT = 480.0, 150.0


@dataclass(frozen=True, slots=True)
class Piece:
    """A token to be shown. `share` is its activation over the scale, 0 to 1; `kind` is hot, cold, off or template."""

    text: str
    share: float
    kind: str
    note: str


@dataclass(frozen=True, slots=True)
class ShownExample:
    """An example with its peak in words."""

    suite: str
    prompt_id: str
    peak: str
    at: str
    pieces: tuple[Piece, ...]
    cut: bool


@dataclass(frozen=True, slots=True)
class Bar:
    """A rectangle of the histogram, in the picture's units, and what it stands for."""

    x: float
    y: float
    width: float
    height: float
    note: str


@dataclass(frozen=True, slots=True)
class Level:
    """A token with a bar: the share of the list's largest effect."""

    text: str
    value: str
    share: float


def write_card_page(path: Path, card: Card) -> None:
    write_atomic(path, build_card_page(card))


def build_card_page(card: Card) -> str:
    """The whole card as one HTML document."""
    template = environment().get_template("card.html.j2")
    return template.render(
        card=card,
        page_style=asset("report.css"),
        style=asset("card.css"),
        promoted=levels(card.promoted),
        demoted=levels(card.demoted),
        rates=_rates(card),
        peaks=[(suite_title(f.suite), number(f.mean_peak)) for f in card.firing],
        bars=bars(card.histogram),
        histogram_note=histogram_note(card.histogram),
        scale=number(card.scale),
        negative=any(t.value < 0 for e in card.examples for t in e.tokens),
        examples=[shown_example(example, card.scale) for example in card.examples],
        neighbours=neighbour_table(card.neighbours),
        scores=score_table(card.scores),
        sources=[
            (f"{s.source.finder}: where its scores come from", facts(to_jsonable(s.source))) for s in _sources(card)
        ],
        provenance=facts(to_jsonable(card.provenance)),
        plot=(PLOT_WIDTH, PLOT_HEIGHT),
    )


def pieces(tokens: Sequence[Token], scale: float) -> tuple[Piece, ...]:
    """Tokens with their colours. Template tokens have a value to read and no colour."""
    return tuple(_piece(token, scale) for token in tokens)


def _piece(token: Token, scale: float) -> Piece:
    text = token.text.replace("\n", "⏎\n")
    if not token.content:
        return Piece(text, 0.0, "template", f"{number(token.value)}, template")
    share = min(1.0, abs(token.value) / scale) if scale else 0.0
    kind = "hot" if token.value > 0 else "cold" if token.value < 0 else "off"
    return Piece(text, round(share, 3), kind, number(token.value))


def shown_example(example: Example, scale: float) -> ShownExample:
    return ShownExample(
        suite_title(example.suite),
        example.prompt_id,
        number(example.peak),
        peak_token(example),
        pieces(example.tokens, scale),
        example.cut,
    )


def peak_token(example: Example) -> str:
    """The content token with the largest activation."""
    best = max((t for t in example.tokens if t.content), key=lambda t: t.value, default=None)
    return visible(best.text.strip() or best.text) if best else ""


def levels(effects: Sequence[TokenEffect]) -> list[Level]:
    largest = max((abs(e.effect) for e in effects), default=0.0) or 1.0
    return [Level(visible(e.text), f"{e.effect:+.2f}", round(abs(e.effect) / largest, 3)) for e in effects]


def bars(histogram: Histogram) -> list[Bar]:
    """The histogram's bars in a picture of PLOT_WIDTH x PLOT_HEIGHT, with y counted from the top."""
    if not histogram.counts:
        return []
    highest, top = max(histogram.counts), histogram.edges[-1]
    found = []
    for low, high, count in zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False):
        height = PLOT_HEIGHT * count / highest
        x, width = PLOT_WIDTH * low / top, PLOT_WIDTH * (high - low) / top
        note = f"{number(low)}{DASH}{number(high)}: {count} tokens"
        found.append(Bar(round(x, 2), round(PLOT_HEIGHT - height, 2), round(width - 1, 2), round(height, 2), note))
    return found


def histogram_note(histogram: Histogram) -> str:
    """How many tokens were read and on how many of them the feature is active."""
    active = sum(histogram.counts)
    total = active + histogram.inactive
    if not total:
        return "No prompts were read."
    return f"Active on {active:,} of {total:,} content tokens ({percent(active / total, digits=1)})."


def _rates(card: Card) -> list[tuple[str, str, list[TileRow]]]:
    content = [TileRow(suite_title(f.suite), "feature", f.on_content) for f in card.firing]
    start = [TileRow(suite_title(f.suite), "gated", f.at_start) for f in card.firing]
    return [
        ("On any content token", "of the prompts", content),
        ("At the assistant's start", "where the reply is decided", start),
    ]


def neighbour_table(neighbours: Sequence[Neighbour]) -> Table:
    columns = (
        Column("feature", kind="text"),
        Column("cosine", "of decoder rows"),
        Column("active together", "of this one's active tokens"),
        Column("promotes", kind="tokens"),
    )
    rows = tuple(
        Row((
            Cell(str(n.feature), float(n.feature)),
            number_cell(n.cosine),
            Cell(percent(n.together, digits=1), n.together),
            Cell("", None, items=tuple(map(visible, n.promoted))),
        ))
        for n in neighbours
    )  # fmt: skip
    return Table("neighbours", "Features whose decoder rows point the same way.", columns, rows)


def score_table(scores: Sequence[CardScore]) -> Table:
    columns = (
        Column("score", kind="text"),
        Column("value"),
        Column("place", "1 is the largest"),
        Column("finder", kind="text"),
        Column("pooling", kind="text"),
        Column("prompts"),
    )
    rows = tuple(
        Row((
            Cell(s.name.replace("_", " ")),
            number_cell(s.value),
            Cell(f"{s.place} of {s.among}", float(s.place)),
            Cell(s.source.finder),
            Cell(s.source.pooling or DASH),
            number_cell(None if s.source.n is None else float(s.source.n)),
        ))
        for s in scores
    )  # fmt: skip
    return Table("scores", "Every score that finders gave this feature.", columns, rows)


def _sources(card: Card) -> list[CardScore]:
    """One score of each distinct source."""
    found: dict[str, CardScore] = {}
    for score in card.scores:
        found.setdefault(repr(score.source), score)
    return list(found.values())
