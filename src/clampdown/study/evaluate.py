"""`clampdown evaluate`: plans beside the baseline and their controls, on the suites that were asked for.

1. The model and SAEs are the ones that the plans name; plans for different models are different runs.
2. The cost is said before anything long begins; `--dry-run` says it and stops.
3. Controls are matched once and kept (`frozen.py`).
4. Replies, judgements and option likelihoods go to append-only logs (`evaluation.runner`), then `summary.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clampdown.config import CODE_VERSION, ORGANISM
from clampdown.discovery.contrast import ContrastSettings, collect_contrast, contrast_scores
from clampdown.discovery.directions import difference_of_means, direction_between
from clampdown.errors import PlanError, PromptSetError
from clampdown.evaluation import utility
from clampdown.evaluation.catalog import load_suites
from clampdown.evaluation.condition import Condition, condition
from clampdown.evaluation.control_arms import Control, Matching, Material, control_arms
from clampdown.evaluation.controls import FeatureTable
from clampdown.evaluation.engines import opened
from clampdown.evaluation.judges.interface import NamedJudge
from clampdown.evaluation.runner import model_key
from clampdown.models.chat import encode
from clampdown.models.loading import LanguageModel
from clampdown.models.placing import Placing
from clampdown.results.run import Run
from clampdown.saes.sae import Sae
from clampdown.steering.arms import BASELINE, Arm
from clampdown.steering.plan import Plan, read_plan, write_plan
from clampdown.store import content_hash, key_of, prompts_hash
from clampdown.study.control_table import against_random
from clampdown.study.estimate import Estimate, estimate
from clampdown.study.frozen import FILE as FROZEN
from clampdown.study.frozen import FrozenTest, frozen_test
from clampdown.study.loading import load_for
from clampdown.study.measure import (
    Asked,
    always,
    benign_replies,
    job_of,
    log_of,
    measure_arms,
    never,
    where_it_acts,
)
from clampdown.study.methods.method import arm_of
from clampdown.study.progress import Stages
from clampdown.study.prompts import StudyPrompts, embedded_prompts
from clampdown.study.published import QUANTITIES, control_rows
from clampdown.study.sizes import Answering
from clampdown.study.study import judge_for, provenance_of
from clampdown.study.sweep import split_to_measure
from clampdown.types import ATTACKS, SAFE, Judge, Point, Prompt, PromptRole, Provenance, Record, Site, Split, Suite

TIMED_FROM = 500
"""Replies from which on a run is timed before it begins."""
MATCHING_TEXTS = 16
MATERIAL_PROMPTS = 240
BY_LIKELIHOOD: dict[bool | None, Callable[[Arm], bool]] = {None: where_it_acts, True: always, False: never}


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
    data: StudyPrompts | None = None
    placing: Placing | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A job on loaded things: everything that a run needs, the controls among them. It is a `measure.Subject`."""

    lm: LanguageModel
    saes: tuple[Sae, ...]
    judge: Judge
    judge_name: str
    suites: tuple[Suite, ...]
    split: Split
    test: FrozenTest
    plans: tuple[Plan, ...]
    seed: int
    controls: bool = False
    """Whether the first plan's controls are among the arms."""

    @property
    def arms(self) -> tuple[Arm, ...]:
        return self.test.arms

    @property
    def answering(self) -> Answering:
        return self.test.answering

    @property
    def asked(self) -> Asked:
        return Asked(self.suites, self.split, by_likelihood=self.test.by_likelihood)

    def provenance(self, prompts: Sequence[Prompt]) -> Provenance:
        sae = self.saes[0] if self.saes else None
        return provenance_of(self.lm, sae, prompts, self.seed, self.judge_name)


def prepare(request: Request, stages: Stages, out: Path | None = None) -> Evaluation:
    """Load the model, SAEs, suites and judge, and build the arms. Raises for whatever does not fit together."""
    plans = read_plans(request.plans)
    with stages.stage("Loading"):
        lm, saes = load_for(plans, request.model, request.placing)
    judge = judge_for(request.judge, lm, _data(request, lm.name))
    return prepared(request, plans, lm, saes, judge, stages, out)


def prepared(
    request: Request,
    plans: Sequence[Plan],
    lm: LanguageModel,
    saes: Sequence[Sae],
    judge: NamedJudge,
    stages: Stages,
    out: Path | None = None,
) -> Evaluation:
    """As `prepare`, on loaded things. Controls that were matched for `out` before are taken as they are there."""
    suites = suites_of(request, lm.name)
    asked = _key(request, plans, lm, saes, judge, suites)
    answering = Answering(request.limit, request.limit, request.batch_rows, request.max_new_tokens)
    test = frozen_test(out, asked) if out and request.controls else None
    if test is None:
        test = _test(request, plans, lm, tuple(saes), suites, FrozenTest(asked, (), answering), stages)
    test = replace(test, answering=answering)
    more = tuple(sae.to(lm.device) for sae in test.conditions)
    split = split_to_measure(request.split)
    controls = request.controls and bool(plans)
    return Evaluation(lm, (*saes, *more), judge, judge.name, suites, split, test, tuple(plans), request.seed, controls)


