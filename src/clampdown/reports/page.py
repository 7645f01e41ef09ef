"""The report: one HTML file that opens offline and can be understood in a minute.

From the top down: the verdict in words, tiles with the numbers behind it, strength curves, frontiers, the gate,
examples, all arms, features, and what was run. Everything from files is escaped by the template engine; the page
forbids all network access to itself by a content security policy, and runs no script but its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from clampdown.extras import extra, how_to_get, is_there
from clampdown.reports.breakdowns import category_tables
from clampdown.reports.comparison import Headline, headline, strength_curve
from clampdown.reports.corrected import corrected_table
from clampdown.reports.examples import SuiteExamples, examples_of, pair
from clampdown.reports.figures import Figure, frontier_figures, strength_figures
from clampdown.reports.methods_side_by_side import claims_table, method_figures, methods_table
from clampdown.reports.operating import ArmGate, gates_of, operating_figure
from clampdown.reports.origins import files_table, plans_table
from clampdown.reports.price import is_lower, worst_capability
from clampdown.reports.shipping import in_words, steps_of
from clampdown.reports.tables import EMPTY, Table, arms_tables, changes_table, facts, feature_tables, screening_table
from clampdown.reports.tuning import tuning_sentence, tuning_tables
from clampdown.reports.verdict import key_refusal, key_refusal_title, title, verdict
from clampdown.reports.wording import DASH, number, percent, sample_sizes, span, suite_title
from clampdown.results.points import Sides, point
from clampdown.results.rows import GateRow
from clampdown.results.run import Run
from clampdown.store import to_jsonable, write_atomic
from clampdown.types import FeatureSet, Interval

TEMPLATES = Path(__file__).parent / "templates"
REPORT_NAME = "report.html"


@dataclass(frozen=True, slots=True)
class TileRow:
    """One arm's number in a tile."""

    label: str
    mark: str
    interval: Interval


@dataclass(frozen=True, slots=True)
class Tile:
    """A key number for each headline arm. `better` is "higher" or "lower"."""

    title: str
    better: str
    note: str
    rows: tuple[TileRow, ...]


@dataclass(frozen=True, slots=True)
class FinderTable:
    """One finder's feature set, ready to be shown."""

    finder: str
    found: FeatureSet
    tables: tuple[Table, ...]
    settings: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class GateBlock:
    """One gate: what it promises, its curve, what it reads, and how often it fires by suite."""

    title: str
    sentence: str
    figure: Figure | None
    facts: tuple[tuple[str, str], ...]
    rows: tuple[TileRow, ...]


def write_report(run: Run, out: Path) -> Path:
    """Write the report as `out` (a file that ends in .html), else as `report.html` into that directory."""
    path = out if out.suffix == ".html" else out / REPORT_NAME
    write_atomic(path, build_page(run))
    return path


def build_page(run: Run) -> str:
    """The whole report as one HTML document."""
    sides = run.sides
    found = headline(run, sides)
    gates = gates_of(run, found)
    draws = is_there("report")
    operating = [operating_figure(gate, sides, index) if draws else None for index, gate in enumerate(gates)]
    figures = {
        "curves": strength_figures(run, found, sides) if draws else (),
        "methods": method_figures(run, sides) if draws else (),
        "frontiers": frontier_figures(run, found, sides) if draws else (),
        "operating": tuple(figure for figure in operating if figure is not None),
    }
    data = json_for_script({figure.id: figure.spec for group in figures.values() for figure in group})
    paired = pair(run, found, sides)
    template = environment().get_template("report.html.j2")
    return template.render(
        run=run,
        title=title(run, sides),
        sentences=verdict(run, sides),
        tiles=tiles(found, sides),
        figures=figures,
        shipping=in_words(steps_of(strength_curve(run, found.clamp), found.baseline, sides)),
        figure_data=Markup(data),  # json_for_script leaves no markup
        gates=[_gate_block(gate, figure, sides) for gate, figure in zip(gates, operating, strict=True)],
        methods=methods_table(run, sides),
        claims=claims_table(run),
        categories=category_tables(found, sides),
        explanation=None if run.explanation is None else explained(run.explanation),
        plans=plans_table(run),
        files=files_table(run),
        tuning_sentence=None if run.tune is None else tuning_sentence(run.tune),
        tuning=tuning_tables(run),
        changes=changes_table(paired, found) if paired else None,
        examples=_examples(paired, found, run),
        arms=arms_tables(run, found, sides),
        corrected=corrected_table(run),
        screening=screening_table(run),
        finders=tuple(_finder(each, run) for each in run.feature_sets),
        provenance=facts(_provenance(run)),
        decisions=[(name, facts(tree)) for name, tree in _decisions(run).items()],
        plan=None if run.plan is None else facts({k: v for k, v in run.plan.items() if k != "vectors"}),
        style=asset("report.css"),
        script=asset("report.js"),
        plotly=plotly_script() if draws else "",
        without_figures="" if draws else without_figures(),
        nonce=hashlib.sha256(data.encode()).hexdigest()[:24],
    )


def tiles(found: Headline, sides: Sides) -> tuple[Tile, ...]:
    """Up to four numbers: attacks refused, over-refusal, capability, and the worst-hit suite (else broken replies)."""
    points = {arm.name: point(arm, sides) for arm in found.arms}
    candidates = [
        _tile(found, f"{key_refusal_title(sides)} refused", "higher", [key_refusal(arm, sides) for arm in found.arms]),
        _tile(found, "safe prompts refused", "lower", [points[a.name].over_refusal for a in found.arms]),
        _tile(found, "mean capability", "higher", [points[arm.name].capability for arm in found.arms]),
        _worst_tile(found) or _tile(found, "broken replies", "lower", [points[a.name].degenerate for a in found.arms]),
    ]
    return tuple(tile for tile in candidates if tile is not None)


