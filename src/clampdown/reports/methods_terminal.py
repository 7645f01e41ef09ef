"""Methods side by side for a terminal: refusals and costs of every arm, then what the papers claim and what held."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clampdown.results.rows import ArmResult
from clampdown.results.run import Run
from clampdown.types import Interval

RANDOM = "random feature"
WORDS = {True: "reproduced", False: "not reproduced", None: "no data"}


def methods_summary(run: Run) -> RenderableType:
    """The methods' table, then the claims."""
    notes = [Text(f"{line.method}: {line.note}", style="dim") for line in run.methods if line.note]
    parts = [_methods_table(run), *notes, *(["", _claims_table(run)] if run.claims else [])]
    return Padding(Group(*parts), (1, 0))


def _methods_table(run: Run) -> Table:
    """One row per arm, one for all random features. Intervals and suites are in summary.json and the report."""
    harmful = run.sides.harmful
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
    table.title = "refused, then right answers, % of test prompts"
    table.add_column("arm", no_wrap=True, overflow="ellipsis")
    for name in (*harmful, "safe", "right", "right,_likelihood", "broken", "KL_benign"):
        table.add_column(name.replace("jailbroken", "jailbr.").replace("_", "\n"), justify="right")
    for arm in run.arms:
        if not arm.name.startswith(RANDOM):
            table.add_row(escape(arm.name), *_rates([arm], harmful))
    random = [arm for arm in run.arms if arm.name.startswith(RANDOM)]
    if random:
        table.add_row(f"{len(random)} random features, mean", *_rates(random, harmful), style="dim")
    return table


def _rates(arms: Sequence[ArmResult], harmful: Sequence[str]) -> list[str]:
    """Means over the arms."""
    refused = [_mean([_value(arm.rate(name)) for arm in arms]) for name in harmful]
    likely = _mean([rate.value for arm in arms for rate in arm.capability_by_likelihood.values()])
    axes = [arm.frontier for arm in arms]
    safe, right, broken = (
        _mean([each.over_refusal for each in axes]),
        _mean([each.capability for each in axes]),
        _mean([each.degenerate for each in axes]),
    )
    kls = [arm.kl_benign for arm in arms if arm.kl_benign is not None]
    return [*refused, safe, right, likely, broken, f"{sum(kls) / len(kls):.3f}" if kls else ""]


def _value(found: Interval | None) -> float | None:
    return found.value if found else None


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{100 * sum(known) / len(known):.0f}" if known else ""


def _claims_table(run: Run) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
    table.title = "what the papers claim, on this model (* p < 0.05, Bonferroni over the suites of a side)"
    for heading in ("paper", "claim", "here", "evidence"):
        table.add_column(heading, overflow="fold")
    for claim in run.claims:
        table.add_row(claim.paper, claim.claim, WORDS[claim.reproduced], claim.evidence)
    return table
