"""The frontier: what every arm buys and what it costs, from records to a `Run`.

1. Records are grouped by arm and suite; every rate carries its Wilson interval and n (`evaluation.metrics`).
2. An arm's place on the frontier is its mean refusal of harmful suites against its mean capability, each suite
   weighing the same. An arm is on the front when no other arm is at least as good on both and better on one.
3. Beside its summary lie the arms' plans, `plans/DIGEST.toml`: a row's `plan` is the digest, so every point can be
   steered with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clampdown.evaluation import metrics
from clampdown.evaluation.intervals import mcnemar, paired_difference, wilson
from clampdown.evaluation.utility import Cost, option_accuracy
from clampdown.results.run import SCHEMA, Run
from clampdown.steering.arms import Arm
from clampdown.steering.plan import Plan, write_plan
from clampdown.store import to_jsonable
from clampdown.types import BRANCHES, ArmKind, Interval, OptionChoice, Provenance, Record, Suite, SuiteKind, Verdict

BySuite = Mapping[str, tuple[Record, ...]]


@dataclass(frozen=True, slots=True)
class Axes:
    """An arm in the coordinates people decide by: means over suites of one side, None without data.

    `refusal` and `degenerate` are over harmful suites, `over_refusal` over harmless safety suites,
    `capability` is the mean accuracy over capability suites.
    """

    refusal: float | None
    over_refusal: float | None
    degenerate: float | None
    capability: float | None


def axes(by_suite: BySuite, suites: Sequence[Suite]) -> Axes:
    """Where one arm's records put it. A suite without scored records makes its mean None, never a guess."""
    harmful = [s.name for s in suites if s.kind is SuiteKind.SAFETY and s.harmful]
    harmless = [s.name for s in suites if s.kind is SuiteKind.SAFETY and not s.harmful]
    capability = [s.name for s in suites if s.kind is SuiteKind.CAPABILITY]

    def mean_rate(names: list[str], verdict: Verdict) -> float | None:
        return metrics.mean_of(metrics.rates(by_suite.get(name, ()))[verdict] for name in names)

    return Axes(
        refusal=mean_rate(harmful, Verdict.REFUSED),
        over_refusal=mean_rate(harmless, Verdict.REFUSED),
        degenerate=mean_rate(harmful, Verdict.DEGENERATE),
        capability=metrics.mean_of(metrics.accuracy(by_suite.get(name, ())) for name in capability),
    )


def pareto(points: Sequence[Axes]) -> tuple[bool, ...]:
    """Which points no other point dominates (refusal and capability, more is better). Unknown is never on the front."""
    known = [(p.refusal, p.capability) for p in points]

    def dominated(point: tuple[float | None, float | None]) -> bool:
        a, b = point
        if a is None or b is None:
            return True
        return any(x is not None and y is not None and x >= a and y >= b and (x > a or y > b) for x, y in known)

    return tuple(not dominated(point) for point in known)


@dataclass(frozen=True, slots=True)
class Experiment:
    """What a summary is about: the columns, the rows, and what was measured beside the records."""

    arms: tuple[Arm, ...]
    suites: tuple[Suite, ...]
    provenance: Provenance
    costs: Mapping[str, Cost]
    timings: Mapping[str, float]
    choices: tuple[OptionChoice, ...] = ()


def summarise(experiment: Experiment, records: Iterable[Record], extra: Mapping[str, Any] | None = None) -> Run:
    """The run that these records make. `extra` gives further parts (what was chosen, by which rule, ...)."""
    every = tuple(records)
    grouped = metrics.by_arm_and_suite(every)
    points = [axes(grouped.get(arm.name, {}), experiment.suites) for arm in experiment.arms]
    rows = [
        _row(experiment, arm, grouped, {**to_jsonable(point), "pareto": on_front})
        for arm, point, on_front in zip(experiment.arms, points, pareto(points), strict=True)
    ]
    suites = experiment.suites
    found = {
        "schema": SCHEMA,
        "model": experiment.provenance.model,
        "sae": experiment.provenance.sae,
        "suites": [{"name": s.name, "kind": s.kind, "harmful": s.harmful, "n": len(s.prompts)} for s in suites],
        "harmful_suites": [s.name for s in suites if s.kind is SuiteKind.SAFETY and s.harmful],
        "arms": rows,
        "timings": dict(experiment.timings),
        "provenance": experiment.provenance,
        **(extra or {}),
    }
    return Run.parse(to_jsonable(found)).holding(every)


