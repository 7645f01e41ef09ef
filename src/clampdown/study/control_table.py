"""The table of controls: how well each was matched, and what it did beside the plan that it controls for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clampdown.evaluation.control_arms import RANDOM, Control
from clampdown.results.run import Run

MEASURES = {"refusal": "harmful\nrefused", "over_refusal": "safe\nrefused", "capability": "capa-\nbility",
            "degenerate": "broken"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class AgainstRandom:
    """How many of `n` matched random features raise refusal of harmful prompts at least as far as the plan, and the
    chance of that or fewer if the plan were one of them: (1 + as_far) / (1 + n), a Monte Carlo permutation test."""

    as_far: int
    n: int

    @property
    def p_value(self) -> float:
        return (1 + self.as_far) / (1 + self.n)


def against_random(run: Run) -> AgainstRandom | None:
    """None without random controls, or when a refusal rate is missing."""
    rates = {arm.name: arm.frontier.refusal for arm in run.arms}
    random = [rate for name, rate in rates.items() if name.startswith(RANDOM)]
    own, known = rates.get(run.controls["of"]), [rate for rate in random if rate is not None]
    if own is None or not random or len(known) < len(random):
        return None
    return AgainstRandom(sum(rate >= own for rate in known), len(known))


def shown(controls: Sequence[Control], summary: Mapping[str, Any]) -> RenderableType:
    """One row per control, below the baseline and the plan; and the plan against the random features."""
    arms = {row["name"]: row for row in summary["arms"]}
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left", caption_justify="left")
    table.title = escape(f"controls of {summary['controls']['of']}, matched on {summary['controls']['matched_on']}")
    table.add_column("arm", no_wrap=True, overflow="ellipsis")
    for heading in ("goal", "reached", *MEASURES.values(), "KL\nbenign"):
        table.add_column(heading, justify="right", no_wrap=True)
    leading = ("baseline", summary["controls"]["of"])
    for name in leading:
        table.add_row(escape(name), "", "", *_measures(arms[name]), style="bold")
    for control in controls:
        row = arms.get(control.arm.name) if control.arm else None
        table.add_row(escape(control.name), _number(control.goal if control.factor else None),
                      _number(control.reached), *_measures(row))  # fmt: skip
    notes = [Text(f"{control.name}: {control.note}", style="dim") for control in controls if control.note]
    found = against_random(Run.parse(summary))
    if found:
        notes.append(Text(
            f"{found.as_far} of {found.n} matched random features refuse harmful prompts as often as the plan "
            f"(p = {found.p_value:.3f})"
        ))  # fmt: skip
    return Padding(Group(table, *notes), (1, 0))


def _measures(row: Mapping[str, Any] | None) -> list[str]:
    if row is None:
        return [""] * (len(MEASURES) + 1)
    values = [row["frontier"][name] for name in MEASURES]
    return [*("n/a" if value is None else f"{100 * value:.0f}%" for value in values), _number(row["kl_benign"])]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
