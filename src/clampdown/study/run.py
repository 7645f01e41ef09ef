"""A study, end to end: find refusal features, choose on validation prompts, gate, control, read the test once, report.

1. The found clamp is swept (`sweeping.py`): finders, the choice, its curve, its gate, controls of its size.
2. With methods, both papers', dense baselines and the gated set of features are compared (`comparing.py`).
3. Or one published method is run as its paper runs it (`published.py`): a recipe.
4. All arms answer the test prompts together, once. `plan.toml` is the best plan that the validation prompts chose: the
   gated set's, else the choice behind its gate, else the choice.
5. What came of 1 to 3 is kept in `test.json` (`frozen.py`) before 4 begins: other machines can take part in the test.
6. What too few prompts cannot show is left out, said, and kept in the summary (`left_out`); the rest goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clampdown.config import CODE_VERSION
from clampdown.evaluation import controls, runner
from clampdown.evaluation.control_arms import SYSTEM_PROMPT
from clampdown.results.run import Run
from clampdown.saes.sae import Sae
from clampdown.steering.arms import BASELINE, Arm
from clampdown.steering.plan import Plan, write_plan
from clampdown.store import content_hash, prompts_hash, to_jsonable, write_feature_set, write_json
from clampdown.study.comparing import Comparison, MatchingRequest, claims_on, compare_methods
from clampdown.study.frozen import FrozenTest, frozen_test
from clampdown.study.gating import GateChoice, gate_facts
from clampdown.study.groundwork import Groundwork
from clampdown.study.measure import Asked, measure_arms, methods_where_it_acts
from clampdown.study.methods import clamp
from clampdown.study.methods.method import plan_of
from clampdown.study.methods.table import ALL, check_methods, make_methods
from clampdown.study.progress import Stages
from clampdown.study.published import Published, PublishedRequest, control_rows, run_published
from clampdown.study.sizes import SMALL, Answering, Sizes
from clampdown.study.study import Study
from clampdown.study.sweeping import Sweep, sweep_found_clamp
from clampdown.study.unseen import KEY as UNSEEN
from clampdown.study.unseen import estimated, with_truth
from clampdown.types import SAFE, FeatureSet, Record, Split

PLAN, UNGATED, PIPELINE = "plan.toml", "ungated.toml", "pipeline.json"
"""The best plan; a published method's choice without its gate; how that method came to it."""


@dataclass(frozen=True, slots=True)
class StudyRequest:
    """What a study does: its sizes, which methods are compared (None: all or none, as the size says), whether the found
    clamp is swept, a published method in their place, the gate's budget, where methods are matched, and whether
    multiple choice is answered by likelihood too (None: where methods are compared)."""

    sizes: Sizes = SMALL
    methods: tuple[str, ...] | None = None
    sweep: bool = True
    published: PublishedRequest | None = None
    gate: GateChoice = field(default_factory=GateChoice)
    matching: MatchingRequest = field(default_factory=MatchingRequest)
    likelihood: bool | None = None

    @property
    def compared(self) -> tuple[str, ...]:
        """The methods by their short names."""
        if self.methods is not None or self.published:
            return self.methods or ()
        return ALL if self.sizes.methods else ()


