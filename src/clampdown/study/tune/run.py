"""`clampdown tune`: the plan that refuses most harmful prompts within budgets that hold with confidence.

1. Features from a file or the default finder; gates fitted and calibrated once; combinations screened by prefills.
2. `search` goes through settings on the first validation prompts of each suite, in batches.
3. The best few are measured on validation prompts that no trial read. A plan may be chosen if the upper confidence
   bound of every budget holds there; of those, the one that refuses most (ties: see `in_order`).
4. The test split is read once: the plan, the same with its gate held open, the unsteered model, a system prompt.

Under --out: `tune.json` (what this run is), `search/` (all that a killed run goes on from), `trials.jsonl`,
`frontier.json`, `finalists.json`, `plan.toml`, and the run directory of the test split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clampdown.config import CODE_VERSION
from clampdown.errors import NotEnoughDataError
from clampdown.evaluation import controls, metrics, runner
from clampdown.evaluation.control_arms import SYSTEM_PROMPT
from clampdown.evaluation.intervals import wilson
from clampdown.results.run import Run
from clampdown.steering import units
from clampdown.steering.arms import BASELINE, Arm
from clampdown.steering.plan import Plan, write_plan
from clampdown.store import claim, content_hash, locked, prompts_hash, write_json
from clampdown.study.budgets import (
    BROKEN_HARMFUL,
    CAPABILITY,
    KL,
    OVER_REFUSAL,
    BenignKl,
    Budgets,
    Evidence,
    Use,
    check_provable,
    facts,
    weigh,
)
from clampdown.study.estimate import Estimate, duration, estimate
from clampdown.study.gating import trigger_rates
from clampdown.study.measure import BENIGN, Asked, measure_arms, methods_where_it_acts
from clampdown.study.methods.gated_set import at_strengths, opened, steering_up
from clampdown.study.methods.method import plan_of
from clampdown.study.progress import Stages
from clampdown.study.study import Study
from clampdown.study.sweep import read_features
from clampdown.study.tune.measuring import Bench, Finalist, Trials, changes_of, confirm
from clampdown.study.tune.prompts import FULL, PromptSets, Scale, capability, harmful, prompt_sets, prompts_of, safe
from clampdown.study.tune.search import (
    NO_GATE,
    Effort,
    Setting,
    Trial,
    TrialLog,
    finalists,
    frontier,
    search,
    trial_facts,
)
from clampdown.study.tune.space import (
    SCREENED_MULTIPLES,
    UNIT_PROMPTS,
    Choices,
    combinations_of,
    find_candidates,
)
from clampdown.types import ArmKind, Interval, Record, Split

TUNED, OPEN = "tuned", "tuned, gate held open"
ONE_ERROR = 0.8427
"""Confidence of an interval of sqrt(2) standard deviations: one standard error of a difference of two such rates."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for: budgets, what may be combined, and how much is read."""

    budgets: Budgets = field(default_factory=Budgets)
    choices: Choices = field(default_factory=Choices)
    scale: Scale = FULL


@dataclass(frozen=True, slots=True)
class Chosen:
    """What validation decided: the winner, all finalists best first, every trial."""

    winner: Finalist
    finalists: tuple[Finalist, ...]
    trials: tuple[Trial, ...]
    bench: Bench

    @property
    def plan(self) -> Plan:
        """The winner's plan with its strengths written down in every unit."""
        plan, study, sets = plan_of(self.winner.arm), self.bench.study, self.bench.sets
        shown = [p for s in (*harmful(sets.discovery), *safe(sets.discovery)) for p in s.prompts[:UNIT_PROMPTS]]
        up = opened(plan)
        if not up.edits[0].features:
            return plan
        view = study.sae.select(up.edits[0].features)
        edit = units.measured(up.edits[0], units.calibrate(study.lm, study.sae.cfg.site, view, shown))
        return at_strengths(plan, up.changed(edits=(edit, *up.edits[1:])), plan.name)


