"""The first paper's method (O'Brien et al., 2411.11296): clamp a feature of one refusal.

1. Let the model refuse one harmful prompt; candidates are the features active on at least `min_tokens` of its tokens.
2. Clamp each at `screened_at`; the refusal log-odds on validation attacks rank them.
3. The best `finalists` answer validation prompts at every strength of `tried`; refusals choose.
4. The test shows the chosen feature at every strength of `curve`.

Strengths are raw values (the paper's 12), or multiples of the feature's own largest (1.5max) or p99 activation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from clampdown.discovery import causal
from clampdown.discovery.screening import PrefillRefusal
from clampdown.discovery.single_prompt import SinglePromptSettings, find_from_first_refusal
from clampdown.saes.sae import Sae
from clampdown.steering.arms import Arm
from clampdown.steering.plan import Plan
from clampdown.steering.units import Strength, Unit
from clampdown.study.groundwork import Groundwork
from clampdown.study.methods.method import Method, arm_of, by_rule, plan_of
from clampdown.study.strengths import Rule
from clampdown.types import ArmKind, FeatureScore, FeatureSet, ScoreSource

NAME = "clamp (2411.11296)"
UNITS = {Unit.RAW: None, Unit.MAX: "max_activation", Unit.P99: "p99_activation"}
"""The score of a found feature that is a unit's size."""


@dataclass(frozen=True, slots=True)
class ClampSettings:
    """How the method is run; see the module."""

    screened_at: str = "1max"
    tried: tuple[str, ...] = ("1max", "1.5max", "2max", "2.5max", "3max")
    curve: tuple[str, ...] = ()
    finalists: int = 1
    min_tokens: int = 2
    candidates: int | None = None
    scope: str = "all"
    operator: str = "clamp"
    error_term: str = "keep"
    share: float = 0.9
    """The smallest strength that reaches this share of the best gain is chosen."""
    feature: int | None = None
    """A feature that was named beforehand, in the place of those that the refusal shows."""


def clamp_of_one_refusal(ground: Groundwork, settings: ClampSettings | None = None, name: str = NAME) -> Method:
    """The method's arms. Raises `NotEnoughDataError` when the model refuses none of the prompts."""
    settings = settings or ClampSettings()
    found = _ranked(ground, settings)
    plan_at = clamper(ground, settings)
    finalists = found.features[: settings.finalists]
    arms = tuple(_arm(plan_at(score, text), score, text, name) for score in finalists for text in settings.tried)

    def shown(chosen: Arm) -> tuple[Arm, ...]:
        feature = plan_of(chosen).edits[0].features[0]
        score = next(each for each in finalists if each.feature == feature)
        return tuple(_arm(plan_at(score, text), score, text, f"clamp {feature}") for text in settings.curve)

    facts = {"candidates": len(found.features), "finalists": [score.feature for score in finalists]}
    facts["reply"] = found.settings.get("reply", "")
    return Method(name, ArmKind.FEATURE, arms, by_rule(Rule(share=settings.share)), found, shown, facts)


def _ranked(ground: Groundwork, settings: ClampSettings) -> FeatureSet:
    """The features of one refusal by the refusal log-odds that their clamps bring on validation prompts."""
    study, given = ground.study, ground.given
    top = settings.candidates or given.settings.top
    prompts = (given.only,) if given.only else given.harmful
    found = find_from_first_refusal(
        study.lm,
        study.sae,
        prompts,
        judge=given.judge,
        settings=SinglePromptSettings(min_tokens=settings.min_tokens, top=top),
    )
    if settings.feature is not None:
        found = replace(found, features=(_named(study.sae, found, settings.feature),))
    shown = ground.tempting
    source = ScoreSource("clamp", study.site.name, study.provenance(shown), n=len(shown))
    plan_at = clamper(ground, settings)
    with ground.stages.stage("Clamping the features of one refusal") as tick:
        measure = PrefillRefusal(study.lm, study.sae, shown, given.tokens, on_progress=tick)
        return causal.rank_by_effect(found, lambda s: plan_at(s, settings.screened_at), measure, source=source)


def _named(sae: Sae, found: FeatureSet, feature: int) -> FeatureScore:
    """A feature with what the refusal says of it. Raises `FeatureIndexError` for one that the SAE does not have."""
    sae.select([feature])
    known = next((score for score in found.features if score.feature == feature), None)
    return known or FeatureScore(feature, {})


def clamper(ground: Groundwork, settings: ClampSettings) -> Callable[[FeatureScore, str], Plan]:
    """Plans that clamp a found feature at a strength, in units of what its finder saw."""
    study = ground.study

    def plan_at(score: FeatureScore, text: str) -> Plan:
        strength = Strength.parse(text)
        unit = UNITS[strength.unit]
        value = strength.value * (1.0 if unit is None else score.scores[unit])
        plan = causal.clamp_plan(study.lm, study.sae, score.feature, value, settings.scope)
        asked = {"operator": settings.operator, "error_term": settings.error_term}
        return plan.changed(edits=tuple(edit.changed(**asked) for edit in plan.edits))

    return plan_at


def _arm(plan: Plan, score: FeatureScore, text: str, group: str) -> Arm:
    return arm_of(plan.named(f"clamp {score.feature} at {text}"), group)
