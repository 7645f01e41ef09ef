"""The studio in a real browser, cut off from the internet: what a visitor does, and what must come of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from playwright.sync_api import Page, Route, expect, sync_playwright

from clampdown.commands.studio import STARTERS
from clampdown.models.loading import load_model
from clampdown.serving.studio.settings import Settings, adjusted
from clampdown.steering.arms import Arm, generate_arms
from clampdown.types import ArmKind, Message, Prompt
from tests.serving.test_studio_data import GATED, HOSTILE, write_run

CHROMIUM = Path("/usr/bin/chromium")
PATIENCE = 240_000  # milliseconds, for what must come
TRICK = STARTERS[0]

pytestmark = [
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs chromium"),
    pytest.mark.xdist_group("studio"),
    pytest.mark.timeout(900),
]


@dataclass
class Visit:
    """A page that is open, where it came from, and what it asked of anybody else."""

    page: Page
    url: str
    plans: Path
    outside: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def only_here(self, route: Route) -> None:
        if urlsplit(route.request.url).netloc == urlsplit(self.url).netloc:
            route.continue_()
        else:
            self.outside.append(route.request.url)
            route.abort()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).first.click()

    def ask(self, text: str) -> None:
        """A new conversation with one question, answered on both sides."""
        self.tab("Chat")
        if self.page.locator("#transcript .turn").count():
            self.page.locator("#new").click()
            expect(self.page.locator("#transcript .turn")).to_have_count(0)
        self.page.locator("#said :is(textarea, input)").fill(text)
        self.page.keyboard.press("Enter")
        expect(self.page.locator("#transcript .receipt")).to_have_count(2)

    def answer(self, side: str) -> str:
        return self.page.locator(f".answer.{side} > p").first.inner_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The command itself, in a process of its own, with one past run."""
    tmp = tmp_path_factory.mktemp("studio")
    write_run(tmp / "runs" / "one", load_model("organism"))
    log = tmp / "log"
    command = [sys.executable, "-m", "clampdown", "studio", "--port", "0", "--max-tokens", "32"]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=tmp, stdout=out, stderr=out, env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "100"}
        )
    try:
        yield _address(process, log), tmp / "plans"
    finally:
        process.terminate()
        process.wait(240)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"studio (http://\S+)/", log.read_text()):
            return found[1]
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def visit(server: tuple[str, Path]) -> Iterator[Visit]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        visit = Visit(browser.new_page(viewport={"width": 1280, "height": 900}), *server)
        visit.page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        visit.page.route("**/*", visit.only_here)
        visit.page.on("pageerror", lambda error: visit.broken.append(str(error)))
        visit.page.goto(f"{visit.url}/", wait_until="domcontentloaded")
        expect(visit.page.locator("#transcript button")).to_have_count(len(STARTERS))
        yield visit
        browser.close()


def reply(settings: Settings, side: str) -> str:
    """What one side must answer to the trick, computed by itself."""
    plan = adjusted(GATED, settings) if side == "steered" else None
    prompt = Prompt("p", (Message("user", TRICK),), "s")
    (found,) = generate_arms(
        load_model("organism"), None, [(Arm(side, ArmKind.GATED, plan), prompt)], max_new_tokens=32
    )
    return found.text


def test_both_sides_answer_and_their_tokens_take_colour(visit: Visit) -> None:
    visit.ask(TRICK)
    assert {side: visit.answer(side) for side in ("baseline", "steered")} == {
        side: reply(Settings(), side) for side in ("baseline", "steered")
    }
    assert "gate fired" in visit.page.locator(".answer.steered .receipt").inner_text()
    assert visit.page.locator("#transcript .tok").count() == 0
    visit.page.locator("#coloured input").check()
    expect(visit.page.locator("#transcript .tok.hot").first).to_be_visible()
    shades = visit.page.locator("#transcript .tok").evaluate_all(
        "all => [...new Set(all.map(one => getComputedStyle(one).backgroundColor))].length"
    )
    assert shades > 2
    assert "Feature 352" in visit.page.locator("#legend").inner_text()
    visit.page.locator(".answer.steered [data-token]").nth(5).focus()
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#looked table")).to_have_count(2)
    assert visit.page.locator("#looked tbody tr").count() > 4
    visit.page.locator("#coloured input").uncheck()
    expect(visit.page.locator("#transcript .tok")).to_have_count(0)


def test_the_slider_changes_what_the_next_answer_is_steered_with(visit: Visit) -> None:
    visit.ask(TRICK)
    slider = visit.page.locator("#multiple input[type=range]")
    slider.focus()
    for _ in range(18):
        visit.page.keyboard.press("ArrowLeft")
    expect(visit.page.locator("#words")).to_contain_text("x0.1")
    visit.page.locator("#again").click()
    expect(visit.page.locator(".answer.steered h4")).to_contain_text("x0.1")
    expect(visit.page.locator("#transcript .receipt")).to_have_count(2)
    assert visit.answer("steered") == reply(Settings(0.1), "steered") != reply(Settings(), "steered")
    visit.page.locator("#multiple input[type=number]").fill("1")
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#words")).not_to_contain_text("x0.1")