def _tile(found: Headline, title: str, better: str, intervals: Sequence[Interval]) -> Tile | None:
    rows = tuple(
        TileRow(arm.name, arm.kind.value, interval)
        for arm, interval in zip(found.arms, intervals, strict=True)
        if interval.value is not None
    )
    note = sample_sizes(row.interval for row in rows if row.interval.n)
    return Tile(title[0].upper() + title[1:], better, note, rows) if rows else None


def _worst_tile(found: Headline) -> Tile | None:
    if found.baseline is None or found.clamp is None or len(found.baseline.capability) < 2:
        return None
    name = worst_capability(found.clamp, found.baseline)
    if name is None or not is_lower(found.clamp, found.baseline, name):
        return None
    missing = Interval(None, None, None, 0)
    intervals = [arm.capability.get(name, missing) for arm in found.arms]
    return _tile(found, f"hardest hit: {suite_title(name)}", "higher", intervals)


def gate_sentence(gate: GateRow) -> str:
    """The guarantee in words, with what it rests on; says so when there is none."""
    promise = gate.promise
    if promise.bound is None or promise.n is None or promise.confidence is None:
        return "This gate states no guarantee on how often it fires on benign prompts."
    text = (
        f"Calibrated on **{promise.n} {promise.on} prompts**: with {percent(promise.confidence)} confidence at most "
        f"**{percent(promise.bound, digits=2)}** of such prompts trigger it"
    )
    if promise.budget is None:
        return text + " (exact binomial bound)."
    kept = "within" if promise.bound <= promise.budget else "above"
    return text + f" (exact binomial bound), {kept} the budget of {percent(promise.budget, digits=2)}."


def _gate_block(found: ArmGate, figure: Figure | None, sides: Sides) -> GateBlock:
    order = [*sides.harmful, *sides.answerable, *sides.capability]
    named = sorted(found.rates.items(), key=lambda rate: order.index(rate[0]) if rate[0] in order else len(order))
    rows = tuple(TileRow(suite_title(name), "gated", rate) for name, rate in named)
    return GateBlock(found.title, gate_sentence(found.gate), figure, tuple(_gate_facts(found.gate)), rows)


def _gate_facts(gate: GateRow) -> list[tuple[str, str]]:
    tree = {"gate": gate.kind, "features it reads": list(gate.features or ()), "threshold": gate.threshold}
    return [pair for pair in facts(tree) if pair[1] not in ("", EMPTY)]


def _examples(paired: Sequence[Any], found: Headline, run: Run) -> tuple[SuiteExamples, ...]:
    labels = [arm.name for arm in found.arms]
    return tuple(examples_of(each, labels, run.prompts) for each in paired)


def explained(found: Mapping[str, Any]) -> str:
    """What `explain.json` says in a sentence: whose cost, and how much of it."""
    cost = found.get("cost") or {}
    text = f"Why “{found.get('plan', 'the plan')}” costs what it costs, token by token and layer by layer"
    if cost.get("kl") is not None and cost.get("n_tokens"):
        text += f": **{number(cost['kl'])} nats** per token of benign text (n = {cost['n_tokens']:,} tokens)"
    return text + "."


def _provenance(run: Run) -> dict[str, Any]:
    """What was run, and the key that a run is resumed by."""
    found = to_jsonable(run.provenance) if run.provenance else {}
    key = run.manifest.get("resume_key")
    return found if key is None else {**found, "resume_key": key}


def _decisions(run: Run) -> dict[str, Mapping[str, Any]]:
    """How the run chose its plan and matched its controls, as the summary words it."""
    parts = {"recipe": run.recipe, "chosen": run.chosen.model_dump(exclude_unset=True), "controls": run.controls}
    return {name: tree for name, tree in parts.items() if tree}


def _finder(found: FeatureSet, run: Run) -> FinderTable:
    chosen = str(run.chosen.feature or "").split(" + ")
    return FinderTable(found.finder, found, feature_tables(found, chosen), tuple(facts(found.settings)))


def emphasised(text: str) -> Markup:
    """Escaped text with `**` marks as bold and intervals kept on one line."""
    marked = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(text)))
    return Markup(re.sub(rf"\[[\d{DASH}]+\]", r'<span class="whole">\g<0></span>', marked))  # escaped first


def json_for_script(value: Any) -> str:
    """JSON that can stand inside a script element: no character that could end it or start markup."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def without_figures() -> str:
    """What a page says, and whoever asked for it is told, where figures cannot be drawn."""
    return f"This report has every number and no figures: they need plotly ({how_to_get('report')})."


@cache
def plotly_script() -> Markup:
    """The bundle that plotly's Python package ships. Raises `MissingPackageError`."""
    with extra("report", "a figure"):
        from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())  # a script of a dependency, holds no closing tag


def asset(name: str) -> Markup:
    """A style sheet or script of the package's own."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8"))  # our own file


def environment() -> jinja2.Environment:
    """Templates with everything escaped by default, and the filters that pages share."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "span": span,
        "suite": suite_title,
        "emphasised": emphasised,
    }
    return environment