def run_tune(study: Study, request: Request, out: Path, stages: Stages) -> Run:
    """Everything, into `out`. A run of the same settings that was interrupted goes on."""
    chosen = choose_tuned(study, request, out, stages)
    plan = chosen.plan
    write_plan(out / "plan.toml", plan)
    tuned = Arm(TUNED, ArmKind.TUNED, plan, steering_up(plan)[0].strengths[0], group="tuned")
    arms = [BASELINE, tuned, controls.system_prompt_arm(SYSTEM_PROMPT)]
    if plan.gate:
        arms.insert(2, Arm(OPEN, ArmKind.FEATURE, opened(plan), tuned.strength, group="tuned"))

    def extra(records: Sequence[Record]) -> dict[str, Any]:
        return _extra(chosen, plan, records)

    asked = Asked(study.suites(Split.TEST, request.scale.test.per_suite), by_likelihood=methods_where_it_acts)
    run = measure_arms(study, arms, asked, out, request.scale.test, stages, extra)
    found = run.to_json()["tune"]
    kl = facts(_test_kl(run, request.budgets))
    return run.with_parts(tune={**found, "test": [*found["test"], kl]}).write(out)


def _test_kl(run: Run, budgets: Budgets) -> Use:
    """The tuned arm's KL on benign test prompts, its gate as it is; a mean over tokens, without a bound."""
    arm = run.arm(TUNED)
    refused = arm.rate(BENIGN)
    return Use(KL, budgets.kl, arm.kl_benign, None, refused.n if refused else 0)


def choose_tuned(study: Study, request: Request, out: Path, stages: Stages) -> Chosen:
    """Search and confirm on validation prompts; the test split is not read. For whoever runs a test of their own.

    Raises `NotEnoughDataError` when the prompts cannot prove the budgets, or no plan holds them; `StoreError` when
    `out` holds another search.
    """
    request.choices.check()
    sets = prompt_sets(study, request.scale)
    check_provable(available(sets, request), request.budgets)
    if request.choices.features_file:
        read_features(study, request.choices.features_file)  # says at once that a file is missing or of another SAE
    claim(out / "tune.json", tuning_key(study, request, sets))
    with locked(out / "search"):
        found = find_candidates(study, sets, request.scale, request.choices, out / "search", stages)
        bench = Bench(study, sets, request.scale, request.budgets, found, out / "search", stages)
        effort = Effort(request.scale.trials, request.scale.batch, study.seed)
        trials = search(found.space, Trials(bench), effort, TrialLog(out / "trials.jsonl"))
        starts = trials[: len(found.space.starts)]
        best = finalists(trials, request.scale.finalists)
        able = [start for start in starts if start.score.refusal is not None and start not in best]
        confirmed = confirm(bench, (*able, *best))
    holding = [each for each in confirmed.finalists if not each.over]
    ranked = (*in_order(holding), *in_order([each for each in confirmed.finalists if each.over]))
    write_json(out / "frontier.json", [trial_facts(trial) for trial in frontier(trials)])
    write_json(out / "finalists.json", [_finalist_facts(each) for each in ranked])
    return Chosen(_winner(ranked, confirmed.unsteered, bench), ranked, trials, bench)


def no_worse_than(starts: Sequence[Setting], found: Sequence[Finalist]) -> list[Finalist]:
    """Those that refuse no fewer fresh prompts than what the search began with: it cannot end worse than there."""
    least = max((each.refusal for each in found if each.trial.setting in starts), default=0.0)
    return [each for each in found if each.refusal >= least]


def in_order(found: Sequence[Finalist]) -> tuple[Finalist, ...]:
    """Best first: most refusals; among those within one standard error (of a difference) of the best, the loosest gate
    first.

    Of two thresholds of a gate the looser fires on all that the other fires on, on attacks of any kind: where refusals
    cannot tell plans apart and both are within the budgets, it is the better one. A plan that always steers comes last
    of them: what it does to every prompt is not seen in refusals. Then what uses least of the budgets.
    """
    least = _less_one_error(max(found, key=lambda each: each.refusal)) if found else 0.0

    def preference(each: Finalist) -> tuple[float, ...]:
        setting, spent = each.trial.setting, sum(use.spent for use in each.uses)
        alike = each.refusal >= least
        tie = (-(setting.budget or 0.0), spent, -each.refusal) if alike else (-each.refusal, spent, 0.0)
        return (not alike, *tie, setting.multiple, each.trial.number)

    return tuple(sorted(found, key=preference))


def _less_one_error(best: Finalist) -> float:
    """The lower end of Wilson's interval, which has a width also where all were refused."""
    n = sum(interval.n for interval in best.refusals.values())
    return wilson(round(best.refusal * n), n, ONE_ERROR).low or 0.0


