"""The gate's operating curve: how often it would fire at any other threshold, and what its own was promised.

A gate fires when its score exceeds the threshold, so the share of a suite's prompts above t, for every t, is the whole
curve, and the scores of the run's own prompts give it. The guarantee was made on calibration prompts at one threshold:
it is a point, at the threshold that it holds for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from clampdown.reports.comparison import Headline
from clampdown.reports.figures import SERIES_DASHES, SERIES_SYMBOLS, Figure
from clampdown.reports.wording import full, number, percent, suite_title
from clampdown.results.points import Sides
from clampdown.results.rows import ArmResult, GateRow
from clampdown.results.run import Run
from clampdown.types import BRANCHES, Interval

Spec = dict[str, Any]
PLACES = 120
CAPABILITY = "capability prompts"


@dataclass(frozen=True, slots=True)
class Curve:
    """One suite, or all capability suites, and how it is drawn. `scores` are sorted, lowest first."""

    name: str
    scores: tuple[float, ...]
    colour: str
    symbol: str
    dash: str
    width: float

    def share_above(self, threshold: float) -> float:
        """The share of the scores that exceed a threshold: how often the gate would fire there."""
        return (len(self.scores) - bisect_right(self.scores, threshold)) / len(self.scores)


@dataclass(frozen=True, slots=True)
class ArmGate:
    """A gate of one of the headline arms. `arm` is None for a gate that only the summary describes."""

    arm: ArmResult | None
    gate: GateRow

    @property
    def title(self) -> str:
        which = "The gate" if self.gate.branch == BRANCHES[0] else "The second gate"
        return which if self.arm is None else f"{which} of “{self.arm.name}”"

    @property
    def rates(self) -> dict[str, Interval]:
        """How often it fires by suite: its scores above its threshold, else what the run or its receipts say."""
        if not self.gate.scores or self.gate.threshold is None:
            return dict(self.gate.trigger_rates) or (dict(self.arm.gate_fired) if self.arm else {})
        threshold = self.gate.threshold
        return {
            suite: Interval.of_rate(len(scores) - bisect_right(scores, threshold), len(scores))
            for suite, scores in self.gate.scores.items()
            if scores
        }


def gates_of(run: Run, found: Headline) -> tuple[ArmGate, ...]:
    """Every gate of the tuned and the conditional arm; for runs that keep none with their arms, the summary's."""
    arms = [arm for arm in (found.tuned, found.gated) if arm is not None]
    gates = tuple(ArmGate(arm, gate) for arm in arms for gate in arm.gates)
    if gates or run.gate is None:
        return gates
    return (ArmGate(arms[0] if len(arms) == 1 else None, run.gate),)


def operating_figure(found: ArmGate, sides: Sides, index: int) -> Figure | None:
    """The curve of one gate; None when its scores are not known."""
    if not found.gate.scores:
        return None
    caption = "share of test prompts above each threshold; left of the dotted line more would fire, right of it fewer"
    return Figure(f"gate-operating-{index}", f"{found.title} at any threshold", caption, _spec(found.gate, sides))


def curves(gate: GateRow, sides: Sides) -> list[Curve]:
    """Harmful suites and safe suites each by themselves, in the figures' series; what the guarantee speaks of in the
    guarantee's colour; capability suites as one, because they are all alike to a gate."""
    found = []
    for index, suite in enumerate((*sides.harmful, *sides.answerable)):
        series, promised = index % len(SERIES_SYMBOLS), suite == gate.promise.on
        colour = "@gated" if promised else f"@s{series + 1}"
        dash = "solid" if promised else SERIES_DASHES[series]
        width = 2.4 if promised or suite in sides.harmful else 1.6
        scores = gate.scores.get(suite, ())
        found.append(Curve(suite_title(suite), scores, colour, SERIES_SYMBOLS[series], dash, width))
    pooled = tuple(sorted(score for suite in sides.capability for score in gate.scores.get(suite, ())))
    found.append(Curve(CAPABILITY, pooled, "@control", "cross", "dot", 1.6))
    return [curve for curve in found if curve.scores]


