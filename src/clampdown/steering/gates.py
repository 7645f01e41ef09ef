"""Gates: whether a conversation is steered at all, with a stated bound on how often benign ones are.

1. Fit a sparse linear probe (L1 logistic regression) on pooled SAE activations of harmful and harmless prompts.
2. Set its threshold on benign calibration prompts that the probe never saw: the lowest threshold whose trigger rate
   has an exact binomial (Clopper-Pearson) upper bound within the benign budget, at the stated confidence.

Step 2 is distribution-free. For n independent scores, the chance that a new prompt scores above the (k+1)-th largest
follows Beta(k+1, n-k), whose `confidence` quantile is the Clopper-Pearson bound itself: choosing the threshold on the
calibration scores costs nothing extra.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from scipy.sparse import csr_array, hstack
from scipy.stats import beta
from sklearn.linear_model import LogisticRegression

from clampdown.errors import NotEnoughDataError
from clampdown.steering.plan import Gate, Guarantee

Pooled = Mapping[str, csr_array]
"""Activations pooled over each prompt, [prompts, d_sae] per pooling."""


def _shape(pooled: Pooled) -> tuple[int, int]:
    """(prompts, d_sae), the same for every pooling."""
    first: Any = next(iter(pooled.values()))
    return first.shape[0], first.shape[1]


@dataclass(frozen=True, slots=True)
class Probe:
    """score = bias + sum_i weights[i] * (activation of features[i], pooled by poolings[i])."""

    features: tuple[int, ...]
    poolings: tuple[str, ...]
    weights: tuple[float, ...]
    bias: float

    def scores(self, pooled: Pooled) -> Float[np.ndarray, " prompts"]:
        """Scores of prompts from their pooled activations."""
        total = np.full(_shape(pooled)[0], self.bias)
        for name in set(self.poolings):
            mine = [i for i, pooling in enumerate(self.poolings) if pooling == name]
            columns: Any = pooled[name][:, [self.features[i] for i in mine]]
            total += columns @ np.array([self.weights[i] for i in mine])
        return total


def fit_probe(
    pooled: Pooled,
    harmful: Bool[np.ndarray, " prompts"],
    *,
    max_features: int = 80,
    inverse_penalty: float = 10.0,
    seed: int = 0,
) -> Probe:
    """A probe on at most `max_features` (feature, pooling) pairs.

    The L1 penalty is relaxed until more pairs would be used; the chosen ones are then refitted with an L2 penalty
    (`inverse_penalty` is its C), because L1 shrinks the weights that it keeps. Raises `NotEnoughDataError` without
    prompts of both kinds.
    """
    if harmful.all() or not harmful.any():
        raise NotEnoughDataError("a gate needs both harmful and harmless prompts to learn from")
    names, width = list(pooled), _shape(pooled)[1]
    stacked = csr_array(hstack([pooled[name] for name in names]))
    scale = np.maximum(stacked.max(axis=0).toarray().ravel(), 1e-6)
    scaled: Any = csr_array(stacked.multiply(1.0 / scale))  # scipy's stubs do not know indexing by an array
    kept = _lasso_features(scaled, harmful, max_features, seed)
    model: Any = LogisticRegression(C=inverse_penalty, class_weight="balanced", max_iter=2000, random_state=seed)
    model.fit(scaled[:, kept], harmful)
    coefficients = model.coef_[0]
    return Probe(
        features=tuple(int(column % width) for column in kept),
        poolings=tuple(names[column // width] for column in kept),
        weights=tuple((coefficients / scale[kept]).tolist()),
        bias=float(model.intercept_[0]),
    )


def _lasso_features(
    scaled: csr_array, harmful: Bool[np.ndarray, " prompts"], max_features: int, seed: int
) -> np.ndarray:
    """The features of the weakest L1 penalty that uses at most `max_features`."""
    kept = np.array([], dtype=int)
    for strength in np.geomspace(0.003, 30, 14):
        model: Any = LogisticRegression(
            l1_ratio=1.0, C=strength, solver="liblinear", class_weight="balanced", max_iter=500, random_state=seed
        )
        used = np.flatnonzero(model.fit(scaled, harmful).coef_[0])
        if len(used) > max_features:
            break
        kept = used if len(used) else kept
    if not len(kept):
        raise NotEnoughDataError("no small set of features tells harmful from harmless prompts")
    return kept


def upper_bound(triggered: int, n: int, confidence: float) -> float:
    """One-sided exact (Clopper-Pearson) upper bound of a rate of which `triggered` of `n` were seen."""
    return 1.0 if triggered >= n else float(beta.ppf(confidence, triggered + 1, n - triggered))


def prompts_needed(budget: float, confidence: float) -> int:
    """The smallest n for which zero triggers already prove the budget."""
    return math.ceil(math.log(1 - confidence) / math.log(1 - budget))


def provable_budget(n: int, confidence: float) -> float:
    """The smallest budget that n prompts can prove, when none of them triggers; a hair more, so that rounding in the
    proof does not ask for one prompt too many."""
    return (1 - (1 - confidence) ** (1 / n)) * (1 + 1e-9)


def choose_threshold(
    benign_scores: Sequence[float] | np.ndarray,
    *,
    budget: float,
    confidence: float = 0.95,
    on: Literal["benign", "harmful"] = "benign",
) -> tuple[float, Guarantee]:
    """The lowest threshold that keeps triggers within `budget` on prompts like these, with its guarantee.

    They are benign ones (`on`), except for a gate that turns refusals down: that one must spare harmful prompts.

    Raises `NotEnoughDataError`, naming the n that would do, when even zero triggers could not prove the budget.
    """
    scores = np.sort(np.asarray(benign_scores, dtype=float))[::-1]
    n = len(scores)
    triggers = np.arange(n)
    allowed = triggers[beta.ppf(confidence, triggers + 1, n - triggers) <= budget]
    if not len(allowed):
        raise NotEnoughDataError(
            f"{n} {on} calibration prompts cannot show a trigger rate within {budget:g} at {confidence:.0%} confidence",
            hint=f"use at least {prompts_needed(budget, confidence)} prompts, or a larger budget",
        )
    threshold = float(scores[allowed[-1]])
    triggered = int((scores > threshold).sum())
    return threshold, Guarantee(
        budget=budget,
        confidence=confidence,
        n=n,
        triggered=triggered,
        bound=upper_bound(triggered, n, confidence),
        on=on,
    )


def make_gate(site: str, probe: Probe, threshold: float, guarantee: Guarantee | None = None) -> Gate:
    """The probe as a plan's gate."""
    return Gate(
        site=site,
        features=probe.features,
        poolings=probe.poolings,  # type: ignore[arg-type]  (checked by the model)
        weights=probe.weights,
        bias=probe.bias,
        threshold=threshold,
        guarantee=guarantee,
    )