@dataclass(frozen=True, slots=True)
class Parts:
    """What a study came to before the test."""

    swept: Sweep | None = None
    compared: Comparison | None = None
    published: Published | None = None
    conditions: tuple[Sae, ...] = ()
    """What arms read beside the study's SAE."""

    @property
    def gated(self) -> Arm | None:
        """The arm whose gate the summary tells of."""
        return (self.swept.gated if self.swept else None) or (self.published.gated if self.published else None)

    @property
    def columns(self) -> list[Arm]:
        """All arms of the test, in the order of the table; what two parts both show is one column."""
        asked = controls.system_prompt_arm(SYSTEM_PROMPT)
        arms = [BASELINE]
        if self.swept:
            arms += [*self.swept.arms, *self.swept.controls, asked, *([self.swept.gated] if self.swept.gated else [])]
        if self.compared:
            arms += [*([] if self.swept else [asked]), *self.compared.arms]
        if self.published:
            arms += self.published.columns
        return list({arm.name: arm for arm in reversed(arms)}.values())[::-1]

    @property
    def plan(self) -> Plan:
        """The best that validation prompts chose."""
        if self.compared and self.compared.best:
            return self.compared.best
        for part in (self.swept, self.published):
            if part:
                return plan_of(part.gated or part.chosen)
        assert self.compared is not None, "a study sweeps, compares, or runs a published method"
        return plan_of(next(iter(self.compared.chosen.values())).arm)

    @property
    def feature_sets(self) -> tuple[FeatureSet, ...]:
        swept = self.swept.found.feature_sets if self.swept else ()
        found = self.published.method.found if self.published else None
        return (*swept, *([found] if found else []))


Shorten = Callable[[Answering, int], Answering]
"""What the test may still answer, by how many arms, where a study has a time to keep."""


def run_study(
    study: Study, out: Path, request: StudyRequest, stages: Stages, *, shorten: Shorten | None = None, **more: Any
) -> Run:
    """Everything, into `out`, with `more` as further parts of the run. A run of the same settings that was interrupted
    goes on.

    Raises `PromptSetError` for an unknown method, and what the stages raise when nothing at all can be shown.
    """
    return take_test(study, choose(study, out, request, stages, shorten=shorten), out, stages, **more)


def choose(
    study: Study, out: Path, request: StudyRequest, stages: Stages, *, shorten: Shorten | None = None
) -> FrozenTest:
    """Everything up to the test, once: what lies in `out` is taken up as it is."""
    check_methods(request.compared)
    asked = key_of_choice(study, request)
    if (found := frozen_test(out, asked)) is not None:
        stages.timings |= found.timings
        return found
    ground = _groundwork(study, request, stages)
    parts = _parts(ground, out, request)
    write_plan(out / PLAN, parts.plan)
    for feature_set in parts.feature_sets:
        write_feature_set(out / "features" / f"{feature_set.finder}.json", feature_set)
    columns = tuple(parts.columns)
    answering = request.sizes.answering if shorten is None else shorten(request.sizes.answering, len(columns))
    likelihood = parts.compared is not None if request.likelihood is None else request.likelihood
    return FrozenTest(
        asked,
        columns,
        answering,
        tuple(arm.name for arm in columns if likelihood and methods_where_it_acts(arm)),
        parts.conditions,
        {**_unseen(ground, parts, request), **_facts(parts, stages)},
        parts.gated.name if parts.gated else None,
        parts.compared.claimed if parts.compared else None,
        dict(stages.timings),
    ).write(out)


def key_of_choice(study: Study, request: StudyRequest) -> str:
    """Hash of everything that a study's arms and their test depend on. How many rows are decided on at once is left
    out, as in the key of records."""
    sizes = request.sizes
    read = {
        split: prompts_hash(study.prompts(split, n, *roles))
        for split, n, roles in (
            (Split.DISCOVERY, sizes.discovery, ()),
            (Split.VALIDATION, sizes.validation, ()),
            (Split.CALIBRATION, sizes.calibration, SAFE),
        )
    }
    published = request.published
    return content_hash(
        {
            "code": CODE_VERSION,
            "model": runner.model_key(study.lm),
            "sae": [study.sae.name, study.sae.revision, study.site.name],
            "prompts": read,
            "judge": study.judge_name,
            "seed": study.seed,
            "sizes": replace(sizes, answering=replace(sizes.answering, batch_rows=None)),
            "methods": request.compared,
            "asked": [request.sweep, request.gate, request.matching, request.likelihood],
            "published": published and [published.gate, published.controls, published.only, published.settings],
            "pipeline": published and published.pipeline,
        }
    )


