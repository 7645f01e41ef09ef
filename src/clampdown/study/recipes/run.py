"""`clampdown recipe`: a published pipeline from one file, as a study with one method in its paper's own settings.

1. Load what the recipe names, and hold it to the shape that the recipe states.
2. `run_study` proposes on discovery and validation prompts, gates, controls, and reads the test prompts once.
3. Then multi-turn attacks on the choice, if there is an attacker.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from clampdown.discovery.contrast import ContrastSettings
from clampdown.errors import RecipeError, StoreError
from clampdown.evaluation.judges.interface import check_not_under_test
from clampdown.models.loading import LanguageModel
from clampdown.results.run import Run
from clampdown.saes.sae import Sae
from clampdown.steering.arms import BASELINE
from clampdown.store import content_hash, write_atomic, write_json
from clampdown.study import multiturn as attacks
from clampdown.study.compare import run_compare
from clampdown.study.gating import GateChoice
from clampdown.study.groundwork import Groundwork
from clampdown.study.judging import judge_named
from clampdown.study.methods.clamp import ClampSettings, clamp_of_one_refusal
from clampdown.study.methods.method import Method
from clampdown.study.methods.refine import RefineSettings, contrast_settings, score_and_refine
from clampdown.study.progress import Stages
from clampdown.study.prompts import StudyPrompts, role_of
from clampdown.study.published import ControlsRequest, PublishedRequest
from clampdown.study.recipes import sources
from clampdown.study.recipes.dry_run import dry_run
from clampdown.study.recipes.schema import ContrastRefine, MultiturnPart, Recipe, SinglePromptClamp, read_recipe
from clampdown.study.run import PLAN, UNGATED, StudyRequest, run_study
from clampdown.study.sizes import Answering, Sizes
from clampdown.study.study import Study, load_pair
from clampdown.types import Message, Prompt, Split, Suite

PREFERENCE = "preference.json"
"""How often the chosen arm's replies to harmless prompts are preferred to the baseline's, if a recipe asks that."""
EVERY = 10**6
"""Stands for all prompts that a source gives: a recipe's own slices say how many there are."""


Make = Callable[[Groundwork], Method]


@dataclass(frozen=True, slots=True)
class Ran:
    """The run on the test prompts, and the summary of the multi-turn attacks if there were any."""

    run: Run
    attacks: dict[str, Any] | None


def run_recipe(recipe: Recipe, out: Path, stages: Stages) -> Ran:
    """Write the run directory, attacks into its `multiturn`. Resumes an interrupted run. Raises `RecipeError` before
    anything is loaded when a field is wrong or still to be given, and whatever the stages raise."""
    dry_run(recipe).raise_if_wrong()
    if recipe.sae.id is None:
        raise RecipeError(f"sae.id is to be given: {recipe.sae.to_be_given}", hint="--set sae.id=DIRECTORY")
    _write_down(recipe, out)
    with stages.stage("Loading"):
        study = load_study(recipe)
    told = {"name": recipe.name, "paper": recipe.paper, "method": recipe.method.kind}
    run = run_study(study, out, request_of(recipe), stages, recipe=told)
    if recipe.judges.preference is not None and run.chosen.arm is not None:
        with stages.stage("Asking whose replies serve better"):
            _prefer(recipe.judges.preference, run.chosen.arm, out)
    part = recipe.multiturn
    if part is None or part.attacker is None:
        return Ran(run, None)
    return Ran(run, attacks.run_multiturn(_attack(recipe, part, out), out / "multiturn", stages))


def _prefer(preference: str, chosen: str, out: Path) -> None:
    """Write `preference.json`: the chosen arm's replies to harmless prompts against the baseline's, suite by suite."""
    found = run_compare(f"{out}:{BASELINE.name}", chosen, preference)
    write_json(out / PREFERENCE, {"schema": 1, "kind": "preference", "arms": found.preferences})


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
        plans=(out / PLAN, *([out / UNGATED] if recipe.gate is not None else [])),
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


