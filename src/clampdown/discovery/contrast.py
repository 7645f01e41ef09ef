"""The contrast finder of Bhargav & Zhu (2511.00029): which features differ between harmful and harmless prompts.

With a_f pooled per prompt:
    diff_mean_f      = mean_harmful(a_f) - mean_harmless(a_f)
    norm_diff_mean_f = diff_mean_f / max_f |diff_mean_f|
    norm_var_f       = var_f / max_f var_f                         var over the prompts of both sets
    composite_f      = w_diff |norm_diff_mean_f| + w_var (1 - norm_var_f),  rescaled so that the best scores 1.0
    strategy_f       = -1 (suppress) if norm_diff_mean_f > 0, +1 (amplify) if < 0, 0 if neither

As published, a dead feature gets full marks on the variance term, and the feature that separates the sets best gets
none: a large difference between the sets is itself variance over both. `literal` ranks so. By default a feature must
fire on a minimum share of the prompts of one set, and d' ranks: the same difference against the spread within the sets.
AUROC, Mann-Whitney with Benjamini-Hochberg and the alignment with the dense direction come from the same pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.sparse import csr_array

from clampdown.activations.collect import Progress, collect
from clampdown.activations.statistics import Moments
from clampdown.activations.store import ActivationStore
from clampdown.activations.stream import Budget, Pass, plan_pass, read_sae
from clampdown.discovery.directions import direction_between
from clampdown.discovery.ranking import Finding, build_feature_set, make_provenance
from clampdown.discovery.separation import d_prime, separate
from clampdown.errors import PromptSetError
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.types import FeatureSet, Prompt

PerFeature = Float[np.ndarray, " d_sae"]


@dataclass(frozen=True, slots=True)
class ContrastSettings:
    """How to rank. `min_firing_rate` is the share of one set's prompts on which a feature must fire (ignored when
    `literal`); `top` is how many features to keep; `ranked_by` names any score, larger is better: by default d', or
    the composite when `literal`."""

    pooling: str = "assistant_start"
    w_diff: float = 0.5
    w_var: float = 0.5
    min_firing_rate: float = 0.05
    literal: bool = False
    ranked_by: str | None = None
    top: int = 64

    @property
    def score(self) -> str:
        """The name of the score that ranks."""
        return self.ranked_by or ("composite" if self.literal else "d_prime")


@dataclass(frozen=True)
class Contrast:
    """Harmful and harmless prompts (`harmful` is True on the former), and what one pass over all of them found.

    Gates are fitted on the same matrices.
    """

    activations: ActivationStore
    harmful: Bool[np.ndarray, " prompts"]

    @classmethod
    def of(cls, activations: ActivationStore, n_harmful: int) -> Contrast:
        """A pass whose first `n_harmful` prompts are the harmful ones."""
        return cls(activations, np.arange(len(activations.prompts)) < n_harmful)

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        return self.activations.prompts

    def sides(self, pooling: str) -> tuple[csr_array, csr_array]:
        """Harmful and harmless prompts x d_sae. Raises `PromptSetError` for a pooling that was not read."""
        return self.activations.matrix(pooling, self.harmful), self.activations.matrix(pooling, ~self.harmful)

    def moments(self, pooling: str) -> tuple[Moments, Moments]:
        """Moments of the harmful and of the harmless prompts. Raises `PromptSetError` as `sides` does."""
        return self.activations.moments(pooling, self.harmful), self.activations.moments(pooling, ~self.harmful)

    @property
    def peaks(self) -> csr_array:
        """Each prompt's largest activation at any token that was read, under whatever pooling."""
        first, *others = (self.activations.matrix(name) for name in self.activations.poolings)
        for other in others:
            first = csr_array(first.maximum(other))
        return first


def plan_contrast(
    lm: LanguageModel,
    sae: Sae,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    poolings: Sequence[str] = ("assistant_start", "max"),
    budget: Budget | None = None,
) -> Pass:
    """The pass over both sets, harmful prompts first. Raises `PromptSetError` when either is empty."""
    if not harmful or not harmless:
        raise PromptSetError("a contrast needs prompts of both kinds", hint="label some harmful and some harmless")
    return plan_pass(lm, [read_sae(sae, *poolings, dense=("assistant_start",))], [*harmful, *harmless], budget)