def _row(
    experiment: Experiment, arm: Arm, grouped: Mapping[str, BySuite], frontier: Mapping[str, Any]
) -> dict[str, Any]:
    """One arm's row."""
    by_suite = grouped.get(arm.name, {})
    baseline = next((each.name for each in experiment.arms if each.kind is ArmKind.BASELINE), "")
    by_likelihood = option_accuracy(experiment.choices)
    return {
        **_identity(arm),
        **_rates(by_suite, experiment.suites),
        "capability_by_likelihood": by_likelihood.get(arm.name, {}),
        **_costs(experiment.costs.get(arm.name)),
        "frontier": frontier,
        "gate_fired": _gate_fired(by_suite),
        "gates": _gates(arm.plan, by_suite),
        "against_baseline": _against(grouped.get(baseline, {}), by_suite),
        "likelihood_against_baseline": _likelier(experiment.choices, baseline, arm.name),
    }


def _identity(arm: Arm) -> dict[str, Any]:
    """What the arm is: enough to draw and to find its plan again."""
    edits = arm.plan.edits if arm.plan else ()
    return {
        "name": arm.name,
        "kind": arm.kind.value,
        "group": arm.group or None,
        "strength": arm.strength,
        "features": [feature for edit in edits for feature in edit.features] or None,
        "operator": " + ".join(dict.fromkeys(edit.operator for edit in edits)) or None,
        "plan": arm.plan.digest if arm.plan else None,
        "system_prompt": arm.system_prompt,
        "edits": [
            {"site": e.site, "operator": e.operator, "scope": e.scope, "features": e.features, "strengths": e.strengths}
            for e in edits
        ],
    }


def _gates(plan: Plan | None, by_suite: BySuite) -> list[dict[str, Any]]:
    """Each gate of a plan: what it reads, where it fires, what was promised, and what it scored by suite."""
    gates = zip(BRANCHES, plan.gates if plan else (), strict=False)
    return [
        {
            "branch": branch,
            "kind": gate.kind,
            "site": gate.site or None,
            "features": list(gate.features) or None,
            "threshold": gate.threshold,
            "guarantee": gate.guarantee.model_dump(mode="json") if gate.guarantee else None,
            "scores": _scores(branch, by_suite),
        }
        for branch, gate in gates
    ]


def _scores(branch: str, by_suite: BySuite) -> dict[str, list[float]]:
    """By suite, what a branch's gate scored, lowest first: how it would have fired at any other threshold."""
    scores = {
        name: [
            r.receipt.gate_score if branch == BRANCHES[0] else r.receipt.otherwise_score for r in records if r.receipt
        ]
        for name, records in by_suite.items()
    }
    known = {name: [score for score in found if score is not None] for name, found in scores.items()}
    return {name: sorted(float(f"{score:.5g}") for score in found) for name, found in known.items() if found}


def _rates(by_suite: BySuite, suites: Sequence[Suite]) -> dict[str, Any]:
    verdicts = {suite.name: _verdicts(by_suite.get(suite.name, ())) for suite in suites}
    safety = [suite.name for suite in suites if suite.kind is SuiteKind.SAFETY]
    capability = [suite.name for suite in suites if suite.kind is SuiteKind.CAPABILITY]
    return {
        "suites": {name: verdicts[name] for name in safety},
        "capability": {name: to_jsonable(metrics.accuracy(by_suite.get(name, ()))) for name in capability},
        "refused_capability": {name: verdicts[name]["refused"] for name in capability},
        "degenerate_capability": {name: verdicts[name]["degenerate"] for name in capability},
        "attack_success": {
            suite.name: to_jsonable(metrics.attack_success(by_suite.get(suite.name, ())))
            for suite in suites
            if suite.kind is SuiteKind.SAFETY and suite.harmful
        },
        "selective_refusal": to_jsonable(_selective(by_suite, suites)),
        "categories": {suite.name: _categories(by_suite.get(suite.name, ())) for suite in suites},
        "reply_tokens": {suite.name: _mean_tokens(by_suite.get(suite.name, ())) for suite in suites},
    }


