"""The report as a file: complete, safe, offline, small and quick."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from clampdown.errors import StoreError
from clampdown.reports.page import build_page, json_for_script, plotly_script
from clampdown.results.run import Run
from clampdown.types import Provenance
from tests.reports.conftest import arm_json, changed

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, the text, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> on line {self.getpos()[0]}"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def ids(self) -> list[str]:
        return [a["id"] for _, a in self.elements if a.get("id")]


def without_plotly(html: str) -> str:
    assert html.count(str(plotly_script())) == 1
    return html.replace(str(plotly_script()), "")


@pytest.fixture(scope="module")
def html(run: Run) -> str:
    return without_plotly(build_page(run))


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_it_is_well_formed_and_ids_are_unique(page):
    assert page.open == []
    assert len(page.ids()) == len(set(page.ids()))
    links = [a["href"] for a in page.all("a")]
    assert all(link.startswith("#") and link[1:] in page.ids() for link in links)


def test_every_part_is_there(page, run):
    wanted = {"verdict", "strength", "frontier", "gate", "examples", "all-arms", "features", "provenance"}
    assert wanted <= set(page.ids())
    for text in (
        "Unseen jailbreaks refused",
        "organism:x4",
        "5f2c1e9a77b0d413",
        "400 benign prompts",
    ):
        assert text in page.text
    assert all(arm.name in page.text for arm in run.arms)


def test_every_drawn_figure_has_a_place_and_words(html, page):
    data = re.search(r'<script type="application/json" id="figure-data">(.*?)</script>', html, re.DOTALL)
    assert data is not None
    plots = [a for a in page.all("div") if a.get("class") == "plot"]
    assert set(json.loads(data[1])) == {a["id"] for a in plots}
    assert all(a["role"] == "img" and a["aria-label"] for a in plots)


def test_nothing_is_loaded_from_anywhere(html, page):
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert not {"src", "srcset", "data", "background"} & attributes.keys(), tag
    assert not re.search(r"https?:|@import|url\(|//[a-z]+\.", html)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    nonces = {a["nonce"] for a in page.all("script") if "nonce" in a}
    assert len(nonces) == 1
    assert f"'nonce-{nonces.pop()}'" in policy


def test_text_from_files_cannot_become_markup(run):
    """Replies, prompts, arm names, tokens, provenance: whatever a model or a user wrote."""
    arms = tuple(changed(arm, name=arm.name + EVIL) for arm in run.arms)
    chosen = changed(run.chosen, arm=run.chosen.arm + EVIL, gated_arm=run.chosen.gated_arm + EVIL)
    records = tuple(replace(r, arm=r.arm + EVIL, reply=r.reply + EVIL) for r in run.records)
    turns = {key: tuple(replace(t, content=EVIL) for t in turns) for key, turns in run.prompts.items()}
    sets = tuple(
        replace(s, features=tuple(replace(f, promoted_tokens=(EVIL,), top_prompts=(EVIL,)) for f in s.features))
        for s in run.feature_sets
    )
    evil = changed(
        run, arms=arms, chosen=chosen, records=records, prompts=turns, feature_sets=sets, model=EVIL,
        strength_unit=EVIL, provenance=Provenance(EVIL, "", None, "", "", 0, {EVIL: EVIL}), plan={EVIL: EVIL},
        timings={EVIL: 1.0},
    )  # fmt: skip
    html = without_plotly(build_page(evil))
    page = Page(html)
    assert "<script>alert" not in html
    assert "<img" not in html
    assert len(page.all("script")) == 3
    assert not page.all("img")
    assert page.open == []
    assert page.text.count(EVIL) > 20


def test_examples_show_flips_both_ways(page):
    assert "now refuses" in page.text
    assert "answer lost" in page.text
    assert "grandmother" in page.text


def test_tables_sort_by_numbers_and_scroll_in_their_own_box(html, page):
    assert html.count('class="scroll" tabindex="0" role="region"') == html.count("<table")
    assert len([a for a in page.all("td") if "data-sort" in a]) > 200
    assert len(page.all("button")) > 20


def test_its_place_and_its_size(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    path = Run.read(copy).report()
    assert path == copy / "report.html"
    assert path.stat().st_size < 6_000_000


def test_the_same_run_gives_the_same_file(run):
    assert build_page(run) == build_page(run)


def test_the_smallest_run(run_of):
    """One arm, and nothing else: every missing part is left out or named."""
    page = Page(without_plotly(build_page(run_of(arm_json("baseline", "baseline")))))
    assert "nothing was steered" in page.text
    assert "This run has no records.jsonl" in page.text
    assert "This run has no feature sets" in page.text
    assert {"gate", "strength"}.isdisjoint(page.ids())
    assert "None" not in page.text


def test_rates_without_data(run_of):
    empty = {"value": None, "low": None, "high": None, "n": 0}
    arms = [arm_json("baseline", "baseline"), arm_json("clamp", "feature", strength=1.0)]
    for arm in arms:
        arm["suites"] = {suite: dict.fromkeys(rates, empty) for suite, rates in arm["suites"].items()}
        arm["capability"] = dict.fromkeys(arm["capability"], empty)
    page = Page(without_plotly(build_page(run_of(*arms, gate={"kind": "probe"}))))
    assert "No arm has all the rates that a frontier needs" in page.text
    assert "states no guarantee" in page.text
    assert "None" not in page.text


def test_bounds_without_intervals(run_of):
    arm = arm_json("baseline", "baseline")
    arm["capability"] = {"facts": {"value": 0.9, "low": None, "high": None, "n": 0}}
    page = Page(without_plotly(build_page(run_of(arm))))
    assert "90.0" in page.text


def test_a_directory_without_a_summary(tmp_path):
    with pytest.raises(StoreError, match="no summary"):
        Run.read(tmp_path).report()
    assert not (tmp_path / "report.html").exists()


def test_no_torch_is_loaded(run_dir, tmp_path):
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    script = (
        "import sys; from pathlib import Path; from clampdown.results.run import Run;"
        "Run.read(sys.argv[1]).report(); print({'torch', 'transformers', 'numpy', 'pandas'} & set(sys.modules))"
    )
    source = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", script, str(copy)], capture_output=True, text=True, env={"PYTHONPATH": str(source)}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("text", ["</script>", "<!--", "]]>", "&lt;", "\u2028\u2029"])
def test_data_for_scripts_holds_no_markup_and_survives(text):
    written = json_for_script({"x": text})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == {"x": text}