def _key(
    request: Request,
    plans: Sequence[Plan],
    lm: LanguageModel,
    saes: Sequence[Sae],
    judge: NamedJudge,
    suites: Sequence[Suite],
) -> str:
    """Hash of everything that the arms and their prompts depend on."""
    return content_hash(
        {
            "code": CODE_VERSION,
            "model": model_key(lm),
            "saes": [[sae.name, sae.revision, sae.cfg.site.name] for sae in saes],
            "plans": [[plan.name, plan.digest] for plan in plans],
            "suites": {suite.name: prompts_hash(suite.prompts) for suite in suites},
            "controls": request.controls and [request.match, request.n_random, _material_prompts(request, lm.name)],
            "asked": [judge.name, request.split, request.likelihood, request.max_new_tokens, request.seed],
        }
    )


def _test(
    request: Request,
    plans: Sequence[Plan],
    lm: LanguageModel,
    saes: tuple[Sae, ...],
    suites: tuple[Suite, ...],
    asked: FrozenTest,
    stages: Stages,
) -> FrozenTest:
    """The arms, controls among them if they were asked for, and what the summary says of those."""
    rows, conditions = _controls(request, plans, lm, saes, suites, asked.answering, stages)
    arms = (BASELINE, *(arm_of(plan, "plan") for plan in plans), *(row.arm for row in rows if row.arm))
    by_likelihood = BY_LIKELIHOOD[request.likelihood]
    return replace(
        asked,
        arms=arms,
        likelihood=tuple(arm.name for arm in arms if by_likelihood(arm)),
        conditions=conditions,
        facts=_facts(plans, request, rows),
    )


def freeze(evaluation: Evaluation, out: Path) -> None:
    """Keep what was matched, so that it is matched once."""
    if evaluation.controls and not (out / FROZEN).exists():
        evaluation.test.write(out)


@contextmanager
def with_engine(evaluation: Evaluation, engine: str | None) -> Iterator[Evaluation]:
    """The same, answered by another engine (`evaluation/engines.py`). Raises as that cannot be opened."""
    prompts = [prompt for suite in evaluation.asked.suites for prompt in suite.prompts]
    asked = {arm.messages(prompt) for prompt in prompts for arm in evaluation.arms} if engine else ()
    longest = max((len(encode(evaluation.lm, messages)) for messages in asked), default=0)
    longest += evaluation.answering.max_new_tokens
    with opened(engine, evaluation.lm, evaluation.saes, evaluation.arms, longest) as found:
        answering = replace(evaluation.answering, engine=found)
        yield replace(evaluation, test=replace(evaluation.test, answering=answering))


def preview(evaluation: Evaluation, out: Path) -> Estimate:
    """What is left to do in `out`, timed when it is much. Raises `StoreError` when `out` holds another run."""
    done: set[Any] = set()
    job = job_of(evaluation, evaluation.arms, evaluation.asked.suites, evaluation.answering)
    if (out / "manifest.json").exists():
        with log_of(evaluation, job, out) as log:
            done = {*map(key_of, log.replies.rows), *map(key_of, log.records)}
    return estimate(evaluation.lm, evaluation.saes, job, done, timed=len(job.rows) - len(done) >= TIMED_FROM)


def run_evaluate(evaluation: Evaluation, out: Path, request: Request, stages: Stages) -> Run:
    """Write the run directory."""
    freeze(evaluation, out)
    for plan in evaluation.plans:
        write_plan(out / (f"{plan.name}.toml" if len(evaluation.plans) > 1 else "plan.toml"), plan)

    def extra(_records: Sequence[Record]) -> dict[str, Any]:
        return dict(evaluation.test.facts)

    run = measure_arms(evaluation, evaluation.arms, evaluation.asked, out, evaluation.answering, stages, extra)
    if not evaluation.controls:
        return run
    return run.with_parts(controls={**run.controls, "against_random": against_random(run)}).write(out)


