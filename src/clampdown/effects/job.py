"""`clampdown side-effects PLAN...`: what else a plan moved, beside the unsteered model on the same prompts.

The run directory holds the same resumable logs as any run (`replies.jsonl`, `records.jsonl`, `choices.jsonl`, a
manifest), `prompts.jsonl`, `summary.json` and `side-effects.html`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clampdown.config import CODE_VERSION
from clampdown.effects.aspect import Absent, Aspect, Kind, Way
from clampdown.effects.difference import Answers, effects_of
from clampdown.effects.style import first_word
from clampdown.effects.table import Sources, aspects_for
from clampdown.errors import PlanError
from clampdown.evaluation import runner
from clampdown.evaluation.intervals import wilson
from clampdown.evaluation.judges.interface import NamedJudge
from clampdown.evaluation.suites import write_suites
from clampdown.evaluation.utility import steers_generated
from clampdown.models.loading import LanguageModel
from clampdown.models.placing import Placing
from clampdown.reports.side_effects_page import PAGE, write_side_effects_page
from clampdown.results.side_effects import MARGIN, Effect, NotMeasured, SideEffects, Steered
from clampdown.saes.sae import Sae
from clampdown.steering.arms import BASELINE, Arm
from clampdown.steering.plan import Plan
from clampdown.store import RecordLog, key_of, prompts_hash
from clampdown.study.evaluate import read_plans
from clampdown.study.loading import load_for
from clampdown.study.methods.method import arm_of
from clampdown.study.progress import Stages
from clampdown.study.prompts import embedded_prompts
from clampdown.study.study import judge_for, knows_corpus
from clampdown.types import Suite

WHY_NO_LIKELIHOOD = "the plan steers generated tokens, and likelihoods have none"
WORDS_KEPT = 10


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for. `kinds` empty: all. `limit`: items per aspect."""

    folder: Path | None = None
    kinds: tuple[str, ...] = ()
    judge: str | None = None
    limit: int = 40
    max_new_tokens: int = 40
    batch_rows: int | None = None
    margin: float = MARGIN
    model: str | None = None
    seed: int = 0
    placing: Placing | None = None


def run_side_effects(plan_files: Sequence[Path], out: Path, request: Request, stages: Stages) -> SideEffects:
    """Write the run directory. Raises whatever does not fit together before anything runs."""
    plans = read_plans(plan_files)
    with stages.stage("Loading"):
        lm, saes = load_for(plans, request.model, request.placing)
    return side_effects(plans, lm, saes, judge_of(request.judge, lm), out, request, stages)


def judge_of(spec: str | None, lm: LanguageModel) -> NamedJudge:
    """By default the exact judge for a model of the embedded corpus, else the general one. Raises `JudgeError`."""
    return judge_for(spec, lm, embedded_prompts() if knows_corpus(lm.name, lm) else None)


def side_effects(
    plans: Sequence[Plan],
    lm: LanguageModel,
    saes: Sequence[Sae],
    judge: NamedJudge,
    out: Path,
    request: Request,
    stages: Stages,
) -> SideEffects:
    """As `run_side_effects`, on loaded things."""
    if not plans:
        raise PlanError("side effects of which plan?", hint="give a plan.toml or several")
    if not 0 <= request.margin < 1:
        raise PlanError(f"a margin of {request.margin} says nothing", hint="--margin 0.1: 10 points of a share")
    sources = Sources(request.folder, request.limit, request.seed)
    found = aspects_for(sources, request.kinds, knows_corpus=knows_corpus(lm.name, lm))
    aspects = [aspect for aspect in found if isinstance(aspect, Aspect)]
    arms = (BASELINE, *(arm_of(plan, "plan") for plan in plans))
    answers = _answered(arms, aspects, lm, saes, judge, out, request, stages)
    with stages.stage("Comparing"):
        summary = _summary(plans, arms, found, answers, lm, judge, request)
    summary.write(out)
    write_side_effects_page(out / PAGE, summary)
    return summary


