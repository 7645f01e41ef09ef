"""`clampdown explain`: why a plan costs what it costs, into `explain.json` and `explain.html`.

Read on validation prompts of the embedded model, or on a file's prompts: the test split stays unread. The second branch
of a two-sided plan is explained like a plan of its own, into `explain-otherwise.json` and `explain-otherwise.html`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clampdown.config import CODE_VERSION, ORGANISM
from clampdown.errors import PromptSetError
from clampdown.evaluation import utility
from clampdown.evaluation.intervals import wilson
from clampdown.evaluation.suites import read_suites
from clampdown.explanation import Explanation, write_explanation
from clampdown.models.chat import encode
from clampdown.models.generation import next_token_logits
from clampdown.models.loading import LanguageModel, load_model
from clampdown.reports.explain_page import write_explanation_page
from clampdown.saes.checkpoints import open_sae
from clampdown.saes.sae import Sae
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Plan, read_plan
from clampdown.steering.program import check_plan
from clampdown.steering.units import in_words
from clampdown.store import prompts_hash
from clampdown.study import damage, explain
from clampdown.study.judging import judge_named
from clampdown.study.outcomes import Writing, acting_branch, answered, failures
from clampdown.study.progress import Stages
from clampdown.study.prompts import embedded_prompts
from clampdown.study.study import judge_for
from clampdown.types import BRANCHES, Interval, Prompt, Provenance, Site, Split, Suite

DATA_NAME, PAGE_NAME = "explain.json", "explain.html"
OTHER_DATA, OTHER_PAGE = "explain-otherwise.json", "explain-otherwise.html"
SECOND_JUDGE = "rules"
GATE_ROWS = 16


@dataclass(frozen=True, slots=True)
class Request:
    """What to read: `prompts` (else the embedded suites), `limit` benign prompts and as many items of each
    capability suite, `controls` random features and as many random directions."""

    prompts: Path | None = None
    limit: int = 60
    controls: int = 6
    max_new_tokens: int = 40
    judge: str | None = None
    seed: int = 0


def run(
    plan_file: Path, out: Path, model: str | None, sae: str | None, request: Request, stages: Stages
) -> Explanation:
    """Measure and write both files into `out`. Raises `PlanError`, `PlanMismatchError`, `PromptSetError` and kin."""
    plan = read_plan(plan_file)
    with stages.stage("Loading"):
        lm = load_model(model or plan.model.name)
        opened = [open_sae(sae or ref.name, device=str(lm.device), site=Site.parse(ref.site)) for ref in plan.saes]
        check_plan(plan, lm, {source.cfg.site.name: source for source in opened})
        saes = tuple(source.whole() for source in opened)
    benign, items = prompts_for(lm, plan, request)
    found = explain_plan(lm, saes, plan, benign, items, request, stages)
    found = with_outcomes(found, lm, saes, plan, benign, request, stages)
    out.mkdir(parents=True, exist_ok=True)
    if plan.otherwise is not None:
        other = explain_plan(lm, saes, second_branch(plan), benign, items, request, stages)
        acts = gate_fired(lm, saes, plan, benign, branch=1)
        write_explanation(out / OTHER_DATA, other := replace(other, gate_fired=acts))
        write_explanation_page(out / OTHER_PAGE, other)
        found = replace(found, notes=(*found.notes, f"the second branch has a page of its own: {OTHER_PAGE}"))
    write_explanation(out / DATA_NAME, found)
    write_explanation_page(out / PAGE_NAME, found)
    return found


def second_branch(plan: Plan) -> Plan:
    """What a two-sided plan does otherwise, as a plan of its own."""
    assert plan.otherwise is not None, "only two-sided plans have a second branch"
    name = f"{plan.name}, otherwise"
    return plan.changed(name=name, edits=plan.otherwise.edits, gate=plan.otherwise.gate, otherwise=None)


def with_outcomes(
    found: Explanation,
    lm: LanguageModel,
    saes: Sequence[Sae],
    plan: Plan,
    benign: Sequence[Prompt],
    request: Request,
    stages: Stages,
) -> Explanation:
    """The explanation with what becomes of replies that are written, and whose fault the failures are."""
    embedded = request.prompts is None
    judge = judge_for(request.judge, lm, embedded_prompts() if embedded else None)
    writing = Writing(lm, tuple(saes), judge, judge_named(SECOND_JUDGE), request.max_new_tokens)
    suites = every_suite(lm, plan, request)
    items = [prompt for suite in suites for prompt in suite.prompts if prompt.answer is not None]
    with stages.stage("Writing answers"):
        answers = answered(writing, plan, benign, items)
        faults = failures(writing, plan, suites)
    return replace(found, answered=answers, failures=faults)


def every_suite(lm: LanguageModel, plan: Plan, request: Request) -> tuple[Suite, ...]:
    """All suites of a file, or the embedded ones, harmful ones among them, at most `limit` prompts each."""
    if request.prompts is not None:
        found = read_suites(request.prompts, harmful=False)
    else:
        found = embedded_prompts(request.seed).suites(Split.VALIDATION, request.limit)
    return tuple(suite.take(request.limit) for suite in found)


def prompts_for(lm: LanguageModel, plan: Plan, request: Request) -> tuple[list[Prompt], list[Prompt]]:
    """Benign prompts, and multiple-choice items. A file's harmful prompts are left out."""
    if request.prompts is not None:
        suites = [suite for suite in read_suites(request.prompts, harmful=False) if not suite.harmful]
    elif lm.name == ORGANISM or plan.model.name == ORGANISM:
        from clampdown.organism.suites import suites as embedded

        suites = [suite for suite in embedded(Split.VALIDATION, request.limit, request.seed) if not suite.harmful]
    else:
        raise PromptSetError(
            "there are no built-in benign prompts for this model", hint="give some: --prompts FILE (JSONL or CSV)"
        )
    every = [prompt for suite in suites for prompt in suite.prompts[: request.limit]]
    items = [prompt for prompt in every if prompt.options]
    benign = [prompt for prompt in every if prompt.suite == "benign"] or every
    if not benign:
        raise PromptSetError("no benign prompts to explain the cost of steering on")
    return benign[: request.limit], items