def reading_of(study: Study, test: FrozenTest) -> Study:
    """The study with every SAE that an arm of its test reads."""
    if not test.conditions:
        return study
    return replace(study, more_saes=tuple(sae.to(study.lm.device) for sae in test.conditions))


def asked_of(study: Study, test: FrozenTest) -> Asked:
    """What the test asks."""
    suites = study.suites(Split.TEST, test.answering.per_suite)
    return Asked(suites, by_likelihood=test.by_likelihood)


def take_test(study: Study, test: FrozenTest, out: Path, stages: Stages, **more: Any) -> Run:
    """All arms answer the test prompts, once, and are summarised."""

    def extra(records: Sequence[Record]) -> Mapping[str, Any]:
        gate = {"gate": gate_facts(plan_of(test.arm(test.gated)), records)} if test.gated else {}
        if test.gated and UNSEEN in test.facts:
            gate[UNSEEN] = with_truth(test.facts[UNSEEN], test.gated, sorted(study.data.held_out), records)
        return {**more, **test.facts, **gate}

    reading = reading_of(study, test)
    run = measure_arms(reading, test.arms, asked_of(study, test), out, test.answering, stages, extra)
    if "methods" in test.facts:
        run = run.with_parts(claims=claims_on(run, test.claimed)).write(out)
    return run


def _groundwork(study: Study, request: StudyRequest, stages: Stages) -> Groundwork:
    gate = request.gate
    ground = Groundwork(study, request.sizes, stages, benign_budget=gate.budget, wrapped=gate.wrapped)
    return request.published.prepared(ground) if request.published else ground


def _parts(ground: Groundwork, out: Path, request: StudyRequest) -> Parts:
    """Everything up to the test."""
    if request.published:
        published = run_published(ground, request.published, out / "validation")
        facts = {"schema": 1, "method": published.method.name, **to_jsonable(published.facts)}
        write_json(out / PIPELINE, facts)
        if published.gated:
            write_plan(out / UNGATED, plan_of(published.chosen))
        return Parts(published=published)
    swept = sweep_found_clamp(ground, out / "validation", request.gate) if request.sweep else None
    if not request.compared:
        return Parts(swept)
    found = make_methods(ground, request.compared)
    reading = ground.study
    if "cast" in request.compared:  # its gate reads a condition vector put as an SAE
        reading = replace(reading, more_saes=(ground.condition.sae,))
    directory = out / ("validation-methods" if request.sweep else "validation")
    return Parts(swept, compare_methods(ground, reading, found, directory, request.matching), None, reading.more_saes)


def _unseen(ground: Groundwork, parts: Parts, request: StudyRequest) -> dict[str, Any]:
    """How the swept clamp's gate will do in wrappers that nobody has seen, at sizes that compare methods: it is fitted
    once more for every family."""
    gated = parts.swept.gated if parts.swept and request.sizes.methods else None
    gate = plan_of(gated).gate if gated else None
    with ground.stages.attempt("the estimate for unseen wrappers"):
        return {UNSEEN: estimated(ground, gate, request.gate)} if gate else {}
    return {}


def _facts(parts: Parts, stages: Stages) -> dict[str, Any]:
    """Further top-level keys of the summary, as far as no record changes them."""
    found: dict[str, Any] = {"split": Split.TEST.value, "strength_unit": "raw activation"}
    swept, compared, published = parts.swept, parts.compared, parts.published
    if swept:
        found |= {"chosen": swept.facts, "controls": swept.matching}
    elif published:
        gated = {"gated_arm": published.gated.name} if published.gated else {}
        found["chosen"] = {"arm": published.chosen.name, **gated}
        if published.controls and published.matched_on:
            found["controls"] = control_rows(published.chosen.name, published.matched_on, published.controls)
    elif compared and clamp.NAME in compared.chosen:
        found["chosen"] = {"arm": clamp.NAME}
    if compared:
        found |= {"methods": compared.lines, "matched_kl": compared.kl, "n_random": len(compared.random)}
    if stages.left_out:
        found["left_out"] = stages.left_out
    return found