def _spec(gate: GateRow, sides: Sides) -> Spec:
    shown = curves(gate, sides)
    low, high = _extent(shown, gate.threshold)
    places = [low + (high - low) * i / PLACES for i in range(PLACES + 1)]
    traces = [_trace(curve, places) for curve in shown]
    layout: Spec = {
        "xaxis": {"title": {"text": "threshold (the gate's score)"}, "range": [low, high]},
        "yaxis": {"range": [-0.03, 1.08], "tickformat": ".0%", "dtick": 0.25, "title": {"text": "prompts above it"}},
        "shapes": [], "annotations": [],
    }  # fmt: skip
    if gate.threshold is not None:
        traces += _promise(gate, gate.threshold)
        layout["shapes"] = _lines(gate, gate.threshold)
        layout["annotations"] = _words(gate, gate.threshold, low, high)
    return {"data": traces, "layout": layout}


def _extent(shown: Sequence[Curve], threshold: float | None) -> tuple[float, float]:
    """From where most safe prompts would fire to where few harmful ones do: the tails of both are cut."""
    everything = sorted(score for curve in shown for score in curve.scores)
    low, high = everything[len(everything) // 50], everything[-1 - len(everything) // 50]
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    pad = 0.04 * (high - low) or 1.0
    return low - pad, high + pad


def _trace(curve: Curve, places: Sequence[float]) -> Spec:
    rates, n = [curve.share_above(place) for place in places], len(curve.scores)
    return {
        "x": list(places), "y": rates, "name": escape(curve.name), "mode": "lines+markers",
        "customdata": [full(Interval.of_rate(round(rate * n), n)) for rate in rates],
        "line": {"color": curve.colour, "width": curve.width, "dash": curve.dash},
        "marker": {"color": curve.colour, "symbol": curve.symbol, "size": 7, "maxdisplayed": 7,
                   "line": {"width": 1, "color": "@paper"}},
        "hovertemplate": f"<b>{escape(curve.name)}</b><br>above %{{x:.3g}}: %{{customdata}}<extra></extra>",
    }  # fmt: skip


def _promise(gate: GateRow, threshold: float) -> list[Spec]:
    """The bound, at the threshold that it was calibrated for."""
    promise = gate.promise
    if promise.bound is None:
        return []
    return [{
        "x": [threshold], "y": [promise.bound], "mode": "markers",
        "name": f"guaranteed on {escape(promise.on)} prompts",
        "marker": {"symbol": "triangle-down", "size": 13, "color": "@gated", "line": {"width": 1, "color": "@paper"}},
        "hovertemplate": f"<b>guarantee</b><br>{escape(guarantee(gate))}<extra></extra>",
    }]  # fmt: skip


def guarantee(gate: GateRow) -> str:
    """The promise in few words; empty without one."""
    promise = gate.promise
    if promise.bound is None or promise.confidence is None:
        return ""
    text = (
        f"at most {percent(promise.bound, digits=2)} of {promise.on} prompts, {percent(promise.confidence)} confidence"
    )
    return text if promise.n is None else f"{text}, n = {promise.n}"


def _lines(gate: GateRow, threshold: float) -> list[Spec]:
    promise = gate.promise
    chosen = {"type": "line", "x0": threshold, "x1": threshold, "y0": 0, "y1": 1, "yref": "paper", "layer": "below",
              "line": {"color": "@ink-soft", "width": 1, "dash": "dot"}}  # fmt: skip
    if promise.budget is None:
        return [chosen]
    allowed = promise.budget
    budget = {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": allowed, "y1": allowed, "layer": "below",
              "line": {"color": "@gated", "width": 1, "dash": "dash"}}  # fmt: skip
    return [chosen, budget]


def _words(gate: GateRow, threshold: float, low: float, high: float) -> list[Spec]:
    """What stands at the two lines. The budget's word is at the left, where the curves are high."""
    promise = gate.promise
    left = threshold < (low + high) / 2
    at = {"x": threshold, "y": 1, "yref": "paper", "yanchor": "bottom", "xanchor": "left" if left else "right",
          "text": f"threshold {number(threshold)}", "showarrow": False,
          "font": {"size": 11, "color": "@ink-soft"}}  # fmt: skip
    if promise.budget is None:
        return [at]
    share = percent(promise.budget, digits=0 if promise.budget >= 0.01 else 2)
    budget = {"x": 0, "xref": "paper", "xanchor": "left", "y": promise.budget, "yanchor": "bottom", "showarrow": False,
              "text": f"{escape(promise.on)} budget {share}",
              "font": {"size": 11, "color": "@gated"}}  # fmt: skip
    return [at, budget]
