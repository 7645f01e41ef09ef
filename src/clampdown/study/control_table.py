"""The table of controls: how well each was matched, and what it did beside the plan that it controls for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clampdown.evaluation.control_arms import RANDOM
from clampdown.results.rows import ArmResult
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


def shown(run: Run) -> RenderableType:
    """One row per control, below the baseline and the plan; and the plan against the random features."""
    of, matched_on = run.controls["of"], run.controls["matched_on"]
    arms = {arm.name: arm for arm in run.arms}
    rows = {name: row for name, row in run.controls.items() if isinstance(row, Mapping) and "arm" in row}
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left", caption_justify="left")
    table.title = escape(f"controls of {of}, matched on {matched_on}")
    table.add_column("arm", no_wrap=True, overflow="ellipsis")
    for heading in ("goal", "reached", *MEASURES.values(), "KL\nbenign"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in ("baseline", of):
        table.add_row(escape(name), "", "", *_measures(arms[name]), style="bold")
    for name, row in rows.items():
        goal = _number(row["goal"] if row["factor"] else None)
        table.add_row(escape(name), goal, _number(row["reached"]), *_measures(arms.get(row["arm"])))
    notes = [Text(f"{name}: {row['note']}", style="dim") for name, row in rows.items() if row["note"]]
    found = against_random(run)
    if found:
        notes.append(Text(
            f"{found.as_far} of {found.n} matched random features refuse harmful prompts as often as the plan "
            f"(p = {found.p_value:.3f})"
        ))  # fmt: skip
    return Padding(Group(table, *notes), (1, 0))


def _measures(arm: ArmResult | None) -> list[str]:
    if arm is None:
        return [""] * (len(MEASURES) + 1)
    values = [getattr(arm.frontier, name) for name in MEASURES]
    return [*("n/a" if value is None else f"{100 * value:.0f}%" for value in values), _number(arm.kl_benign)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