def explain_plan(
    lm: LanguageModel, saes: Sequence[Sae], plan: Plan, benign: Sequence[Prompt], items: Sequence[Prompt],
    request: Request, stages: Stages,
) -> Explanation:  # fmt: skip
    """All measurements of one plan."""
    with stages.stage("Answering benign prompts"):
        texts = utility.base_replies(lm, benign, max_new_tokens=request.max_new_tokens)
    with stages.stage("Looking inside") as tick:
        inside = explain.look_inside(lm, saes, plan, texts, progress=tick)
        shifts, codes = explain.feature_shifts(lm, saes, plan, inside)
    bench = damage.Bench(lm, tuple(saes), tuple(texts), tuple(items))
    with stages.stage("Matching controls"):
        pushes = damage.norm_matched(bench, plan, inside, n=request.controls, seed=request.seed)
    with stages.stage("Cost of the controls") as tick:
        rows, baseline, unmeasured = damage.damage(bench, pushes, progress=tick)
        joints, unpaired = damage.joints(bench, plan)
    return Explanation(
        plan=plan.name,
        plan_digest=plan.digest,
        edits=tuple(in_words(edit) for edit in plan.edits),
        provenance=_provenance(lm, saes, [*benign, *items], request),
        cost=inside.cost,
        gate_fired=gate_fired(lm, saes, plan, benign),
        places=inside.by_place,
        moved=tuple(inside.moved),
        site_edits=inside.site_edits,
        travel=inside.layers,
        features=shifts,
        codes=codes,
        baseline_accuracy=baseline,
        damage=rows,
        joints=joints,
        notes=(*pushes.notes, *unmeasured, *unpaired),
    )


def gate_fired(
    lm: LanguageModel, saes: Sequence[Sae], plan: Plan, prompts: Sequence[Prompt], branch: int = 0
) -> Interval | None:
    """On how many of the prompts the edits that are explained act: those of one branch, the plan's own by default. None
    for a plan without a gate."""
    if plan.gate is None:
        return None
    fired = 0
    ids = sorted((encode(lm, prompt.messages) for prompt in prompts), key=len)
    for start in range(0, len(ids), GATE_ROWS):
        chunk = ids[start : start + GATE_ROWS]
        with steer(lm, [plan] * len(chunk), list(saes), require_reach=False) as steering:
            next_token_logits(lm, chunk)
            fired += sum(acting_branch(plan, receipt) == BRANCHES[branch] for receipt in steering.receipts())
    return wilson(fired, len(ids))


def _provenance(lm: LanguageModel, saes: Sequence[Sae], prompts: Sequence[Prompt], request: Request) -> Provenance:
    return Provenance(
        model=lm.name,
        model_revision=lm.revision,
        sae=", ".join(sae.name for sae in saes) or None,
        prompts_hash=prompts_hash(prompts),
        code_version=CODE_VERSION,
        seed=request.seed,
        extra={"n_prompts": str(len(prompts)), "controls": str(request.controls)},
    )
