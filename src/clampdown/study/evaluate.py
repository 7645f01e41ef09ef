"""`clampdown evaluate`: plans beside the baseline and their controls, on the suites that were asked for.

1. The model and SAEs are the ones that the plans name; plans for different models are different runs.
2. The cost is said before anything long begins; `--dry-run` says it and stops.
3. Replies, judgements and option likelihoods go to append-only logs (`evaluation.runner`), then `summary.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clampdown.config import CODE_VERSION, ORGANISM
from clampdown.discovery.contrast import ContrastSettings, collect_contrast, contrast_scores
from clampdown.discovery.directions import difference_of_means, direction_between
from clampdown.errors import PlanError, PromptSetError
from clampdown.evaluation import runner, utility
from clampdown.evaluation.catalog import load_suites
from clampdown.evaluation.condition import Condition, condition
from clampdown.evaluation.control_arms import Control, Matching, Material, control_arms
from clampdown.evaluation.controls import FeatureTable
from clampdown.evaluation.judges.interface import NamedJudge, check_not_under_test
from clampdown.evaluation.suites import read_suites, write_suites
from clampdown.models.loading import LanguageModel, load_model
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae, check_fits
from clampdown.steering.arms import BASELINE, Arm
from clampdown.steering.plan import Plan, read_plan, write_plan
from clampdown.steering.program import check_plan
from clampdown.store import RecordLog, key_of, prompts_hash
from clampdown.study.control_table import against_random
from clampdown.study.estimate import Estimate, estimate
from clampdown.study.frontier import Experiment, summarise, write_plans
from clampdown.study.judging import judge_named
from clampdown.study.progress import Stages
from clampdown.types import ArmKind, OptionChoice, Point, Prompt, Provenance, Site, Split, Suite, SuiteKind

TIMED_FROM = 500
"""Replies from which on a run is timed before it begins."""
MATCHING_TEXTS = 16
MATERIAL_PROMPTS = 240
QUANTITIES = {"edit": "mean ||x'-x|| / ||x|| on benign text", "kl": "KL on benign text, nats per token"}


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for on the command line. `likelihood` None: where every plan can act on it."""

    plans: tuple[Path, ...]
    suites: tuple[str, ...] = ()
    judge: str | None = None
    split: str = Split.TEST.value
    limit: int = 60
    model: str | None = None
    controls: bool = False
    n_random: int = 20
    match: str = "edit"
    likelihood: bool | None = None
    max_new_tokens: int = 40
    batch_rows: int | None = None
    seed: int = 0
    harmful: Path | None = None
    harmless: Path | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A job on loaded things: everything that a run needs, and the controls' table."""

    lm: LanguageModel
    saes: tuple[Sae, ...]
    job: runner.Job
    controls: tuple[Control, ...]
    benign: tuple[utility.Forced, ...]
    plans: tuple[Plan, ...]
    seed: int


def prepare(request: Request, stages: Stages) -> Evaluation:
    """Load the model, SAEs, suites and judge, and build the arms. Raises for whatever does not fit together."""
    plans = _plans(request.plans)
    with stages.stage("Loading"):
        lm, saes = _load(plans, request.model)
    suites = suites_of(request, lm.name)
    judge = judge_of(request.judge, lm)
    settings = runner.Settings(max_new_tokens=request.max_new_tokens, batch_rows=request.batch_rows)
    with stages.stage("Benign replies"):
        benign = _benign_replies(lm, suites, settings)
    controls = _controls(request, plans, lm, saes, benign, stages)
    arms = (BASELINE, *map(_arm, plans), *(control.arm for control in controls.rows if control.arm))
    job = runner.Job(arms, suites, judge, judge.name, settings)
    return Evaluation(lm, (*saes, *controls.saes), job, controls.rows, benign, plans, request.seed)


