"""The causal check: clamp each finalist and measure what it does to refusal. Correlation proposes, this decides.

1. `make_plan` turns a candidate into a plan; `measure` maps many plans to one number each. Many plans come at once so
   that a measure can let them share batches, every row steered by its own plan.
2. `screening.PrefillRefusal` is the cheap measure: the mean change of the refusal log-odds at the first reply token
   over validation prompts. No generation, and the blocks below the site run once for all plans.
3. A caller that generates and judges replies passes its own measure for the few that remain (`REFUSAL_GAIN`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from clampdown.errors import NotEnoughDataError
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.plan import Edit, Plan
from clampdown.types import FeatureScore, FeatureSet, ScoreSource

REFUSAL_LOG_ODDS = "clamp_refusal_log_odds"
REFUSAL_GAIN = "clamp_refusal_gain"

Measure = Callable[[Sequence[Plan]], Sequence[float]]
MakePlan = Callable[[FeatureScore], Plan]


def clamp_plan(lm: LanguageModel, sae: Sae, feature: int, value: float, scope: str = "all") -> Plan:
    """The first paper's edit: one feature set to `value` (raw activation units), error term kept."""
    edit = Edit(site=sae.cfg.site.name, operator="clamp", features=(feature,), strengths=(value,), scope=scope)
    return Plan.of(lm, [sae], [edit], f"clamp-{feature}")


def clamp_at_multiple(lm: LanguageModel, sae: Sae, multiple: float, scope: str = "all") -> MakePlan:
    """Plans that clamp a candidate at a multiple of the largest activation its finder saw."""
    return lambda found: clamp_plan(lm, sae, found.feature, multiple * found.scores["max_activation"], scope)


def clamp_at_norm(lm: LanguageModel, sae: Sae, length: float, scope: str = "all") -> MakePlan:
    """Plans that clamp a candidate so that, where it was silent, the edit has this length: the same for every
    candidate, so that none wins by the size of its decoder row or of its activations."""
    lengths = sae.W_dec.float().norm(dim=1).clamp(min=1e-12)
    return lambda found: clamp_plan(lm, sae, found.feature, length / float(lengths[found.feature]), scope)


def merge_effects(
    found: FeatureSet, effects: Mapping[int, float], score: str, source: ScoreSource | None = None
) -> FeatureSet:
    """The set with `effects` (feature -> value) added as a score and ranked by it; untested features follow in their
    old order. `source` says where the effects come from, which is rarely where the set does."""
    scored = tuple(
        dataclasses.replace(f, scores={**f.scores, score: effects[f.feature]}) if f.feature in effects else f
        for f in found.features
    )
    tested = sorted((f for f in scored if f.feature in effects), key=lambda f: -effects[f.feature])
    rest = [f for f in scored if f.feature not in effects]
    sources = found.sources if source is None else {**found.sources, score: source}
    return dataclasses.replace(found, features=(*tested, *rest), ranked_by=score, sources=sources)


def rank_by_effect(
    found: FeatureSet,
    make_plan: MakePlan,
    measure: Measure,
    *,
    score: Literal["clamp_refusal_log_odds", "clamp_refusal_gain"] | str = REFUSAL_LOG_ODDS,
    top: int | None = None,
    source: ScoreSource | None = None,
) -> FeatureSet:
    """Clamp the set's first `top` candidates (default: all) and rank them by their measured effect, largest first.

    Raises `NotEnoughDataError` when the set is empty.
    """
    candidates = found.features[:top]
    if not candidates:
        raise NotEnoughDataError(f"the finder '{found.finder}' proposed no features to test")
    effects = measure([make_plan(candidate) for candidate in candidates])
    by_feature = {c.feature: float(e) for c, e in zip(candidates, effects, strict=True)}
    return merge_effects(found, by_feature, score, source)