def read_plans(paths: Sequence[Path]) -> tuple[Plan, ...]:
    """The plans, each under a name of its own. Raises `PlanError` when they are for different models or SAEs."""
    plans = [read_plan(path) for path in paths]
    names = [plan.name for plan in plans]
    plans = [
        plan if names.count(plan.name) == 1 else plan.named(f"{plan.name} ({path.stem})")
        for plan, path in zip(plans, paths, strict=True)
    ]
    if len({plan.model.revision for plan in plans}) > 1:
        raise PlanError("these plans are for different models", hint="evaluate each by itself, then clampdown compare")
    for site in {ref.site for plan in plans for ref in plan.saes}:
        if len({ref.revision for plan in plans for ref in plan.saes if ref.site == site}) > 1:
            raise PlanError(f"these plans use different SAEs at {site}", hint="evaluate each by itself, then compare")
    return tuple(plans)


def suites_of(request: Request, model: str) -> tuple[Suite, ...]:
    """The suites asked for, at most `limit` prompts each: names of the embedded corpus, or whatever `load_suites` reads
    (NAME, NAME=FILE, FILE). By default the embedded model's own.

    Raises `PromptSetError` for what cannot be found or read, and for two suites of one name.
    """
    split = split_to_measure(request.split)
    if request.data is not None and not request.suites:
        return tuple(suite for suite in request.data.suites(split, request.limit) if suite.prompts)
    embedded = embedded_prompts(request.seed)
    found: list[Suite] = []
    for spec in request.suites or _default_suites(model):
        if spec == ORGANISM:
            found += [suite for suite in embedded.suites(split, request.limit) if suite.prompts]
        elif spec in embedded.roles:
            found.append(embedded.draw(spec, split, request.limit))
        else:
            found += [suite.take(request.limit) for suite in load_suites(spec)]
    names = [suite.name for suite in found]
    if len(set(names)) < len(names):
        raise PromptSetError(f"two suites have the same name among {', '.join(names)}", hint="name each once")
    return tuple(found)


def _data(request: Request, model: str) -> StudyPrompts | None:
    """Prompts by role: those that were given, else the embedded corpus for the model that knows it."""
    return request.data or (embedded_prompts(request.seed) if model == ORGANISM else None)


def _default_suites(model: str) -> tuple[str, ...]:
    if model != ORGANISM:
        raise PromptSetError(
            "which prompts?", hint="give --suites NAME, NAME=FILE or FILE; only 'organism' has suites of its own"
        )
    return (ORGANISM,)


def _controls(
    request: Request,
    plans: Sequence[Plan],
    lm: LanguageModel,
    saes: tuple[Sae, ...],
    suites: Sequence[Suite],
    answering: Answering,
    stages: Stages,
) -> tuple[tuple[Control, ...], tuple[Sae, ...]]:
    """The controls of the first plan, with which others are compared too, and the SAEs that no plan names."""
    if not request.controls or not plans:
        return (), ()
    if request.match not in QUANTITIES:
        raise PlanError(f"controls cannot be matched on '{request.match}'", hint=f"one of: {', '.join(QUANTITIES)}")
    with stages.stage("Benign replies"):
        benign = benign_replies(lm, suites, answering)
    if not benign:
        raise PromptSetError("controls are matched on benign text", hint="add a suite of harmless prompts to --suites")
    texts = benign[:: max(1, len(benign) // MATCHING_TEXTS)][:MATCHING_TEXTS]
    measure = (utility.mean_edit if request.match == "edit" else utility.benign_kl)(lm, saes, texts)
    material = _material(request, plans[0], lm, saes, stages)
    matching = Matching(QUANTITIES[request.match], measure, request.n_random, request.seed)
    with stages.stage("Matching controls"):
        rows = control_arms(plans[0], material, matching)
    return rows, (material.condition.sae,) if material.condition else ()


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
    """Harmful and harmless discovery prompts; None when there are none."""
    data = _data(request, model)
    if data is None:
        return None
    sides = (
        data.prompts(Split.DISCOVERY, MATERIAL_PROMPTS, first) or data.prompts(Split.DISCOVERY, MATERIAL_PROMPTS, *rest)
        for first, rest in ((PromptRole.HARMFUL, ATTACKS), (PromptRole.BENIGN, SAFE))
    )
    harmful, harmless = sides
    return (harmful, harmless) if harmful and harmless else None


def _facts(plans: Sequence[Plan], request: Request, controls: tuple[Control, ...]) -> dict[str, Any]:
    """Further parts of the run: the split, and the controls' table."""
    facts: dict[str, Any] = {"split": request.split, "strength_unit": "raw activation"}
    if plans:
        first = plans[0]
        facts["chosen"] = {"gated_arm" if first.gate else "arm": first.name}
        if controls:
            facts["controls"] = control_rows(first.name, QUANTITIES[request.match], controls)
    return facts
