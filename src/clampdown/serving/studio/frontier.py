"""The points of past runs' frontiers, from `summary.json` as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Point:
    """One arm of a run. The three rates are means over suites, None without data; `plan` is its plan's digest.

    `loadable`: it steers and its plan's file is there.
    """

    arm: str
    kind: str
    refusal: float | None
    capability: float | None
    over_refusal: float | None
    on_front: bool
    plan: str | None
    loadable: bool

    @property
    def drawn(self) -> bool:
        return self.refusal is not None and self.capability is not None


@dataclass(frozen=True, slots=True)
class Run:
    """One run directory: its name below the directory of runs, the model it is about, and its points."""

    name: str
    model: str
    model_revision: str
    points: tuple[Point, ...]

    def point(self, arm: str) -> Point | None:
        return next((point for point in self.points if point.arm == arm), None)


def read_points(summary: Mapping[str, Any], stored: frozenset[str]) -> tuple[Point, ...]:
    """Every arm of a summary. `stored` are the digests of the plans that are there. Rows that lack what later versions
    of the file have are points without it."""
    return tuple(_point(row, stored) for row in summary.get("arms", ()))


def _point(row: Mapping[str, Any], stored: frozenset[str]) -> Point:
    axes, plan = row.get("frontier") or {}, row.get("plan")
    return Point(
        arm=str(row["name"]),
        kind=str(row["kind"]),
        refusal=axes.get("refusal"),
        capability=axes.get("capability"),
        over_refusal=axes.get("over_refusal"),
        on_front=bool(axes.get("pareto")),
        plan=plan,
        loadable=plan in stored,
    )
