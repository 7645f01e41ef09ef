"""Finding the features that a study's clamp is chosen among.

The default finder (clamping finalists at equal benign KL) and the one-prompt finder (2411.11296) propose; both are
checked by clamping each finalist at its own largest activation and reading the refusal log-odds on validation attacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from clampdown.discovery import causal
from clampdown.discovery.finders import DEFAULT, run_finder
from clampdown.discovery.screening import PrefillRefusal
from clampdown.errors import NotEnoughDataError
from clampdown.study.groundwork import Groundwork
from clampdown.types import FeatureScore, FeatureSet, Prompt, ScoreSource

PROPOSERS = (DEFAULT, "single-prompt")
FALLBACK = "contrast"
"""What proposes when neither can: it needs no refusal of the model's own."""
CHECKED = 16


@dataclass(frozen=True, slots=True)
class Found:
    """What discovery found: a feature set per finder."""

    feature_sets: tuple[FeatureSet, ...]

    def finalists(self, n: int) -> list[FeatureScore]:
        """The causally strongest features of all finders, each once."""
        best: dict[int, FeatureScore] = {}
        for found in self.feature_sets:
            for score in found.features:
                if causal.REFUSAL_LOG_ODDS in score.scores:
                    best.setdefault(score.feature, score)
        ranked = sorted(best.values(), key=lambda s: -s.scores[causal.REFUSAL_LOG_ODDS])
        return ranked[:n]

    def unit(self, feature: int) -> float:
        """A found feature's largest activation."""
        scores = (s for found in self.feature_sets for s in found.features if s.feature == feature)
        return next(scores).scores["max_activation"]


def find_features(ground: Groundwork) -> Found:
    """Propose, then check. Raises `NotEnoughDataError` when no finder proposes a feature that ever fired."""
    stages, study = ground.stages, ground.study
    with stages.stage("Reading activations"):
        _ = ground.given.contrast
    proposals = []
    with stages.stage("Finding features"):
        for name in (*PROPOSERS, FALLBACK):
            if name == FALLBACK and proposals:
                break
            with stages.attempt(f"the finder {name}"):
                proposals.append(_alive(run_finder(name, ground.given)))
    if not proposals:
        raise NotEnoughDataError("no finder proposed a feature", hint="more harmful and benign discovery prompts")
    shown = ground.tempting
    with stages.stage("Clamping finalists") as tick:
        measure = PrefillRefusal(study.lm, study.sae, shown, ground.tokens, on_progress=tick)
        plans = causal.clamp_at_multiple(study.lm, study.sae, 1.0)
        source = ScoreSource("clamp at its maximum", study.site.name, study.provenance(shown), n=len(shown))
        sets = tuple(causal.rank_by_effect(each, plans, measure, top=CHECKED, source=source) for each in proposals)
    return Found(sets)


def _alive(found: FeatureSet) -> FeatureSet:
    """Without features that never fired: they have no strength. Raises `NotEnoughDataError` when none is left."""
    alive = tuple(score for score in found.features if score.scores.get("max_activation", 0.0) > 0)
    if not alive:
        raise NotEnoughDataError("none of the proposed features ever fired on the discovery prompts")
    return replace(found, features=alive)


def with_gains(ground: Groundwork, found: Found, gains: Mapping[int, float], shown: Sequence[Prompt]) -> Found:
    """The feature sets with each swept finalist's best refusal share on validation prompts as a score."""
    study = ground.study
    source = ScoreSource("best strength on validation", study.site.name, study.provenance(shown), n=len(shown))
    sets = [
        causal.merge_effects(s, {f: g for f, g in gains.items() if f in s.ranking}, "validation_refusal", source)
        if set(gains) & set(s.ranking)
        else s
        for s in found.feature_sets
    ]
    return Found(tuple(sets))