def collect_contrast(
    lm: LanguageModel,
    sae: Sae,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    poolings: Sequence[str] = ("assistant_start", "max"),
    *,
    budget: Budget | None = None,
    on_progress: Progress | None = None,
) -> Contrast:
    """One pass over both sets, in memory. Raises as `plan_contrast`."""
    job = plan_contrast(lm, sae, harmful, harmless, poolings, budget)
    return Contrast.of(collect(job, on_progress), len(harmful))


def _over_largest(values: PerFeature) -> PerFeature:
    largest = np.abs(values).max(initial=0.0)
    return values / largest if largest > 0 else np.zeros_like(values)


def composite_scores(
    harmful: Moments, harmless: Moments, settings: ContrastSettings, eligible: Bool[np.ndarray, " d_sae"] | None = None
) -> dict[str, PerFeature]:
    """The published scores of every feature; the composite is rescaled by the best eligible one (default: all)."""
    difference = harmful.mean - harmless.mean
    norm_diff = _over_largest(difference)
    norm_var = _over_largest(harmful.merge(harmless).variance)
    composite = settings.w_diff * np.abs(norm_diff) + settings.w_var * (1 - norm_var)
    best = composite.max(initial=0.0, where=True if eligible is None else eligible)
    return {
        "composite": composite / best if best > 0 else composite,
        "diff_mean": difference,
        "norm_diff_mean": norm_diff,
        "norm_var": norm_var,
        "strategy": -np.sign(norm_diff),
    }


def eligible_features(contrast: Contrast, settings: ContrastSettings) -> Bool[np.ndarray, " d_sae"]:
    """Features that may be ranked: all of them as published, else the ones that fire often enough somewhere."""
    harmful, harmless = contrast.moments(settings.pooling)
    if settings.literal:
        return np.ones(len(harmful.mean), dtype=bool)
    rate = np.maximum(harmful.firing_rate, harmless.firing_rate)
    return (rate > 0) & (rate >= settings.min_firing_rate)


def contrast_scores(sae: Sae, contrast: Contrast, settings: ContrastSettings) -> dict[str, PerFeature]:
    """Every score of every feature of the SAE, one array [d_sae] each."""
    harmful, harmless = contrast.moments(settings.pooling)
    separation = separate(*contrast.sides(settings.pooling))
    direction = direction_between(contrast.activations, contrast.harmful)
    return composite_scores(harmful, harmless, settings, eligible_features(contrast, settings)) | {
        "firing_rate_harmful": harmful.firing_rate,
        "firing_rate_harmless": harmless.firing_rate,
        "auroc": separation.auroc,
        "q_value": separation.q_value,
        "d_prime": d_prime(harmful, harmless),
        "alignment": direction.cosine(sae.W_dec.double().cpu().numpy()),
    }


def best_first(
    scores: dict[str, PerFeature], eligible: Bool[np.ndarray, " d_sae"], settings: ContrastSettings
) -> list[int]:
    """Eligible features, best first; equal scores by feature index; features without the score come last."""
    if settings.score not in scores:
        raise PromptSetError(f"no score is called '{settings.score}'", hint=f"one of: {', '.join(scores)}")
    ranked_by = np.where(np.isfinite(scores[settings.score]), scores[settings.score], -np.inf)
    order = np.argsort(-ranked_by, kind="stable")
    ranked = order[eligible[order]][: settings.top].tolist()
    if not ranked:
        raise PromptSetError(
            f"no feature fires often enough (on a share of {settings.min_firing_rate:g} of either set's prompts)",
            hint="give more prompts, another pooling, or a lower minimum firing rate",
        )
    return ranked


def find_by_contrast(
    lm: LanguageModel, sae: Sae, contrast: Contrast, settings: ContrastSettings | None = None, *, seed: int = 0
) -> FeatureSet:
    """Rank the SAE's features by how they differ between the two prompt sets.

    Raises `PromptSetError` when the contrast was collected without `settings.pooling`, or for an unknown score.
    """
    settings = settings or ContrastSettings()
    scores = contrast_scores(sae, contrast, settings)
    finding = Finding(
        finder="contrast-literal" if settings.literal else "contrast",
        ranked_by=settings.score,
        scores=scores,
        order=best_first(scores, eligible_features(contrast, settings), settings),
        peaks=contrast.peaks,
        texts=[prompt.text for prompt in contrast.prompts],
        settings={name: str(value) for name, value in dataclasses.asdict(settings).items()},
    )
    return build_feature_set(lm, sae, finding, make_provenance(lm, sae, contrast.prompts, seed))
