"""`clampdown recipe`: a published pipeline from one file, into a run directory like any other.

1. Load what the recipe names, and hold it to the shape that the recipe states.
2. The pipeline proposes on discovery and validation prompts (`pipelines`).
3. The choice behind a gate, if the recipe has one, and controls of the choice's own size.
4. The test prompts are read once, by all arms together. Then multi-turn attacks on the choice, if there is an attacker.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from clampdown.discovery.contrast import ContrastSettings
from clampdown.discovery.directions import direction_between
from clampdown.discovery.finders import Material
from clampdown.errors import RecipeError, StoreError
from clampdown.evaluation import control_arms, utility
from clampdown.evaluation.controls import FeatureTable
from clampdown.evaluation.judges.interface import check_not_under_test
from clampdown.models.loading import LanguageModel, load_model
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae, check_fits
from clampdown.steering.arms import BASELINE, Arm
from clampdown.steering.plan import Plan, write_plan
from clampdown.store import to_jsonable, write_atomic, write_feature_set, write_json
from clampdown.study import demo, experiment
from clampdown.study import multiturn as attacks
from clampdown.study.evaluate import QUANTITIES
from clampdown.study.experiment import Subject
from clampdown.study.judging import judge_named
from clampdown.study.progress import Stages
from clampdown.study.recipes import sources
from clampdown.study.recipes.dry_run import dry_run
from clampdown.study.recipes.pipelines import BENIGN, HARMFUL, Bench, Proposal, propose
from clampdown.study.recipes.schema import GatePart, MultiturnPart, Recipe, SinglePromptClamp, read_recipe
from clampdown.types import ArmKind, Message, Prompt, Site, Split, Suite

UNGATED = "ungated.toml"
"""The choice as published, beside `plan.toml` with its gate."""


@dataclass(frozen=True, slots=True)
class Ran:
    """The summary of the test prompts, and that of the multi-turn attacks if there were any."""

    summary: dict[str, Any]
    attacks: dict[str, Any] | None


def run_recipe(recipe: Recipe, out: Path, stages: Stages) -> Ran:
    """Write the run directory, attacks into its `multiturn`. Resumes an interrupted run. Raises `RecipeError` before
    anything is loaded when a field is wrong or still to be given, and whatever the stages raise."""
    dry_run(recipe).raise_if_wrong()
    if recipe.sae.id is None:
        raise RecipeError(f"sae.id is to be given: {recipe.sae.to_be_given}", hint="--set sae.id=DIRECTORY")
    _write_down(recipe, out)
    summary = _measure(recipe, out, stages)
    part = recipe.multiturn
    if part is None or part.attacker is None:
        return Ran(summary, None)
    return Ran(summary, attacks.run_multiturn(_attack(recipe, part, out), out / "multiturn", stages))


def _write_down(recipe: Recipe, out: Path) -> None:
    """Beside what will be measured. Raises `StoreError` where another recipe has been measured: its file must go on
    saying what was. An attacker may be given later."""
    path = out / "recipe.toml"
    if path.exists() and (out / "validation" / "manifest.json").exists():
        held = read_recipe(path).model_copy(update={"multiturn": None})
        if held != recipe.model_copy(update={"multiturn": None}):
            raise StoreError(
                f"{out} holds a run of another recipe, or of this one with other settings",
                hint="choose an empty --out directory, or repeat the exact command to resume",
            )
    write_atomic(path, tomli_w.dumps(recipe.model_dump(mode="json", by_alias=True, exclude_none=True)))


def _attack(recipe: Recipe, part: MultiturnPart, out: Path) -> attacks.Request:
    return attacks.Request(
        plans=(out / "plan.toml", *([out / UNGATED] if recipe.gate is not None else [])),
        attacker=str(part.attacker),
        objectives=_objectives(part.objectives),
        judge=part.judge,
        limit=part.limit,
        attempts=part.attempts,
        rules=part.rules,
        max_new_tokens=part.max_new_tokens,
        model=recipe.model.id,
        seed=recipe.seed,
    )


def _objectives(text: str) -> str:
    source = sources.Source.parse(text)
    return source.embedded or source.spec


def _measure(recipe: Recipe, out: Path, stages: Stages) -> dict[str, Any]:
    """Everything but the attacks. What it loads is free again when it returns: attacks load the model anew."""
    with stages.stage("Loading"):
        subject = load_subject(recipe)
    bench = Bench(recipe, subject, _material(recipe, subject), out / "validation", stages)
    proposal = propose(bench)
    write_feature_set(out / "features" / f"{proposal.found.finder}.json", proposal.found)
    write_json(out / "pipeline.json", {"schema": 1, "method": recipe.method.kind, **to_jsonable(proposal.facts)})
    arms = [BASELINE, *proposal.arms]
    plan = _plan(proposal.chosen)
    if recipe.gate is not None:
        with stages.stage("Calibrating the gate"):
            plan = gated(subject, plan, recipe.gate)
        arms.append(Arm(plan.name, ArmKind.GATED, plan, proposal.chosen.strength, group="gated"))
        write_plan(out / UNGATED, _plan(proposal.chosen))
    write_plan(out / "plan.toml", plan)
    controls = _controls(bench, proposal)
    arms += [control.arm for control in controls if control.arm]
    return experiment.measure_arms(
        subject, arms, out, bench.sizes, stages, lambda _records: _extra(recipe, proposal, plan, controls)
    )


def load_subject(recipe: Recipe) -> Subject:
    """Model, SAE, prompts and judge. Raises `RecipeError` when they are not what the recipe says."""
    lm = load_model(recipe.model.id)
    sae = load_sae(str(recipe.sae.id), device=str(lm.device), site=Site.parse(recipe.sae.site))
    _check_stated(recipe, lm, sae)
    suites = {role: _suites(recipe, role) for role in Split if role.value in recipe.prompts.model_fields_set}
    judge = judge_named(recipe.judges.verdicts)
    check_not_under_test(judge, lm.name, lm.revision)

    def suites_of(split: Split, n: int | None) -> tuple[Suite, ...]:
        found = suites.get(split, ())
        return found if n is None else tuple(suite.take(n) for suite in found)

    return Subject(lm, sae, suites_of, judge, judge.name, recipe.seed)


def _suites(recipe: Recipe, role: Split) -> tuple[Suite, ...]:
    found = recipe.prompts.sources(role.value)
    return tuple(sources.load(source, name, role, recipe.seed) for name, source in found.items())


def _check_stated(recipe: Recipe, lm: LanguageModel, sae: Sae) -> None:
    config = lm.layout.decoder.config
    stated = recipe.model
    for field, value, there in (
        ("model.type", stated.type, str(getattr(config, "model_type", ""))),
        ("model.layers", stated.layers, lm.n_layers),
        ("model.width", stated.width, lm.d_model),
        ("sae.features", recipe.sae.features, sae.cfg.d_sae),
    ):
        if value != there:
            raise RecipeError(f"{field} says {value}, but what was loaded has {there}", hint="another model or SAE?")
    check_fits(sae, lm.d_model, lm.n_layers)


def _material(recipe: Recipe, subject: Subject) -> Material:
    """What finders read: discovery prompts, and who tells refusals."""
    method = recipe.method
    only, settings = None, ContrastSettings()
    if isinstance(method, SinglePromptClamp):
        only = Prompt("asked", (Message("user", method.prompt),), "asked") if method.prompt else None
    else:
        settings = ContrastSettings(pooling=method.pooling)
    return Material(
        subject.lm,
        subject.sae,
        tuple(subject.prompts(Split.DISCOVERY, 10**6, HARMFUL)),
        tuple(subject.prompts(Split.DISCOVERY, 10**6, BENIGN)),
        judge=judge_named(recipe.judges.refusals),
        only=only,
        settings=settings,
        seed=recipe.seed,
    )


def gated(subject: Subject, plan: Plan, part: GatePart) -> Plan:
    """The plan behind a probe that was fitted on discovery prompts, its threshold set on benign calibration prompts."""
    scale = replace(demo.FULL, discovery=10**6, calibration=10**6)
    return demo.gate_plan(subject, plan, scale, demo.GateChoice(part.budget, part.confidence, part.max_features))


def _controls(bench: Bench, proposal: Proposal) -> tuple[control_arms.Control, ...]:
    """Random and unrelated features, the dense direction and a system prompt, of the chosen plan's own size."""
    part, subject, contrast = bench.recipe.controls, bench.subject, bench.given.contrast
    if part is None:
        return ()
    sizes = replace(bench.sizes, kl_prompts=part.texts)
    with bench.stages.stage("Matching controls"):
        forced = experiment.benign_replies(subject, subject.suites(Split.VALIDATION, None), sizes)
        measure = (utility.mean_edit if part.match == "edit" else utility.benign_kl)(subject.lm, subject.saes, forced)
        direction = direction_between(contrast.activations, contrast.harmful)
        material = control_arms.Material(_table(bench.given), tuple(direction.vector.tolist()))
        matching = control_arms.Matching(QUANTITIES[part.match], measure, part.random, bench.recipe.seed)
        return control_arms.control_arms(_plan(proposal.chosen), material, matching)


