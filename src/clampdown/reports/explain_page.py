"""The explanation of a plan's cost as one HTML file that opens offline: no script, no font, no image from elsewhere.

Every number of the file is on the page, as text; bars repeat it as a length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clampdown.explanation import Answered, Damage, Explanation, FeatureShift
from clampdown.reports.page import asset, emphasised, environment
from clampdown.reports.tables import Cell, Column, Row, Table, facts, number_cell, share_cell, visible
from clampdown.reports.wording import DASH, full, number, percent, suite_title
from clampdown.store import to_jsonable, write_atomic

FIRST_PLACES = 24


@dataclass(frozen=True, slots=True)
class Bar:
    """A labelled length: `share` of the list's largest. `mark` names a colour of the style sheet."""

    label: str
    value: str
    share: float
    mark: str = "feature"
    detail: str = ""


def write_explanation_page(path: Path, found: Explanation) -> None:
    write_atomic(path, build_explanation_page(found))


def build_explanation_page(found: Explanation) -> str:
    """The whole explanation as one HTML document."""
    return environment().get_template("explain.html.j2").render(
        found=found,
        page_style=asset("report.css"),
        style=asset("explain.css"),
        sentences=[emphasised(text) for text in sentences(found)],
        damage_bars=damage_bars(found),
        damage_table=damage_table(found),
        answered=answered_table(found),
        failures=failures_table(found),
        travel_bars=travel_bars(found),
        place_bars=place_bars(found),
        moved=moved_table(found),
        features=features_table(found),
        joints=joints_table(found),
        provenance=facts(to_jsonable(found.provenance)),
    )  # fmt: skip


def sentences(found: Explanation) -> list[str]:
    """The explanation in words, most important first; each stands on a number of the page."""
    said = [_cost_sentence(found), _kind_sentence(found)]
    live = [shift for shift in found.features if shift.steered]
    if live:
        said.append(_live_sentence(live))
    if len(found.travel) > 1:
        said.append(_travel_sentence(found))
    for code in found.codes:
        said.append(
            f"Of the other features at {code.site}, **{number(code.turned_on)}** per token switch on and "
            f"**{number(code.turned_off)}** off, where {number(code.live)} were live."
        )
    said += _written_sentences(found)
    if found.gate_fired is not None:
        said.append(
            f"All of this is with the plan's gate held open. On these prompts the gate fires on "
            f"**{full(found.gate_fired)}**: only there is the cost paid."
        )
    return said


def _cost_sentence(found: Explanation) -> str:
    cost = found.cost
    edits = ", ".join(
        f"{percent(edit.relative_norm, digits=1)} of the residual's length at {edit.site} "
        f"({percent(edit.touched)} of tokens touched)"
        for edit in found.site_edits
    )
    return (
        f"The edit is **{edits}**. On benign replies it costs **{number(cost.kl)}** nats of KL per token; the "
        f"likeliest token stays the same on **{full(cost.top1_agreement)}**; the perplexity of the unsteered model's "
        f"replies goes from {number(perplexity(cost.nll_before))} to {number(perplexity(cost.nll_after))}."
    )


def _written_sentences(found: Explanation) -> list[str]:
    """Likelihood against writing, and whose fault the failures are."""
    said = []
    if len(found.answered) > 1:
        before, opened = found.answered[:2]
        lost = [
            f"{suite_title(suite)} {percent(before.right[suite].value)} to **{percent(opened.right[suite].value)}**"
            for suite in opened.right
        ]
        if lost:
            said.append(f"Answers that are written, {opened.arm}: {', '.join(lost)}.")
    harmful = [row for row in found.failures if row.harmful]
    wrong = sum(row.n - row.right for row in harmful)
    if wrong:
        gate, edit, broken = (sum(getattr(row, name) for row in harmful) for name in ("gate", "edit", "broken"))
        said.append(
            f"Of {sum(row.n for row in harmful)} harmful prompts {wrong} are not refused: the gate missed **{gate}**, "
            f"the edit did not hold on **{edit}**, and **{broken}** replies broke."
        )
    return said


def perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood, cut where a float ends."""
    return math.exp(min(nll, 700.0))


def _kind_sentence(found: Explanation) -> str:
    """Where the plan's KL stands among pushes of its size; a sentence about rank, not a test."""
    own = found.own_damage.kl
    others = [row.kl for row in (*found.controls("feature"), *found.controls("direction")) if row.kl is not None]
    if own is None or not others:
        return "There is no push of the same size to compare with: whether the damage is generic is not known."
    above = sum(own > kl for kl in others)
    ranked = f"**{number(own)}** nats against {number(min(others))}{DASH}{number(max(others))} for {len(others)} pushes"
    if above == len(others):
        return f"The damage is **specific** to what is steered: {ranked} of the same size, all of which cost less."
    if above == 0:
        return f"The damage is **smaller than that of any other push** of this size: {ranked}, all of which cost more."
    return (
        f"The damage is **generic**, what pushes of this size do: {ranked}, of which {above} cost less and "
        f"{len(others) - above} as much or more."
    )


def _live_sentence(live: Sequence[FeatureShift]) -> str:
    shown = ", ".join(f"feature {s.feature} on **{percent(s.live_before, digits=1)}**" for s in live)
    return f"Tokens on which it was live before any steering: {shown}. Elsewhere the edit writes what was not there."


def _travel_sentence(found: Explanation) -> str:
    first, last = found.travel[0], found.travel[-1]
    text = (
        f"At the output of {first.site} the residual differs by **{percent(first.relative_norm, digits=1)}**, at the "
        f"last layer ({last.site}) by **{percent(last.relative_norm, digits=1)}**"
    )
    if last.alignment is None:
        return text + "."
    return text + f"; there the difference has a cosine of {number(last.alignment)} with the edit."


def _bars(rows: Sequence[Bar], values: Sequence[float | None]) -> list[Bar]:
    largest = max((v for v in values if v is not None), default=0.0) or 1.0
    return [
        Bar(row.label, row.value, round(max(value or 0.0, 0.0) / largest, 4), row.mark, row.detail)
        for row, value in zip(rows, values, strict=True)
    ]


_MARKS = {"plan": "feature", "feature": "control", "direction": "direction", "pass-through": "baseline"}


def damage_bars(found: Explanation) -> list[Bar]:
    ordered = sorted(found.damage, key=lambda row: -(row.kl or 0.0))
    rows = [Bar(row.name, number(row.kl), 0.0, _MARKS[row.kind]) for row in ordered]
    return _bars(rows, [row.kl for row in ordered])


def travel_bars(found: Explanation) -> list[Bar]:
    rows = [
        Bar(t.site, percent(t.relative_norm, digits=1), 0.0, "feature",
            "" if t.alignment is None else f"cosine {t.alignment:+.2f}")
        for t in found.travel
    ]  # fmt: skip
    return _bars(rows, [t.relative_norm for t in found.travel])


def place_bars(found: Explanation) -> list[Bar]:
    shown = found.places[:FIRST_PLACES]
    rows = [
        Bar(str(p.place), number(p.kl), 0.0, "gated", f"same token {percent(p.top1_agreement)}, n = {p.n}")
        for p in shown
    ]
    return _bars(rows, [p.kl for p in shown])


def damage_table(found: Explanation) -> Table:
    """Every push with its cost and its accuracy by suite, the unsteered model first."""
    suites = list(found.baseline_accuracy)
    columns = (
        Column("push", kind="text"),
        Column("KL", "nats per token"),
        Column("same token", "%"),
        Column("edit size", "% of the residual"),
        *(Column(suite_title(name), "right by likelihood, %") for name in suites),
    )
    lead = (Cell("unsteered", mark="baseline"), Cell(DASH), Cell(DASH), Cell(DASH))
    rows = [Row((*lead, *(share_cell(found.baseline_accuracy[name]) for name in suites)))]
    rows += [_damage_row(row, suites) for row in found.damage]
    return Table(
        "damage",
        "Pushes of the plan's size on the same texts; 95 % intervals below. Right answers are the likeliest of an "
        "item's options: nothing is generated, so they can stay right where generated answers are lost.",
        columns,
        tuple(rows),
    )