def preview(evaluation: Evaluation, out: Path) -> Estimate:
    """What is left to do in `out`, timed when it is much. Raises `StoreError` when `out` holds another run."""
    done: set[Any] = set()
    if (out / "manifest.json").exists():
        with _log(evaluation, out) as log:
            done = {*map(key_of, log.replies.rows), *map(key_of, log.records)}
    job = evaluation.job
    return estimate(evaluation.lm, evaluation.saes, job, done, timed=len(job.rows) - len(done) >= TIMED_FROM)


def run_evaluate(evaluation: Evaluation, out: Path, request: Request, stages: Stages) -> dict[str, Any]:
    """Write the run directory; returns the summary."""
    lm, saes, job = evaluation.lm, evaluation.saes, evaluation.job
    for plan in evaluation.plans:
        write_plan(out / (f"{plan.name}.toml" if len(evaluation.plans) > 1 else "plan.toml"), plan)
    with _log(evaluation, out) as log:
        write_suites(out / "prompts.jsonl", job.suites)
        with stages.stage(f"Answering {request.split} prompts") as tick:
            records = runner.run(lm, saes, job, log, tick)
        choices = _likelihoods(evaluation, request, log, stages)
    with stages.stage("Cost on benign text") as tick:
        costs = utility.costs(lm, saes, job.arms, evaluation.benign, progress=tick) if evaluation.benign else {}
    experiment = Experiment(job.arms, job.suites, _provenance(evaluation), costs, dict(stages.timings), choices)
    ran = summarise(experiment, records, _extra(evaluation, request))
    if evaluation.controls:
        ran = ran.with_parts(controls={**ran.controls, "against_random": against_random(ran)})
    write_plans(out, job.arms)
    return ran.write(out).to_json()


def _log(evaluation: Evaluation, out: Path) -> RecordLog:
    return RecordLog(out, runner.resume_key(evaluation.lm, evaluation.saes, evaluation.job))


def _plans(paths: Sequence[Path]) -> tuple[Plan, ...]:
    """The plans, each under a name of its own. Raises `PlanError` when they are for different models or SAEs."""
    plans = [read_plan(path) for path in paths]
    names = [plan.name for plan in plans]
    plans = [
        plan if names.count(plan.name) == 1 else plan.model_copy(update={"name": f"{plan.name} ({path.stem})"})
        for plan, path in zip(plans, paths, strict=True)
    ]
    if len({plan.model.revision for plan in plans}) > 1:
        raise PlanError("these plans are for different models", hint="evaluate each by itself, then clampdown compare")
    for site in {ref.site for plan in plans for ref in plan.saes}:
        if len({ref.revision for plan in plans for ref in plan.saes if ref.site == site}) > 1:
            raise PlanError(f"these plans use different SAEs at {site}", hint="evaluate each by itself, then compare")
    return tuple(plans)


def _load(plans: Sequence[Plan], model: str | None) -> tuple[LanguageModel, tuple[Sae, ...]]:
    lm = load_model(model or (plans[0].model.name if plans else ORGANISM))
    names = {ref.site: ref.name for plan in plans for ref in plan.saes}
    saes = tuple(load_sae(name, device=str(lm.device), site=Site.parse(site)) for site, name in names.items())
    for sae in saes:
        check_fits(sae, lm.d_model, lm.n_layers)
    for plan in plans:
        check_plan(plan, lm, {sae.cfg.site.name: sae for sae in saes})
    return lm, saes


def _arm(plan: Plan) -> Arm:
    kind = ArmKind.GATED if plan.gate else ArmKind.DIRECTION if plan.vectors else ArmKind.FEATURE
    return Arm(plan.name, kind, plan, plan.edits[0].strengths[0], group="plan")