def _winner(ranked: Sequence[Finalist], unsteered: Mapping[str, Interval], bench: Bench) -> Finalist:
    holding = [each for each in ranked if not each.over]
    if not holding:
        nearest = min(ranked, key=lambda each: max(_excess(use) for use in each.uses))
        beyond = [use for use in nearest.uses if not use.holds]
        raise NotEnoughDataError(
            f"none of {len(ranked)} finalists holds every budget at {bench.budgets.confidence:.0%} confidence; the "
            f"nearest, {nearest.trial.setting}, does not hold " + ", ".join(map(_shortfall, beyond)),
            hint="larger budgets, more --trials, other --features or --gates; every trial is in trials.jsonl",
        )
    before = metrics.mean_of(unsteered.values()) or 0.0
    gaining = [each for each in holding if each.refusal > before]
    if not gaining:
        raise NotEnoughDataError(
            f"no plan within the budgets refuses more harmful prompts than the unsteered model ({before:.2f})",
            hint="larger budgets, more --trials, other --features or --gates; every trial is in trials.jsonl",
        )
    return no_worse_than(bench.candidates.space.starts, gaining)[0]


def _excess(use: Use) -> float:
    return float("inf") if use.bound is None else use.bound / use.limit


def _shortfall(use: Use) -> str:
    bound = "no bound" if use.bound is None else f"{use.bound:.3g}"
    return f"{use.budget} ({bound} > {use.limit:g}, n = {use.n})"


def available(sets: PromptSets, request: Request) -> dict[str, int]:
    """The most fresh prompts that a plan can be compared on, by budget: all where gates are searched, else those that
    are generated."""
    most = request.scale.generated if set(request.choices.gates) == {NO_GATE} else request.scale.fresh
    counts = {
        OVER_REFUSAL: [len(suite.prompts[:most]) for suite in safe(sets.fresh)],
        CAPABILITY: [len(suite.prompts[:most]) for suite in capability(sets.fresh)],
        BROKEN_HARMFUL: [len(suite.prompts) for suite in harmful(sets.fresh)],
    }
    return {name: sum(each) for name, each in counts.items()}


def tuning_key(study: Study, request: Request, sets: PromptSets) -> dict[str, Any]:
    """Everything that could change a trial, or the choice."""
    file = request.choices.features_file
    parts = {"discovery": sets.discovery, "calibration": (sets.calibration,), "trial": sets.trial, "fresh": sets.fresh}
    return {
        "code": CODE_VERSION,
        "model": runner.model_key(study.lm),
        "saes": [{"name": sae.name, "revision": sae.revision, "site": sae.cfg.site.name} for sae in study.saes],
        "judge": study.judge_name,
        "seed": study.seed,
        "prompts": {name: prompts_hash(prompts_of(suites)) for name, suites in parts.items()},
        "budgets": request.budgets,
        "choices": {name: getattr(request.choices, name) for name in Choices.__slots__ if name != "features_file"},
        "features": None if file is None else content_hash(file.read_text(encoding="utf-8")),
        "scale": request.scale,
    }


def _finalist_facts(each: Finalist) -> dict[str, Any]:
    return {
        "trial": each.trial.number,
        "setting": str(each.trial.setting),
        "refusal": each.refusal,
        "refusals": each.refusals,
        "budgets": [facts(use) for use in each.uses],
        "turned_away_by": list(each.over),
    }


def binding(chosen: Chosen) -> dict[str, int]:
    """By budget, how many plans that refuse more than the winner it kept out: finalists by their bounds, and trials by
    their estimates that beat the winner's own trial."""
    counts: Counter[str] = Counter()
    for each in chosen.finalists:
        if each.refusal > chosen.winner.refusal:
            counts.update(each.over)
    mine = chosen.winner.trial.score.refusal or 0.0
    for trial in chosen.trials:
        if (trial.score.refusal or 0.0) > mine:
            counts.update(trial.score.over)
    return dict(counts)


def unchecked(winner: Finalist, budgets: Budgets) -> list[str]:
    """Budgets of which nothing is known, because no fresh prompt counts for them: they kept no plan out."""
    weighed = {use.budget for use in winner.uses}
    return [name for name in budgets.limits if name not in weighed]


