"""Which features help a plan most: candidates clamped beside its own features, one added per round.

A refusal feature says what to do; on prompts that the model does not take for harmful it has to be pushed far, and
some replies break instead of turning. Clamped together with a feature that detects harm, less is needed of each. The
search is greedy and causal: every candidate is clamped beside the set so far, and the one that raises the refusal
log-odds most joins it. It costs one prefill per candidate, prompt and round; the blocks below the site are shared
(`screening.py`). What a set costs on benign prompts is not asked here: it is meant for a plan behind a gate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clampdown.discovery.causal import Measure
from clampdown.errors import NotEnoughDataError
from clampdown.steering.plan import Edit, Plan

FINALISTS = 32
"""After the first round only the best go on: what helps least alone does not come to help most in company."""


@dataclass(frozen=True, slots=True)
class Partner:
    """A feature, the value it is clamped to, and the refusal log-odds (nats) of the set that ends with it."""

    feature: int
    strength: float
    log_odds: float


def with_partners(plan: Plan, clamps: Mapping[int, float]) -> Plan:
    """The plan with further features clamped in its first edit, which must be a clamp.

    Raises `NotEnoughDataError` for a plan whose first edit is none.
    """
    first = plan.edits[0]
    if first.operator != "clamp":
        raise NotEnoughDataError(f"partners are found for a clamp, this plan's first edit is '{first.operator}'")
    grown = Edit(
        site=first.site,
        operator="clamp",
        features=(*first.features, *clamps),
        strengths=(*first.strengths, *clamps.values()),
        scope=first.scope,
        error_term=first.error_term,
        correction=first.correction,
    )
    return plan.changed(edits=(grown, *plan.edits[1:]))


def partners(plan: Plan, units: Mapping[int, float], measure: Measure, n: int) -> tuple[Partner, ...]:
    """At most `n` features to clamp beside the plan's own, in the order in which they join.

    `units` is what to clamp each candidate to (raw activation); `measure` gives the refusal log-odds under plans. A
    round that brings nothing ends the search.
    """
    open_ones = [f for f, unit in units.items() if unit > 0 and f not in plan.edits[0].features]
    found: list[Partner] = []
    best = float(measure([plan])[0])
    while open_ones and len(found) < n:
        gains = _measured(plan, open_ones, units, measure)
        order = np.argsort(-gains, kind="stable")
        winner = open_ones[order[0]]
        if gains[order[0]] <= best:
            break
        best = float(gains[order[0]])
        found.append(Partner(winner, units[winner], best))
        plan = with_partners(plan, {winner: units[winner]})
        open_ones = [open_ones[i] for i in order[1:FINALISTS]]
    return tuple(found)


def _measured(plan: Plan, features: Sequence[int], units: Mapping[int, float], measure: Measure) -> np.ndarray:
    return np.array(measure([with_partners(plan, {f: units[f]}) for f in features]), dtype=float)