def suites_of(request: Request, model: str) -> tuple[Suite, ...]:
    """The suites asked for, at most `limit` prompts each: names of the embedded corpus, or whatever `load_suites` reads
    (NAME, NAME=FILE, FILE). By default the embedded model's own.

    Raises `PromptSetError` for what cannot be found or read, and for two suites of one name.
    """
    split = _split(request.split)
    embedded = {suite.name: suite for suite in _embedded(split, request.limit, request.seed)}
    found: list[Suite] = []
    for spec in request.suites or _default_suites(model):
        if spec == ORGANISM:
            found += [suite for suite in embedded.values() if suite.prompts]
        elif spec in embedded:
            found.append(embedded[spec])
        else:
            found += [suite.take(request.limit) for suite in load_suites(spec)]
    names = [suite.name for suite in found]
    if len(set(names)) < len(names):
        raise PromptSetError(f"two suites have the same name among {', '.join(names)}", hint="name each once")
    return tuple(found)


def _default_suites(model: str) -> tuple[str, ...]:
    if model != ORGANISM:
        raise PromptSetError(
            "which prompts?", hint="give --suites NAME, NAME=FILE or FILE; only 'organism' has suites of its own"
        )
    return (ORGANISM,)


def _embedded(split: Split, limit: int, seed: int) -> tuple[Suite, ...]:
    from clampdown.organism.suites import suites

    return suites(split, limit, seed)


def _split(name: str) -> Split:
    allowed = (Split.VALIDATION, Split.TEST)
    if name not in {split.value for split in allowed}:
        raise PromptSetError(f"'{name}' is not a split to measure on", hint="validation, or test (read it once)")
    return Split(name)


def judge_of(spec: str | None, lm: LanguageModel) -> NamedJudge:
    """The judge asked for; by default the corpus's exact judge for the embedded model, else the rules.

    Raises `JudgeError` for an unknown judge, and for one that is the model under test.
    """
    found = judge_named(spec or ("exact" if lm.name == ORGANISM else "rules"))
    check_not_under_test(found, lm.name, lm.revision)
    return found


def _benign_replies(
    lm: LanguageModel, suites: Sequence[Suite], settings: runner.Settings
) -> tuple[utility.Forced, ...]:
    """The unsteered model's replies to harmless prompts; none when no suite is harmless."""
    harmless = [suite for suite in suites if suite.kind is SuiteKind.SAFETY and not suite.harmful]
    harmless.sort(key=lambda suite: suite.name != "benign")
    prompts = [prompt for suite in harmless[:1] for prompt in suite.prompts]
    return utility.base_replies(lm, prompts, max_new_tokens=settings.max_new_tokens) if prompts else ()


@dataclass(frozen=True, slots=True)
class Controls:
    """The table's rows, and what the arms among them read that no plan names."""

    rows: tuple[Control, ...] = ()
    saes: tuple[Sae, ...] = ()