def _table(given: Material) -> FeatureTable:
    """What controls are drawn by, under the pooling that the recipe reads."""
    return FeatureTable(
        firing_rate=given.contrast.activations.moments("max").firing_rate,
        refusal_score=given.contrast_scores["norm_diff_mean"],
        decoder=given.sae.W_dec.float().cpu().numpy(),
    )


def _extra(
    recipe: Recipe, proposal: Proposal, plan: Plan, controls: tuple[control_arms.Control, ...]
) -> dict[str, Any]:
    """Further keys of the summary: the recipe, what was chosen, the gate, and how controls were matched."""
    facts = {key: value for key, value in proposal.facts.items() if key != "tried"}
    found: dict[str, Any] = {
        "recipe": {"name": recipe.name, "paper": recipe.paper, "method": recipe.method.kind, **facts},
        "chosen": {"arm": proposal.chosen.name},
        "split": Split.TEST.value,
        "strength_unit": "raw activation",
    }
    if plan.gate is not None:
        found["chosen"]["gated_arm"] = plan.name
    if controls and recipe.controls is not None:
        rows = {c.name: {"goal": c.goal, "reached": c.reached, "factor": c.factor, "note": c.note} for c in controls}
        found["controls"] = {"of": proposal.chosen.name, "matched_on": QUANTITIES[recipe.controls.match], **rows}
    return found


def _plan(arm: Arm) -> Plan:
    if arm.plan is None:
        raise RecipeError(f"'{arm.name}' does not steer")
    return arm.plan