def _selective(by_suite: BySuite, suites: Sequence[Suite]) -> Interval:
    """Refusal of all harmful prompts minus refusal of all harmless safety prompts."""
    safety = [suite for suite in suites if suite.kind is SuiteKind.SAFETY]
    harmful = [record for suite in safety if suite.harmful for record in by_suite.get(suite.name, ())]
    benign = [record for suite in safety if not suite.harmful for record in by_suite.get(suite.name, ())]
    return metrics.selective_refusal(harmful, benign)


def _categories(records: Sequence[Record]) -> dict[str, Any]:
    """By category: share refused, and share right where there is a right answer; None below the minimum n."""
    return {
        name: {
            "refused": to_jsonable(metrics.enough(metrics.share(rows, metrics.refused))),
            "correct": to_jsonable(metrics.enough(metrics.accuracy(rows))),
        }
        for name, rows in metrics.by_category(records).items()
    }


def _verdicts(records: Iterable[Record]) -> dict[str, Any]:
    return {verdict.value: to_jsonable(interval) for verdict, interval in metrics.rates(records).items()}


def _mean_tokens(records: Sequence[Record]) -> float | None:
    return sum(record.n_tokens for record in records) / len(records) if records else None


def _costs(cost: Cost | None) -> dict[str, Any]:
    """Measures on benign text: nats per token, share of equal top-1 tokens, mean ||x'-x||/||x||."""
    return {
        "kl_benign": cost.kl if cost else None,
        "perplexity_benign": cost.perplexity if cost else None,
        "top1_agreement": cost.top1_agreement if cost else None,
        "edit_norm": cost.edit_norm if cost else None,
        "touched": cost.touched if cost else None,
    }


def _gate_fired(by_suite: BySuite) -> dict[str, Any]:
    """By suite, the share of prompts whose gate fired; empty for arms without a gate."""
    fired = {
        name: [r.receipt.gate_fired for r in records if r.receipt and r.receipt.gate_fired is not None]
        for name, records in by_suite.items()
    }
    return {name: to_jsonable(wilson(sum(flags), len(flags))) for name, flags in fired.items() if flags}


def _against(baseline: BySuite, by_suite: BySuite) -> dict[str, Any]:
    """Paired with the baseline by suite: prompts gained and lost (refusals; right answers) and McNemar's p."""
    return {name: _paired(baseline[name], rows) for name, rows in by_suite.items() if name in baseline}


def _paired(before: Sequence[Record], after: Sequence[Record]) -> dict[str, Any]:
    exact = any(metrics.correct(record) is not None for record in before)
    found = metrics.compare(before, after, metrics.correct if exact else metrics.refused)
    broken = metrics.compare(before, after, metrics.degenerate)
    return {
        "outcome": "correct" if exact else "refused",
        **_difference(found.difference, found.gained, found.lost),
        "p_value": found.p_value,
        "degenerate": broken.difference,
    }


def _difference(found: Interval, gained: int, lost: int) -> dict[str, Any]:
    return {
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "gained": gained,
        "lost": lost,
        "n": found.n,
    }


def _likelier(choices: Sequence[OptionChoice], baseline: str, name: str) -> dict[str, Any]:
    """By suite, items whose likeliest option became right or wrong against the baseline's."""
    before = {(c.suite, c.prompt_id): c.correct for c in choices if c.arm == baseline}
    pairs: defaultdict[str, list[int]] = defaultdict(list)
    for choice in choices:
        known = before.get((choice.suite, choice.prompt_id))
        if choice.arm == name and known is not None:
            pairs[choice.suite].append(choice.correct - known)
    counts = {suite: (each.count(1), each.count(-1), len(each)) for suite, each in pairs.items()}
    return {
        suite: {
            "outcome": "correct",
            **_difference(paired_difference(gained, lost, n), gained, lost),
            "p_value": mcnemar(gained, lost),
        }
        for suite, (gained, lost, n) in counts.items()
    }


def write_plans(directory: Path, arms: Sequence[Arm]) -> None:
    """Each arm's plan under its digest; arms that do the same share a file."""
    for arm in arms:
        if arm.plan is not None:
            write_plan(directory / "plans" / f"{arm.plan.digest}.toml", arm.plan)