def _damage_row(row: Damage, suites: Sequence[str]) -> Row:
    cells = (
        Cell(row.name, row.name.casefold(), "" if row.kind == "plan" else row.kind, mark=_MARKS[row.kind]),
        number_cell(row.kl),
        Cell(percent(row.top1_agreement, unit="", digits=1), row.top1_agreement),
        Cell(percent(row.edit_norm, unit="", digits=1), row.edit_norm),
        *(share_cell(row.accuracy.get(name)) for name in suites),
    )
    return Row(cells, row.kind == "plan")


def answered_table(found: Explanation) -> Table | None:
    """Right answers that are written, by arm."""
    if not found.answered:
        return None
    suites = list(found.answered[0].right)
    columns = (
        Column("arm", kind="text"),
        *(Column(suite_title(name), "right, written, %") for name in suites),
        Column("benign", "refused, %"),
        Column("benign", "broken, %"),
    )
    rows = tuple(_answered_row(row, suites) for row in found.answered)
    return Table("answered", "Answers as they are written, judged: what likelihoods do not show.", columns, rows)


def _answered_row(row: Answered, suites: Sequence[str]) -> Row:
    cells = (Cell(row.arm), *(share_cell(row.right.get(name)) for name in suites))
    return Row((*cells, share_cell(row.refused), share_cell(row.broken)), row.arm == "as it is")


def failures_table(found: Explanation) -> Table | None:
    """Counts of what went wrong with the plan as it is."""
    if not found.failures:
        return None
    columns = (
        Column("suite", kind="text"),
        Column("right", "of n"),
        Column("gate", "missed, or fired in vain"),
        Column("edit", "did not hold"),
        Column("broken", "where it acted"),
        Column("model", "by itself"),
        Column("disputed", "a second judge reads it otherwise"),
    )
    rows = tuple(
        Row((
            Cell(suite_title(r.suite), None, "refusing is right" if r.harmful else "answering is right"),
            Cell(f"{r.right} / {r.n}", r.right / r.n),
            *(Cell(str(value), float(value)) for value in (r.gate, r.edit, r.broken, r.model, r.disputed)),
        ))
        for r in found.failures
    )  # fmt: skip
    return Table("failures", "Whose fault the failures of the plan as it is are.", columns, rows)


def moved_table(found: Explanation) -> Table:
    columns = (
        Column("after", "the end of what was read", kind="text"),
        Column("unsteered", "says", kind="text"),
        Column("steered", "says", kind="text"),
        Column("KL", "nats"),
        Column("place", "in the reply"),
        Column("suite", kind="text"),
    )
    rows = tuple(
        Row((
            Cell(visible(m.context)), Cell(visible(m.before)), Cell(visible(m.after)),
            number_cell(m.kl), Cell(str(m.place), float(m.place)), Cell(suite_title(m.suite)),
        ))
        for m in found.moved
    )  # fmt: skip
    return Table("moved", "The predictions that moved most.", columns, rows)


def features_table(found: Explanation) -> Table:
    columns = (
        Column("feature", kind="text"),
        Column("mean", "before"),
        Column("mean", "after"),
        Column("live", "% of tokens, before"),
        Column("live", "% of tokens, after"),
        Column("cosine", "with the steered"),
        Column("promotes", kind="tokens"),
    )
    rows = tuple(
        Row((
            Cell(str(s.feature), float(s.feature), "steered" if s.steered else s.site),
            number_cell(s.mean_before), number_cell(s.mean_after),
            Cell(percent(s.live_before, unit="", digits=1), s.live_before),
            Cell(percent(s.live_after, unit="", digits=1), s.live_after),
            number_cell(s.cosine), Cell("", None, items=tuple(map(visible, s.promotes))),
        ), s.steered)
        for s in found.features
    )  # fmt: skip
    return Table("features", "Features whose mean activation moves most, the steered ones first.", columns, rows)


def joints_table(found: Explanation) -> Table | None:
    if not found.joints:
        return None
    columns = (
        Column("parts", kind="text"),
        Column("together", "KL, nats"),
        Column("added", "KL, nats"),
        Column("ratio"),
    )
    rows = tuple(
        Row((
            Cell(f"{j.first} and {j.second}"), number_cell(j.kl), number_cell(j.sum_kl),
            number_cell(j.kl / j.sum_kl if j.kl is not None and j.sum_kl else None),
        ))
        for j in found.joints
    )  # fmt: skip
    return Table("joints", "A pair against the sum of its parts: a ratio over 1 is more than the sum.", columns, rows)