def _answered(
    arms: Sequence[Arm],
    aspects: Sequence[Aspect],
    lm: LanguageModel,
    saes: Sequence[Sae],
    judge: NamedJudge,
    out: Path,
    request: Request,
    stages: Stages,
) -> Answers:
    """Every arm's answers, resumed from the directory's logs."""
    settings = runner.Settings(request.max_new_tokens, request.batch_rows)
    suites = _suites(aspects)
    whole = runner.Job(tuple(arms), suites, judge, judge.name, settings)
    out.mkdir(parents=True, exist_ok=True)
    with RecordLog(out, runner.resume_key(lm, saes, whole)) as log:
        write_suites(out / "prompts.jsonl", suites)
        written = _suites([aspect for aspect in aspects if aspect.way is Way.GENERATION])
        if written:
            with stages.stage("Replies") as tick:
                runner.answer(lm, saes, replace(whole, suites=written), log, tick)
        scored = _suites([aspect for aspect in aspects if aspect.way is Way.LIKELIHOOD])
        acting = tuple(arm for arm in arms if not steers_generated(arm))
        if scored:
            with stages.stage("Likelihoods") as tick:
                runner.score_options(lm, saes, replace(whole, suites=scored, arms=acting), log, tick)
        return Answers(
            {key_of(record): record for record in log.records},
            {key_of(choice): choice for choice in log.choices.rows},
            BASELINE.name,
        )


def _suites(aspects: Sequence[Aspect]) -> tuple[Suite, ...]:
    """Each suite once, though several aspects may read it."""
    return tuple({suite.name: suite for aspect in aspects for suite in aspect.suites.values()}.values())


def _summary(
    plans: Sequence[Plan],
    arms: Sequence[Arm],
    found: Sequence[Aspect | Absent],
    answers: Answers,
    lm: LanguageModel,
    judge: NamedJudge,
    request: Request,
) -> SideEffects:
    aspects = [aspect for aspect in found if isinstance(aspect, Aspect)]
    missing = [NotMeasured(one.kind.value, one.name, one.why) for one in found if isinstance(one, Absent)]
    effects: list[Effect] = []
    for arm in arms[1:]:
        asked = [aspect for aspect in aspects if aspect.way is Way.GENERATION or not steers_generated(arm)]
        missing += [
            NotMeasured(aspect.kind.value, aspect.label, WHY_NO_LIKELIHOOD, arm.name)
            for aspect in aspects
            if aspect not in asked
        ]
        rows, empty = effects_of(arm.name, asked, answers, request.margin, request.seed)
        effects, missing = [*effects, *rows], [*missing, *empty]
    return SideEffects(
        model=lm.name,
        revision=lm.revision,
        judge=judge.name,
        seed=request.seed,
        margin=request.margin,
        arms=tuple(_steered(plan, answers) for plan in plans),
        effects=tuple(effects),
        not_measured=tuple(missing),
        code=CODE_VERSION,
        prompts_hash=prompts_hash([prompt for suite in _suites(aspects) for prompt in suite.prompts]),
        first_words=_first_words(arms, aspects, answers),
    )


def _steered(plan: Plan, answers: Answers) -> Steered:
    """The plan, and how often its gate fired."""
    receipts = [record.receipt for record in answers.records.values() if record.arm == plan.name and record.receipt]
    fired = [receipt.gate_fired for receipt in receipts if receipt.gate_fired is not None]
    return Steered(plan.name, plan.digest, wilson(sum(fired), len(fired)) if fired else None)


def _first_words(arms: Sequence[Arm], aspects: Sequence[Aspect], answers: Answers) -> dict[str, dict[str, int]]:
    """How replies to harmless prompts begin, by arm, commonest first."""
    suites = {suite.name for aspect in aspects if aspect.kind is Kind.PERSONA for suite in aspect.suites.values()}
    words = {
        arm.name: Counter(
            first_word(r.reply) for r in answers.records.values() if r.arm == arm.name and r.suite in suites
        )
        for arm in arms
    }
    return {name: dict(counts.most_common(WORDS_KEPT)) for name, counts in words.items() if counts}
