"""Two arms side by side: every flip is on the page, on its side, with both replies whole and nothing run."""

from __future__ import annotations

from clampdown.reports.compared_page import ComparedArms, ComparedSuite, Flipped, Said, build_compared_page
from clampdown.types import Interval, Verdict

LONG = "word " * 400


def flip(prompt: str, gained: bool) -> Flipped:
    refused, complied = Said("I cannot.", Verdict.REFUSED, None), Said(LONG, Verdict.COMPLIED, None)
    return Flipped(prompt, gained, *((complied, refused) if gained else (refused, complied)))


def suite(*flips: Flipped) -> ComparedSuite:
    rates = Interval(0.2, 0.1, 0.3, 10), Interval(0.3, 0.2, 0.4, 10)
    return ComparedSuite("harmful", "refused", *rates, Interval(0.1, -0.1, 0.3, 10), "0.625", flips)


def test_every_flip_is_shown_gains_first() -> None:
    arms = ComparedArms("baseline", "a<b>", (suite(flip("swans", False), flip("geese", True), flip("ducks", True)),))
    page = build_compared_page([arms], ["note <i>"])
    assert page.count('class="example"') == 3
    assert page.index("now refused") < page.index("geese") < page.index("ducks") < page.index("no longer refused")
    assert "<b>2 of 10</b>" in page and "<b>1 of 10</b>" in page and "3 of 10 prompts flipped" in page
    assert LONG.strip() in page, "replies are whole"
    assert "a&lt;b&gt;" in page and "a<b>" not in page and "note <i>" not in page and "<script" not in page


def test_a_suite_without_flips_is_a_row_of_the_table_alone() -> None:
    page = build_compared_page([ComparedArms("x", "y", (suite(),))])
    assert "prompts flipped" not in page and "+10.0" in page and "0.625" in page
