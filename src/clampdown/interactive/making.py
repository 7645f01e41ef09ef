"""Features that were found, and plans made of them: clamps, additions, gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clampdown.cards import Card
from clampdown.config import ORGANISM
from clampdown.discovery.finders import DEFAULT, run_finder
from clampdown.discovery.subspace import find_subspace
from clampdown.errors import PlanError, StrengthError
from clampdown.interactive.given import ground_of, own_prompts, pair_of, plan_of, progress, saes_for, study_of
from clampdown.interactive.loading import AnyPlan, AnySae, Feature, Judged, Model, load
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.gate_fitting import FittedGate
from clampdown.steering.plan import Edit, Plan
from clampdown.steering.units import Strength, Unit, calibrate, resolve
from clampdown.study import gate as gating
from clampdown.study.along import Along, plan_along
from clampdown.study.card import make_card
from clampdown.study.correcting import RANK, correct
from clampdown.study.plan import CORRECT, DIRECTION_PROMPTS, ERROR_TERMS
from clampdown.study.prompts import StudyPrompts, embedded_prompts
from clampdown.study.sizes import Sizes
from clampdown.types import FeatureScore, FeatureSet, PromptRole, Split

CARD_PROMPTS = 60


def find(
    lm: Model,
    sae: AnySae,
    data: StudyPrompts,
    finder: str = DEFAULT,
    *,
    judge: Judged = None,
    size: str | Sizes = "small",
    seed: int = 0,
) -> FeatureSet:
    """Features that cause refusal, best first, by one finder (`clampdown discover --help` names them).

    Reads discovery prompts only. Raises `PromptSetError` for an unknown finder or missing prompts.
    """
    ground = ground_of(study_of(lm, sae, data, judge, seed), size)
    with ground.stages.stage(f"Finding: {finder}") as tick:
        return run_finder(finder, replace(ground.given, on_progress=tick))


def card(
    lm: Model, sae: AnySae, feature: Feature, data: StudyPrompts | None = None, sets: Sequence[FeatureSet] = ()
) -> Card:
    """What is known of one feature: what it promotes, where it fires, its strongest discovery prompts, its scores."""
    model, loaded = pair_of(lm, sae)
    shown = (data or own_prompts(model)).prompts(Split.DISCOVERY, CARD_PROMPTS)
    return make_card(model, loaded, _index(feature), shown, list(sets))


def clamp(
    lm: Model,
    sae: AnySae,
    feature: Feature | Sequence[Feature],
    strength: str | float,
    *,
    scope: str = "prompt",
    operator: str = "clamp",
    error_term: str = "keep",
    rank: int = RANK,
    data: StudyPrompts | None = None,
    name: str | None = None,
) -> Plan:
    """A plan that clamps features: x' = x + (c - a_f(x)) W_dec[f] (2411.11296).

    `strength` is a raw activation (12), or a multiple of the feature's own largest ("1.5max") or p99 ("1.5p99")
    activation: that of a found feature's own prompts, else of `data`'s discovery prompts. With `error_term="correct"`
    the SAE's error is passed on within `rank` directions, fitted on benign discovery prompts. Raises `StrengthError`,
    `FeatureIndexError` and `PlanError`.
    """
    model, loaded = pair_of(lm, sae)
    if error_term not in ERROR_TERMS:
        raise PlanError(f"error term '{error_term}' is not known", hint=f"one of: {', '.join(ERROR_TERMS)}")
    features = list(feature) if isinstance(feature, Sequence) else [feature]
    indices = tuple(map(_index, features))
    asked = Strength.parse(str(strength))
    values = _values(model, loaded, features, asked, operator, data)
    edit = Edit(
        site=loaded.cfg.site.name,
        operator=operator,
        features=indices,
        strengths=values,
        scope=scope,
        error_term="drop" if error_term == "drop" else "keep",
    )
    loaded.select(indices)  # says at once that a feature does not exist
    plan = Plan.of(model, [loaded], [edit], name or f"{operator} {'+'.join(map(str, indices))} at {strength}, {scope}")
    if error_term != CORRECT:
        return plan
    shown = (data or own_prompts(model)).prompts(Split.DISCOVERY, DIRECTION_PROMPTS, PromptRole.BENIGN)
    return correct(model, loaded, plan, shown, rank)


def add(lm: Model, sae: AnySae, feature: Feature | Sequence[Feature], strength: str | float, **options: Any) -> Plan:
    """A plan that adds features' decoder rows at constant amounts (2511.00029); options as for `clamp`."""
    return clamp(lm, sae, feature, strength, operator="add", **{"scope": "all", **options})