def _extra(chosen: Chosen, plan: Plan, records: Sequence[Record]) -> dict[str, Any]:
    """Further keys of the summary: the choice, the gate, and the budgets on validation and test prompts."""
    edit, setting, bench = steering_up(plan)[0], chosen.winner.trial.setting, chosen.bench
    gate = plan.otherwise.gate if plan.otherwise else plan.gate
    found: dict[str, Any] = {
        "chosen": {
            "arm": OPEN if plan.gate else TUNED,
            "feature": " + ".join(map(str, edit.features)) or setting.combination.what,
            "strength": edit.strengths[0],
            "strength_note": units.other_units(edit),
            "operator": edit.operator,
            "rule": "most refusals of harmful suites among plans whose budgets hold by their upper bounds; within one "
            "standard error, the loosest gate",
        },
        "strength_unit": "raw activation",
        "screening": bench.candidates.screening,
        "tune": {
            "setting": str(setting),
            "trials": len(chosen.trials),
            "confidence": bench.budgets.confidence,
            "validation": _finalist_facts(chosen.winner),
            "finalists": [_finalist_facts(each) for each in chosen.finalists],
            "frontier": [trial_facts(trial) for trial in frontier(chosen.trials)],
            "binding": binding(chosen),
            "unchecked": unchecked(chosen.winner, bench.budgets),
            "test": [facts(use) for use in test_uses(bench, records)],
        },
    }
    if gate and gate.guarantee:
        promise = gate.guarantee
        found["gate"] = {
            "kind": gate.kind,
            "features": gate.features,
            "threshold": gate.threshold,
            "budget": promise.budget,
            "confidence": promise.confidence,
            "n_calibration": promise.n,
            "bound": promise.bound,
            "calibrated_on": bench.sets.benign,
            "trigger_rates": trigger_rates(TUNED, records),
        }
    return found


def test_uses(bench: Bench, records: Sequence[Record]) -> tuple[Use, ...]:
    """The budgets on the test split, from what was generated there alone; KL is added when it was measured."""
    suites = bench.study.suites(Split.TEST, bench.scale.test.per_suite)
    found = changes_of(metrics.by_arm_and_suite(records), TUNED, suites)
    uses = weigh(Evidence(found, BenignKl(())), bench.budgets)
    return tuple(use for use in uses if use.n)


def dry_run(study: Study, request: Request, stages: Stages) -> tuple[str, ...]:
    """What a run would do and cost, in lines. Nothing is written; a few replies are timed."""
    request.choices.check()
    scale, sets = request.scale, prompt_sets(study, request.scale)
    check_provable(available(sets, request), request.budgets)
    features = tuple(range(scale.features))
    cones = len(request.choices.directions) * len(request.choices.scopes)
    screened = (len(combinations_of(features, request.choices)) + cones) * len(SCREENED_MULTIPLES)
    per_arm, batches = len(prompts_of(sets.trial)), -(-scale.trials // scale.batch)
    fresh = len(prompts_of(harmful(sets.fresh))) + sum(
        len(suite.prompts[: scale.generated]) for suite in (*safe(sets.fresh), *capability(sets.fresh))
    )
    test = len(prompts_of(study.suites(Split.TEST, scale.test.per_suite)))
    replies = (scale.trials + batches) * per_arm + (scale.finalists + 1) * fresh + 4 * test
    with stages.stage("Timing a few replies"):
        timed = _timed(study, sets, scale)
    seconds = (timed.seconds or 0.0) / max(1, timed.rows) * replies
    return (
        f"screening: at most {screened} candidates on at most "
        f"{sum(min(len(s.prompts), scale.screened) for s in harmful(sets.trial))} harmful and as many benign prompts",
        f"search: {scale.trials} trials in {batches} batches, each on {per_arm} validation prompts",
        f"finalists: {scale.finalists} on {fresh} validation prompts that no trial reads; gates are read on "
        f"{sum(len(s.prompts) for s in (*safe(sets.fresh), *capability(sets.fresh)))}",
        f"test: 4 arms on {test} prompts, once",
        f"{replies:,} replies at most, at most about {duration(seconds)} of generation; fewer behind gates",
    )


def _timed(study: Study, sets: PromptSets, scale: Scale) -> Estimate:
    settings = runner.Settings(max_new_tokens=scale.test.max_new_tokens, batch_rows=scale.test.batch_rows)
    job = runner.Job((BASELINE,), sets.trial, study.judge, study.judge_name, settings)
    return estimate(study.lm, study.saes, job)
