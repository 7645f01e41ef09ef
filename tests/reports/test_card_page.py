"""Cards on paper and in the terminal: nothing from outside, nothing said by colour alone, readable in both modes."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from clampdown.cards import (
    Card,
    CardScore,
    Example,
    Firing,
    Histogram,
    Neighbour,
    Token,
    TokenEffect,
)
from clampdown.featuresets import Agreement, Mover
from clampdown.reports.card_page import bars, build_card_page, pieces
from clampdown.reports.card_terminal import agreement_summary, card_summary
from clampdown.reports.page import TEMPLATES
from clampdown.types import Interval, Provenance, ScoreSource

EVIL = "<script>alert(1)</script>[bold]&"
SOURCE = ScoreSource("contrast", "blocks.3.hook_resid_post", Provenance("m", "r", "s", "h", "0", 0), "max", 40)
CARD = Card(
    feature=7,
    site="blocks.3.hook_resid_post",
    architecture="jumprelu",
    d_sae=65_536,
    neuronpedia="https://www.neuronpedia.org/llama3-8b-it/25-res-jh/7",
    provenance=Provenance("model", "r", "sae", "h", "0", 0, {"n_prompts": "2"}),
    scores=(CardScore("d_prime", 3.25, 2, 400, SOURCE), CardScore("clamp_refusal_log_odds", -0.5, 1, 1, SOURCE)),
    promoted=(TokenEffect(" no", 4.0), TokenEffect(EVIL, 2.0)),
    demoted=(TokenEffect("\n", -3.0),),
    firing=(Firing("harmful", Interval(0.5, 0.25, 0.75, 12), Interval(0.0, 0.0, 0.24, 12), 3.5),),
    histogram=Histogram((0.0, 1.0, 2.0), (6, 1), 93),
    examples=(
        Example(
            "jailbroken_seen",
            "p1",
            8.0,
            (
                Token("<|user|>", 99.0, content=False),
                Token(EVIL, 8.0),
                Token(" calm\n", -4.0),
                Token(" words", 0.0),
            ),
            cut=True,
        ),
    ),
    neighbours=(Neighbour(9, 0.71, 0.25, (" never",)), Neighbour(10, 0.5, None, ())),
)


class Reader(HTMLParser):
    """Tags with their attributes, and the page's text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_loads_nothing_and_runs_nothing():
    html = build_card_page(CARD)
    page = Reader(html)
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "link", "iframe", "object", "base")]
    assert not [a for _, a in page.tags if any(name.startswith("on") or name == "src" for name in a)]
    policy = next(a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'") and "script-src" not in policy
    assert [a["href"] for t, a in page.tags if t == "a" and (a["href"] or "").startswith("http")] == [CARD.neuronpedia]
    assert "url(" not in html and "@import" not in html
    assert EVIL in page.text
    assert len(html) < 100_000


def test_every_token_says_its_value_and_template_tokens_have_no_colour():
    spans = [a for t, a in Reader(build_card_page(CARD)).tags if t == "span" and "data-v" in a]
    assert [(a["class"], a["data-v"], a.get("style")) for a in spans] == [
        ("t template", "99, template", None),
        ("t hot", "8", "--a:1.0"),
        ("t cold", "-4", "--a:0.5"),
        ("t off", "0", None),
    ]


def test_the_loudest_content_token_sets_the_scale():
    assert CARD.scale == 8.0
    assert pieces(CARD.examples[0].tokens, 0.0)[1].share == 0.0, "a card of zeros divides by nothing"


def test_bars_have_the_area_of_their_counts():
    tall, low = bars(CARD.histogram)
    assert tall.height == pytest.approx(6 * low.height, rel=1e-3)
    assert tall.y == 0 and low.y + low.height == tall.y + tall.height
    assert bars(Histogram((), (), 5)) == []


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2) of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("colour", ["hot", "cold", "paper", "panel"])
def test_text_is_readable_on_full_colour(mode, colour):
    """AA: at least 4.5 to 1. Weaker colours lie between full colour and paper."""
    css = (TEMPLATES / "report.css").read_text() + (TEMPLATES / "card.css").read_text()

    def value(name: str) -> str:
        return re.findall(rf"--{name}: (#[0-9a-f]{{6}})", css)[mode]

    assert contrast(value("ink"), value(colour)) >= 4.5


def printed(renderable, width: int, *, colours: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colours, color_system="truecolor" if colours else None
    )
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_the_terminal_card_fits(width):
    text = printed(card_summary(CARD, width), width)
    assert max(map(len, text.splitlines())) <= width
    assert all(word in text for word in ("Feature 7", "promotes", "50%", "3.25", "0.71", "█"))
    assert "8 at “" in text and "active on" in text.lower()
    assert ("25–75" in text) == (width >= 72)


def test_the_terminal_colours_content_and_dims_the_template():
    text = printed(card_summary(CARD, 100), 100, colours=True)
    assert "\x1b[38;2;20;20;20;48;2;255;140;50m" in text, "the peak has full colour"
    assert "\x1b[2m<|user|>" in text


def test_cards_without_prompts_and_scores_say_so():
    bare = replace(CARD, examples=(), firing=(), scores=(), histogram=Histogram((), (), 0), neuronpedia=None)
    html = Reader(build_card_page(bare)).text
    assert "No prompts were read." in html and "No feature set was given." in html
    assert "none" in printed(card_summary(bare, 60), 60)


@pytest.mark.parametrize("width", [50, 100])
def test_a_comparison_in_the_terminal(width):
    found = Agreement(("a", "b"), ("d_prime", "auroc"), 30, 4, None, {10: 0.4}, (Mover(3, 8, (1, 20)),))
    text = printed(agreement_summary(found, width), width)
    assert max(map(len, text.splitlines())) <= width
    assert all(word in text for word in ("n/a", "n = 30", "40%", "4 ranked features"))
    row = next(line.split() for line in text.splitlines() if line.split()[:2] == ["3", "8"])
    assert row == ["3", "8", "1", "20"]