def along(
    lm: Model,
    sae: AnySae,
    data: StudyPrompts,
    directions: int = 3,
    strength: str | float = "1gap",
    *,
    operator: str = "floor_direction",
    scope: str = "prompt",
    name: str = "",
) -> Plan:
    """A plan that edits along several directions of refusal at the SAE's site, found on discovery prompts.

    `1gap` is as far as harmful prompts are, 0 where harmless ones are. Raises `NotEnoughDataError` when there are fewer
    directions, `PlanError` for an operator on features, `StrengthError`.
    """
    model, loaded = pair_of(lm, sae)
    asked = Along(operator, Strength.parse(str(strength)), scope)
    asked.check()
    harmful, harmless = (
        data.prompts(Split.DISCOVERY, DIRECTION_PROMPTS, role) for role in (PromptRole.HARMFUL, PromptRole.BENIGN)
    )
    found = find_subspace(model, harmful, harmless, loaded.cfg.site, directions)
    return plan_along(model, loaded, found, asked, (*harmful, *harmless), name)


def gate(
    lm: Model,
    plan: AnyPlan,
    data: StudyPrompts,
    *,
    budget: float = 0.02,
    confidence: float = 0.95,
    kind: str = "probe",
    least: float = 1.0,
    seed: int = 0,
) -> FittedGate:
    """A gate for the plan's harmful prompts: fitted on discovery prompts, and with `confidence` at most `budget` of
    benign conversations trigger it. `plan.behind(gate)` puts the plan behind it. With `least` below 1 the plan's
    strength grows with the gate's score, from that share of it at the threshold.

    Raises `NotEnoughDataError`, naming the number of prompts that would do.
    """
    model, found = load(lm), plan_of(plan)
    request = gating.Request(Path("plan.toml"), kind, budget, confidence, seed=seed, data=data, least=least)
    return gating.gate_for(request, model, saes_for([found], model), found, progress())


def _index(feature: Feature) -> int:
    return feature.feature if isinstance(feature, FeatureScore) else feature


def _values(
    lm: LanguageModel,
    sae: Sae,
    features: Sequence[Feature],
    asked: Strength,
    operator: str,
    data: StudyPrompts | None,
) -> tuple[float, ...]:
    """Raw strengths: from what the features' finder saw, else from a pass over discovery prompts."""
    if asked.unit is Unit.RAW:
        return (asked.value,) * len(features)
    own = {Unit.MAX: "max_activation", Unit.P99: "p99_activation"}.get(asked.unit)
    scores: list[Mapping[str, float]] = [f.scores if isinstance(f, FeatureScore) else {} for f in features]
    if own and operator != "scale" and all(own in each for each in scores):
        return tuple(asked.value * each[own] for each in scores)
    if data is None and lm.name != ORGANISM:
        raise StrengthError(
            f"'{asked}' is relative to what features do on prompts, and there are none",
            hint="clamp(..., data=data), a feature that was found, or a raw strength such as 12",
        )
    roles = (PromptRole.HARMFUL, PromptRole.JAILBROKEN, PromptRole.BENIGN)
    shown = (data or embedded_prompts()).prompts(Split.DISCOVERY, CARD_PROMPTS, *roles)
    calibration = calibrate(lm, sae.cfg.site, sae.select([_index(f) for f in features]), shown)
    return resolve([asked], operator, calibration)
