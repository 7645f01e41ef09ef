"""What `clampdown gate calibrate` says: a promise in words, how often each branch acts, how unseen wrappers will do."""

from __future__ import annotations

from rich.table import Column, Table

from clampdown.steering.plan import Gate, Guarantee
from clampdown.study.gate import DOWN, UP, Calibrated
from clampdown.types import Interval


def what_it_reads(gate: Gate) -> str:
    """A gate's kind, and where it reads."""
    return ", ".join(dict.fromkeys(f"{reader.kind} at {reader.site}" for reader in gate.readers))


def growth(gate: Gate) -> str:
    """How the strength of what is behind a gate grows with its score."""
    return f"strength: {gate.least:.0%} at the threshold, growing to all of it at a score of {gate.full:.4g}"


def promise(guarantee: Guarantee, turns: int = 0) -> str:
    """A guarantee in words. `turns` is how many turns the calibration conversations had; 0 for prompts as they are."""
    what = "prompts" if turns < 2 else "conversations"
    length = "" if turns < 2 else f" of up to {turns} turns"
    return (
        f"{guarantee.triggered} of {guarantee.n} {guarantee.on} calibration {what} trigger it: "
        f"at {guarantee.confidence:.0%} confidence at most {guarantee.bound:.2%} of such {what}{length} do "
        f"(budget {guarantee.budget:.2%})"
    )


def shown(found: Calibrated) -> Table:
    """Trigger rates by suite, harmful ones first."""
    two_sided = any(rate.otherwise for rate in found.rates)
    sides = ((DOWN, UP) if found.first == DOWN else (UP, DOWN)) if two_sided else ("fires",)
    table = Table(Column("suite", no_wrap=True), "refusing is", "n", title="validation prompts", pad_edge=False)
    for side in sides:
        table.add_column(side, no_wrap=True)
        table.add_column("95 %", no_wrap=True)
    for rate in sorted(found.rates, key=lambda rate: not rate.harmful):
        cells = [rate.suite, "right" if rate.harmful else "wrong", str(rate.edits.n)]
        for interval in (rate.edits, rate.otherwise) if two_sided else (rate.edits,):
            cells += [format(interval, ".3f"), f"{interval.low:.3f}-{interval.high:.3f}"] if interval else []
        table.add_row(*cells)
    return table


def family_lines(found: Calibrated) -> list[str]:
    """The estimate for wrappers that nobody has seen, and the truth where there is one; nothing where it was not asked
    for."""
    if found.family_out is None:
        return []
    worst = min(found.family_out.families.items(), key=lambda row: row[1].value or 0.0)
    said = [
        f"unseen wrappers, by leaving out each of {len(found.family_out.families)} families: "
        f"{_bounded(found.family_out.estimate)}; least: {worst[0]} {worst[1]:.3f}"
    ]
    truth = found.family_out.truth
    return said if truth is None else [*said, f"validation prompts in families that no fit saw: {_bounded(truth)}"]


def _bounded(interval: Interval) -> str:
    bounds = "" if interval.low is None or interval.high is None else f" [{interval.low:.3f}, {interval.high:.3f}]"
    return f"{interval:.3f}{bounds}, n = {interval.n}"
