"""The second paper's method (Bhargav & Zhu, 2511.00029): contrast score, then strengths of both signs, then refinement.

1. Score every feature by the contrast of harmful and harmless discovery prompts (its composite score).
2. Add the best at multiples of their own largest activation, both signs; gain is the refusal log-odds on validation
   attacks, cost the KL on benign ones.
3. Refine over rounds: drop what does not help, join, rescore around what does, up to `set_size` features.
4. `factors` of the refined set answer validation prompts; refusals choose.
5. The test shows the choice with its signs turned, and the best-scored feature at every multiple of `curve`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clampdown.discovery.contrast import ContrastSettings
from clampdown.discovery.finders import run_finder
from clampdown.discovery.refine import Clamps, Limits, Measure, refine
from clampdown.discovery.screening import BenignKl, PrefillRefusal
from clampdown.errors import NotEnoughDataError
from clampdown.evaluation.controls import with_strengths
from clampdown.steering.arms import Arm
from clampdown.steering.plan import Edit, Plan
from clampdown.study.groundwork import Groundwork
from clampdown.study.methods.method import Method, arm_of, by_refusals, plan_of
from clampdown.types import ArmKind, FeatureSet

NAME = "score + refine (2511.00029)"
TURNED = "signs turned"
Attempts = dict[Clamps, dict[str, Any]]
"""What was tried: the clamps, their gain, and their cost where that was measured (None where nothing asked for it)."""


@dataclass(frozen=True, slots=True)
class RefineSettings:
    """How the method is run; see the module. `kl`: nats per token that a set may cost (None: the finders' effort)."""

    features: int = 4
    multiples: tuple[float, ...] = (0.5, 1.0, 2.0)
    kl: float | None = None
    min_gain: float = 0.1
    set_size: int = 2
    rounds: int = 2
    factors: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)
    curve: tuple[float, ...] = ()
    scope: str = "all"
    literal: bool = False


def score_and_refine(ground: Groundwork, settings: RefineSettings | None = None, name: str = NAME) -> Method:
    """The method's arms. Raises `NotEnoughDataError` when no scored feature ever fired."""
    settings = settings or RefineSettings()
    found = run_finder("contrast-literal" if settings.literal else "contrast", ground.given)
    units = {score.feature: score.scores["max_activation"] for score in found.features}
    pool = _both_signs(found.ranking[: settings.features], units)
    if not pool:
        raise NotEnoughDataError(
            f"none of the {settings.features} best-scored features ever fired, so none has a strength to start from",
            hint="the score as published gives dead features full marks: do not ask for its literal form",
        )
    tried: Attempts = {}
    with ground.stages.stage("Adding, and refining"):
        refined = _refined(ground, settings, found, units, tried)
    clamps = refined.clamps if refined else pool[0].scaled(settings.multiples[0])
    note = "" if refined else "no feature at any multiple gained within the KL budget; the best-scored one is shown"
    arms = tuple(_arm(ground, settings, clamps.scaled(f), f"refined x{f:g}", name) for f in settings.factors)

    def shown(chosen: Arm) -> tuple[Arm, ...]:
        return (turned(chosen), *_curve(ground, settings, pool[0]))

    facts = {"note": note, "refined": refined, "tried": list(tried.values())}
    return Method(name, ArmKind.FEATURE, arms, by_refusals, found, shown, facts)


def _both_signs(features: Sequence[int], units: dict[int, float]) -> list[Clamps]:
    """Each feature at plus and minus its own largest activation; one that never fired has none."""
    alive = [feature for feature in dict.fromkeys(features) if units.get(feature, 0.0) > 0]
    return [Clamps((feature,), (sign * units[feature],)) for feature in alive for sign in (1.0, -1.0)]


def _refined(
    ground: Groundwork,
    settings: RefineSettings,
    found: FeatureSet,
    units: dict[int, float],
    tried: Attempts,
) -> Any:
    """The refined set with its outcome; None when nothing gains within the budget. `tried` gets all that was tried."""
    measure = _measure(ground, settings, tried)

    def rescore(kept: Clamps) -> list[Clamps]:
        return _both_signs([*kept.features, *found.ranking[: 2 * settings.features]], units)

    budget = ground.effort.kl if settings.kl is None else settings.kl
    sizes = tuple(sorted({abs(multiple) for multiple in settings.multiples}))
    most = ground.tries(ground.tempting_tokens)
    limits = Limits(budget, settings.min_gain, settings.set_size, settings.rounds, multiples=sizes, sets=most)
    try:
        return refine(_both_signs(found.ranking[: settings.features], units), measure, rescore, limits).best
    except NotEnoughDataError:
        return None


def _measure(ground: Groundwork, settings: RefineSettings, tried: Attempts) -> Measure:
    """Gain in refusal log-odds, and cost in benign KL, of adding features, on validation prompts."""
    study = ground.study
    refusal = PrefillRefusal(study.lm, study.sae, ground.tempting, ground.tokens)
    kl = BenignKl(study.lm, study.sae, ground.benign)

    def added(sets: Sequence[Clamps]) -> list[Plan]:
        return [additive(ground, clamps, settings.scope, "add") for clamps in sets]

    def gain(sets: Sequence[Clamps]) -> list[float]:
        gains = refusal(added(sets))
        for clamps, found in zip(sets, gains, strict=True):
            tried.setdefault(clamps, {"clamps": clamps, "gain": found, "cost": None})
        return gains

    def cost(sets: Sequence[Clamps]) -> list[float]:
        costs = kl(added(sets))
        for clamps, found in zip(sets, costs, strict=True):
            tried[clamps]["cost"] = found
        return costs

    return Measure(gain, cost)


def additive(ground: Groundwork, clamps: Clamps, scope: str, name: str) -> Plan:
    """strength * W_dec[feature] added, whatever the activation."""
    study = ground.study
    edit = Edit(site=study.site.name, operator="add", features=clamps.features, strengths=clamps.strengths, scope=scope)
    return Plan.of(study.lm, [study.sae], [edit], name)


def _arm(ground: Groundwork, settings: RefineSettings, clamps: Clamps, name: str, group: str) -> Arm:
    return arm_of(additive(ground, clamps, settings.scope, name), group)


def _curve(ground: Groundwork, settings: RefineSettings, first: Clamps) -> list[Arm]:
    """The best-scored feature at every multiple: the paper's figure."""
    name = f"best-scored {first.features[0]}"
    unit = Clamps(first.features, tuple(map(abs, first.strengths)))
    return [_arm(ground, settings, unit.scaled(m), f"{name} x{m:g}", name) for m in sorted(settings.curve)]


def turned(arm: Arm) -> Arm:
    """The same edit in the other direction."""
    plan = plan_of(arm)
    opposite = [-s for edit in plan.edits for s in edit.strengths]
    return arm_of(with_strengths(plan, opposite, f"{arm.name}, {TURNED}"), arm.group, arm.kind)


def contrast_settings(pooling: str, settings: RefineSettings, **more: Any) -> ContrastSettings:
    """What the score reads: enough features are kept for rescoring."""
    return ContrastSettings(pooling=pooling, top=max(64, 2 * settings.features), **more)