def _controls(
    request: Request,
    plans: Sequence[Plan],
    lm: LanguageModel,
    saes: tuple[Sae, ...],
    benign: Sequence[utility.Forced],
    stages: Stages,
) -> Controls:
    """The controls of the first plan: others are compared with it and with them."""
    if not request.controls:
        return Controls()
    if request.match not in QUANTITIES:
        raise PlanError(f"controls cannot be matched on '{request.match}'", hint=f"one of: {', '.join(QUANTITIES)}")
    if not benign:
        raise PromptSetError("controls are matched on benign text", hint="add a suite of harmless prompts to --suites")
    texts = benign[:: max(1, len(benign) // MATCHING_TEXTS)][:MATCHING_TEXTS]
    measure = (utility.mean_edit if request.match == "edit" else utility.benign_kl)(lm, saes, texts)
    material = _material(request, plans[0], lm, saes, stages)
    matching = Matching(QUANTITIES[request.match], measure, request.n_random, request.seed)
    with stages.stage("Matching controls"):
        rows = control_arms(plans[0], material, matching)
    return Controls(rows, (material.condition.sae,) if material.condition else ())


def _material(request: Request, plan: Plan, lm: LanguageModel, saes: Sequence[Sae], stages: Stages) -> Material:
    """Firing rates and the difference of means at the plan's site, from discovery prompts."""
    sae = next((sae for sae in saes if sae.cfg.site.name == plan.edits[0].site), None)
    sides = _material_prompts(request, lm.name)
    if sae is None or sides is None:
        return Material(None, None)
    with stages.stage("Reading activations") as tick:
        contrast = collect_contrast(lm, sae, sides[0], sides[1], on_progress=tick)
    direction = direction_between(contrast.activations, contrast.harmful)
    table = FeatureTable(
        firing_rate=contrast.activations.moments("max").firing_rate,
        refusal_score=contrast_scores(sae, contrast, ContrastSettings())["norm_diff_mean"],
        decoder=sae.W_dec.float().cpu().numpy(),
    )
    return Material(table, tuple(direction.vector.tolist()), _condition(plan, lm, saes, sides))


def _condition(
    plan: Plan, lm: LanguageModel, saes: Sequence[Sae], sides: tuple[Sequence[Prompt], Sequence[Prompt]]
) -> Condition | None:
    """The CAST-style gate, read where the edit's block begins; None when another SAE reads there already."""
    site = Site(Site.parse(plan.edits[0].site).layer, Point.RESID_PRE)
    if site in {sae.cfg.site for sae in saes}:
        return None
    (found,) = difference_of_means(lm, sides[0], sides[1], [site], "mean")
    return condition(lm, site, found.vector.tolist(), *sides)


def _material_prompts(request: Request, model: str) -> tuple[Sequence[Prompt], Sequence[Prompt]] | None:
    """Harmful and harmless prompts that are not tested on; None when there are none."""
    if request.harmful and request.harmless:
        sides = [
            tuple(prompt for suite in read_suites(path, harmful=harmful) for prompt in suite.prompts)
            for path, harmful in ((request.harmful, True), (request.harmless, False))
        ]
        return sides[0], sides[1]
    if model != ORGANISM:
        return None
    by_name = {suite.name: suite.prompts for suite in _embedded(Split.DISCOVERY, MATERIAL_PROMPTS, request.seed)}
    return by_name["harmful"], by_name["benign"]


def _likelihoods(evaluation: Evaluation, request: Request, log: RecordLog, stages: Stages) -> tuple[OptionChoice, ...]:
    """Multiple choice by likelihood. Unless it was asked for, arms that cannot act on it are left out."""
    job = evaluation.job
    if request.likelihood is False or not any(p.options for suite in job.suites for p in suite.prompts):
        return ()
    arms = job.arms if request.likelihood else tuple(arm for arm in job.arms if not utility.steers_generated(arm))
    with stages.stage("Multiple choice by likelihood") as tick:
        return runner.score_options(evaluation.lm, evaluation.saes, replace(job, arms=arms), log, tick)


def _provenance(evaluation: Evaluation) -> Provenance:
    lm, job = evaluation.lm, evaluation.job
    sae = evaluation.saes[0] if evaluation.saes else None
    return Provenance(
        model=lm.name,
        model_revision=lm.revision,
        sae=sae.name if sae else None,
        prompts_hash=prompts_hash(prompt for suite in job.suites for prompt in suite.prompts),
        code_version=CODE_VERSION,
        seed=evaluation.seed,
        extra={"sae_revision": sae.revision if sae else "none", "judge": job.judge_name, "decoding": "greedy"},
    )


def _extra(evaluation: Evaluation, request: Request) -> dict[str, Any]:
    """Further keys of the summary: the split, and the controls' table."""
    plan = evaluation.plans[0].name if evaluation.plans else None
    extra: dict[str, Any] = {"split": request.split, "strength_unit": "raw activation"}
    if evaluation.plans:
        extra["chosen"] = {"gated_arm" if evaluation.plans[0].gate else "arm": plan}
    if evaluation.controls:
        rows = {
            control.name: {
                "arm": control.arm.name if control.arm else None,
                "goal": control.goal,
                "reached": control.reached,
                "factor": control.factor,
                "note": control.note or None,
            }
            for control in evaluation.controls
        }
        extra["controls"] = {"of": plan, "matched_on": QUANTITIES[request.match], **rows}
    return extra