def request_of(recipe: Recipe) -> StudyRequest:
    """The recipe as a request for a study."""
    measure = recipe.measure
    answering = Answering(EVERY, measure.kl_prompts, measure.batch_rows, measure.max_new_tokens)
    sizes = Sizes(EVERY, EVERY, EVERY, finalists=0, calibration=EVERY, answering=answering)
    return StudyRequest(sizes, sweep=False, published=published_of(recipe), likelihood=measure.likelihood)


def published_of(recipe: Recipe) -> PublishedRequest:
    """The recipe's method with its settings, its gate and its controls."""
    method, gate, controls = recipe.method, recipe.gate, recipe.controls
    single = isinstance(method, SinglePromptClamp)
    return PublishedRequest(
        _clamping(method) if single else _refining(method),
        GateChoice(gate.budget, gate.confidence, gate.max_features, wrapped=0) if gate else None,
        ControlsRequest(controls.random, controls.match, controls.texts, controls.unrelated) if controls else None,
        Prompt("asked", (Message("user", method.prompt),), "asked") if single and method.prompt else None,
        None if single else _contrast(method),
        judge_named(recipe.judges.refusals),
        content_hash(recipe.model_dump(mode="json")),
    )


def _clamping(method: SinglePromptClamp) -> Make:
    settings = ClampSettings(
        screened_at=method.value,
        tried=(method.value,),
        curve=method.clamps,
        finalists=method.finalists,
        min_tokens=method.min_tokens,
        candidates=method.candidates,
        scope=method.scope,
        operator=method.operator,
        error_term=method.error_term,
        share=1.0,
        feature=method.feature,
    )
    return lambda ground: clamp_of_one_refusal(ground, settings, "single-prompt clamp")


def _refine_settings(method: ContrastRefine) -> RefineSettings:
    return RefineSettings(
        features=method.features,
        multiples=method.sizes,
        kl=method.kl_budget,
        min_gain=method.min_gain,
        set_size=method.set_size,
        rounds=method.rounds,
        factors=method.factors,
        curve=method.multiples,
        scope=method.scope,
        literal=method.literal,
    )


def _refining(method: ContrastRefine) -> Make:
    return lambda ground: score_and_refine(ground, _refine_settings(method), "refined")


def _contrast(method: ContrastRefine) -> ContrastSettings:
    floor = {"min_firing_rate": method.min_firing_rate, "w_diff": method.w_diff, "w_var": method.w_var}
    return contrast_settings(method.pooling, _refine_settings(method), **floor)


def load_study(recipe: Recipe) -> Study:
    """Model, SAE, prompts and judge. Raises `RecipeError` when they are not what the recipe says."""
    lm, sae = load_pair(recipe.model.id, str(recipe.sae.id), recipe.sae.site)
    _check_stated(recipe, lm, sae)
    judge = judge_named(recipe.judges.verdicts)
    check_not_under_test(judge, lm.name, lm.revision)
    return Study(lm, sae, prompts_of(recipe), judge, judge.name, recipe.seed)


def prompts_of(recipe: Recipe) -> StudyPrompts:
    """The recipe's suites by split. What is only tested informs nothing, whatever its role."""
    suites = {
        (split, name): sources.load(source, name, split, recipe.seed)
        for split in Split
        if split.value in recipe.prompts.model_fields_set
        for name, source in recipe.prompts.sources(split.value).items()
    }

    def draw(name: str, split: Split, n: int | None) -> Suite:
        found = suites.get((split, name))
        if found is None:
            kind = next(suite for (_, other), suite in suites.items() if other == name)
            return replace(kind, prompts=())
        return found if n is None else found.take(n)

    order = [name for (split, name) in suites if split is Split.TEST]
    names = dict.fromkeys([*order, *(name for _, name in suites)])
    kinds = {name: next(suite for (_, other), suite in suites.items() if other == name) for name in names}
    return StudyPrompts(recipe.name, {name: role_of(suite) for name, suite in kinds.items()}, draw)


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
