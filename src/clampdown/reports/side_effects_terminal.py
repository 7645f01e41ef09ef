"""What else moved, for a terminal of 80 columns: a table per plan and aspect, then what was not measured and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from clampdown.results.side_effects import Effect, Mark, SideEffects, Unit

COLUMNS = (("measure", 22), ("n", 3), ("before", 6), ("after", 5), ("change [95 %]", 20), ("p", 5), ("", 12))
STYLES = {Mark.MOVED: "bold yellow", Mark.HELD: "green", Mark.SAME: "green", Mark.UNCLEAR: "dim"}


def side_effects_summary(found: SideEffects) -> RenderableType:
    """Every plan's table and sentence."""
    parts: list[RenderableType] = []
    for arm in found.arms:
        fired = "" if arm.fired is None else f", its gate fired on {arm.fired:.2f} of {arm.fired.n} replies"
        parts += [Text(f"{arm.name}{fired}", style="bold"), *_tables(found, arm.name), Text("")]
        parts += [_missing(found, arm.name), Text(found.sentence(arm.name)), Text("")]
    parts.append(Text(legend(found.margin), style="dim"))
    return Group(*parts)


def legend(margin: float) -> str:
    """What the marks mean."""
    return (
        "moved: p at most 0.05 after Holm's correction over all measures of the plan; ! for the worse. did not move: "
        f"the 95 % interval lies within {margin:g} of the baseline (for tokens and nats, within that part of it). "
        "same: no item differed. unclear: more items would be needed."
    )


def _tables(found: SideEffects, arm: str) -> Iterator[RenderableType]:
    """A table per aspect under its name, their columns one below the other."""
    for i, (title, rows) in enumerate(groupby(found.of(arm), lambda effect: f"{effect.kind}: {effect.aspect}")):
        yield Text(title, style="italic")
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_header=i == 0)
        for name, width in COLUMNS:
            table.add_column(name, width=width, justify="left" if name in ("measure", "") else "right")
        for effect in rows:
            table.add_row(*_cells(effect))
        yield table


def _cells(effect: Effect) -> tuple[Text | str, ...]:
    mark = Text(effect.mark.value + ("!" if effect.worsened else ""), style=STYLES[effect.mark])
    return (
        effect.measure, str(effect.difference.n), number(effect, effect.baseline.value),
        number(effect, effect.steered.value), difference(effect), p_value(effect.p_holm), mark,
    )  # fmt: skip


def number(effect: Effect, value: float | None) -> str:
    """A value with as many digits as its unit deserves."""
    if value is None:
        return "n/a"
    return f"{value:.1f}" if effect.unit is Unit.TOKENS else f"{value:.2f}"


def difference(effect: Effect) -> str:
    """The difference with its bounds."""
    found = effect.difference
    if effect.unit is not Unit.TOKENS or found.value is None:
        return found.signed
    bounds = "" if found.low is None or found.high is None else f" [{found.low:+.1f}, {found.high:+.1f}]"
    return f"{found.value:+.1f}{bounds}"


def p_value(p: float | None) -> str:
    """An adjusted p-value in few characters."""
    return "" if p is None else "<.001" if p < 0.001 else f"{p:.3f}"[1:] if p < 1 else "1"


def _missing(found: SideEffects, arm: str) -> RenderableType:
    """What was not measured, by reason."""
    by_reason: defaultdict[str, list[str]] = defaultdict(list)
    for row in found.missing(arm):
        by_reason[row.why].append(row.aspect)
    lines = [f"not measured: {', '.join(dict.fromkeys(names))} ({why})" for why, names in by_reason.items()]
    return Text("\n".join(lines), style="magenta")