def test_a_point_of_the_frontier_loads_its_plan_by_keyboard(visit: Visit) -> None:
    visit.tab("Frontier")
    point = visit.page.locator('#frontier button.point[data-arm="gated clamp"]')
    point.focus()
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#words strong")).to_have_text("gated clamp")
    expect(visit.page.locator("#frontier .point.chosen")).to_have_count(1)
    visit.ask(TRICK)
    assert "gated clamp" in visit.page.locator(".answer.steered h4").inner_text()


def test_a_saved_plan_answers_through_the_api(visit: Visit) -> None:
    visit.tab("Keep")
    name = visit.page.locator("#name :is(textarea, input)")
    name.fill("../evil")
    visit.page.locator("#save").click()
    expect(visit.page.locator("#saved .notice")).to_contain_text("cannot be a plan's name")
    name.fill("Mine")
    visit.page.locator("#save").click()
    expect(visit.page.locator("#saved .done")).to_be_visible()
    assert [path.name for path in visit.plans.iterdir()] == ["mine.toml"]
    expect(visit.page.locator("#curl")).to_contain_text(":mine")
    body = {"model": "organism:mine", "messages": [{"role": "user", "content": TRICK}]}
    answer: Any = httpx2.post(f"{visit.url}/v1/chat/completions", json=body, timeout=240).json()
    assert answer["steering"]["digest"] == GATED.digest and answer["steering"]["gate_fired"]


def test_a_link_brings_the_plan_and_the_same_answers(visit: Visit) -> None:
    visit.ask(TRICK)
    answers = [visit.answer(side) for side in ("baseline", "steered")]
    visit.tab("Keep")
    address = visit.page.locator("#link :is(textarea, input)")
    expect(address).to_have_value(re.compile("talk="))
    visit.page.goto(address.input_value(), wait_until="domcontentloaded")
    expect(visit.page.locator("#transcript .receipt")).to_have_count(2)
    assert [visit.answer(side) for side in ("baseline", "steered")] == answers
    visit.page.goto(f"{visit.url}/studio/?talk=nonsense", wait_until="domcontentloaded")
    expect(visit.page.locator("#legend .notice")).to_contain_text("cannot be read")


def test_features_are_found_by_ones_own_words(visit: Visit) -> None:
    visit.tab("Features")
    visit.page.locator("#by-words :is(textarea, input)").fill(TRICK)
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#features .more")).to_contain_text("your words")
    assert visit.page.locator("#features button[data-feature]").count() > 3


def test_a_list_that_was_asked_for_earlier_and_comes_late_is_not_shown(visit: Visit) -> None:
    """The request that opening the tab sends is held up until the words have their answer."""
    held: list[Route] = []

    def first_later(route: Route) -> None:
        if held:
            route.fallback()
        else:
            held.append(route)

    visit.tab("Chat")
    visit.page.route("**/queue/join*", first_later)
    with visit.page.expect_request("**/queue/join*") as listing:
        visit.tab("Features")
    visit.page.locator("#by-words :is(textarea, input)").fill("Hello there.")
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#features .more")).to_contain_text("your words")
    held[0].fallback()
    assert listing.value.response()
    with visit.page.expect_response("**/queue/join*"):
        visit.page.locator("#features button[data-feature]").first.click()
    expect(visit.page.locator("#card iframe")).to_be_visible()
    expect(visit.page.locator("#features .more")).to_contain_text("your words")


def test_what_is_typed_is_shown_and_never_run(visit: Visit) -> None:
    visit.ask(HOSTILE)
    assert visit.page.locator("#transcript .said").inner_text() == HOSTILE
    assert not visit.broken


def test_it_fits_a_phone(visit: Visit) -> None:
    visit.page.set_viewport_size({"width": 360, "height": 780})
    visit.ask(TRICK)
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360
    left, right = (visit.page.locator(f".answer.{side}").bounding_box() for side in ("baseline", "steered"))
    assert left and right and right["y"] >= left["y"] + left["height"], "one under the other"
    visit.page.set_viewport_size({"width": 1280, "height": 900})


def test_nothing_is_asked_of_anybody_else_and_the_doors_are_shut(visit: Visit) -> None:
    assert not visit.outside
    assert "default-src 'self'" in httpx2.get(f"{visit.url}/studio/").headers["content-security-policy"]
    for door in ("upload", "file=/etc/passwd", "proxy=http://127.0.0.1/"):
        assert httpx2.get(f"{visit.url}/studio/gradio_api/{door}").status_code == 404
        assert httpx2.post(f"{visit.url}/studio/gradio_api/{door}", files={"files": b"x"}).status_code == 404
