"""What attacks showed as one HTML file that opens offline: no script, no font, no image from elsewhere.

It holds counts alone: neither a request nor a reply is on it. Every number is in a table; the curves repeat them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clampdown.reports.page import asset, emphasised, environment
from clampdown.reports.tables import Cell, Column, Row, Table, facts, number_cell, share_cell
from clampdown.reports.wording import full, number, percent
from clampdown.store import write_atomic
from clampdown.types import Interval

MARKS = {"baseline": "baseline", "clamp": "feature", "gated": "gated", "two-sided": "tuned", "system prompt": "control"}
WIDTH, HEIGHT, LEFT, BOTTOM = 440, 240, 44, 34
WAYS = (
    ("success", "by text", "any query or any suffix"),
    ("black_box", "by queries", "words alone"),
    ("suffix", "suffix", "found with gradients, typed"),
    ("prefill", "begun reply", "needs an API that takes one"),
    ("soft_prompt", "soft prompt", "upper bound: vectors in place of a suffix"),
    ("error_direction", "past the clamp", "upper bound: a direction in the residual"),
)

Found = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """One arm's curve: its colour, the corners of the line, its marks, and the word at its end."""

    name: str
    mark: str
    points: str
    dots: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Curves:
    """Success against a budget, on a logarithmic axis. `ticks` are (place, label)."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    ticks: tuple[tuple[float, str], ...]


def write_attack_page(path: Path, found: Found) -> None:
    write_atomic(path, build_attack_page(found))


def build_attack_page(found: Found) -> str:
    """The whole page as one HTML document."""
    arms = found["arms"]
    curves = (
        curves_of(arms, "against_queries", "Success within so many queries", "queries"),
        curves_of(arms, "against_steps", "Suffix found within so many gradient steps", "gradient steps"),
    )
    about = {key: found[key] for key in ("model", "plan", "judge", "split", "seed", "code", "budget", "objectives")}
    return environment().get_template("attack.html.j2").render(
        found=found,
        page_style=asset("report.css"),
        style=asset("explain.css"),
        sentences=[emphasised(text) for text in sentences(found)],
        arms=arms_table(arms),
        curves=[each for each in curves if each is not None],
        attacks=attacks_table(arms),
        transfer=transfer_table(arms),
        size=(WIDTH, HEIGHT, LEFT, BOTTOM),
        provenance=facts(about),
    )  # fmt: skip


def interval(row: Mapping[str, Any] | None) -> Interval | None:
    """An interval of the summary; None where nothing was tried."""
    found = None if row is None else Interval(**row)
    return found if found is not None and found.n else None


def sentences(found: Found) -> list[str]:
    """The result in words, most important first."""
    arms: Found = found["arms"]
    said = []
    for name, arm in arms.items():
        rate = interval(arm["success"])
        if rate is not None:
            said.append(f"Text alone gets past **{name}** for {full(rate)} objectives within the budget.")
    said += [_whose(name, arm["gate"]) for name, arm in arms.items() if arm["gate"]]
    said += [
        f"Tried past the clamp of **{name}**: {note}."
        for name, arm in arms.items()
        for note in arm["notes"]
        if name in ("clamp", "gated")
    ]
    if found["budget"]["cut_by_time"]:
        said.append(f"Time ended before the budget was spent: {', '.join(found['budget']['cut_by_time'])}.")
    return said


def _whose(name: str, gate: Found) -> str:
    """Which part of the plan the successes got past."""
    total = gate["missed"] + gate["fired_and_failed"]
    if not total:
        return f"Of **{name}** the gate fired on {percent(gate['fired'])} of what was asked, and nothing got past it."
    return (
        f"Of the {total} answers to text that got past **{name}**, the gate had missed **{gate['missed']}**; on "
        f"**{gate['fired_and_failed']}** it had fired and the edit did not hold."
    )


def arms_table(arms: Found) -> Table:
    """Success by arm and way in."""
    ways = [way for way in WAYS if any(interval(arm[way[0]]) is not None for arm in arms.values())]
    columns = (
        Column("arm", kind="text"),
        *(Column(title, f"{note}, %") for _, title, note in ways),
        Column("queries", "mean to the first success"),
    )
    rows = tuple(
        Row((
            Cell(name, name, mark=MARKS.get(arm["kind"], "control")),
            *(share_cell(interval(arm[key])) for key, _, _ in ways),
            number_cell(arm["queries"]["mean_to_success"]),
        ), arm["kind"] in ("gated", "two-sided"))
        for name, arm in arms.items()
    )  # fmt: skip
    return Table("arms", "Attack success by arm: lower is better. 95 % intervals, clustered by what is asked for.",
                 columns, rows)  # fmt: skip


def attacks_table(arms: Found) -> Table | None:
    """Single queries by attack."""
    names = list(dict.fromkeys(name for arm in arms.values() for name in arm["by_attack"]))
    if not names:
        return None
    columns = (Column("attack", kind="text"), *(Column(name, "% of single queries") for name in arms))
    rows = tuple(
        Row((Cell(name.replace("_", " ")), *(share_cell(_single(arm, name)) for arm in arms.values())))
        for name in names
    )
    return Table("attacks", "How often one query of each kind succeeds. An arm is asked no more once it has fallen, so "
                 "a strong arm's hard objectives weigh more here.", columns, rows)  # fmt: skip


def _single(arm: Found, name: str) -> Interval | None:
    return interval(arm["by_attack"].get(name, {}).get("success"))


def transfer_table(arms: Found) -> Table | None:
    """Suffixes of one arm on another."""
    if not any(arm["transfer"] for arm in arms.values()):
        return None
    columns = (Column("found on", kind="text"), *(Column(name, "tried on, %") for name in arms))
    rows = tuple(
        Row((Cell(source), *(share_cell(_tried_on(arm, name, source)) for name, arm in arms.items())))
        for source in arms
    )
    return Table("transfer", "Suffixes by the arm they were found on and the arm they were tried on.", columns, rows)


def _tried_on(arm: Found, name: str, source: str) -> Interval | None:
    return interval(arm["suffix"] if name == source else arm["transfer"].get(source))


def curves_of(arms: Found, key: str, title: str, unit: str) -> Curves | None:
    """The arms' success against a budget."""
    rows = {name: arm[key] for name, arm in arms.items() if arm[key]}
    if not rows:
        return None
    places = sorted({row["budget"] for curve in rows.values() for row in curve})
    lines = tuple(_line(name, arms[name]["kind"], curve, places) for name, curve in rows.items())
    ticks = tuple((_x(place, places), number(place)) for place in places)
    return Curves(title, unit, lines, ticks)


def _line(name: str, kind: str, curve: Sequence[Found], places: Sequence[int]) -> Line:
    dots = tuple(
        (_x(row["budget"], places), _y(row["success"]["value"])) for row in curve if row["success"]["value"] is not None
    )
    return Line(name, MARKS.get(kind, "control"), " ".join(f"{x:.1f},{y:.1f}" for x, y in dots), dots)


def _x(place: float, places: Sequence[int]) -> float:
    span = math.log(places[-1] / places[0]) or 1.0
    return round(LEFT + (WIDTH - LEFT - 12) * math.log(place / places[0]) / span, 1)


def _y(share: float) -> float:
    return round(10 + (HEIGHT - BOTTOM - 10) * (1 - share), 1)
