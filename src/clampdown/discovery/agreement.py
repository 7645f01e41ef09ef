"""How far two rankings of features agree: rank correlation, overlap at the top, and what moved most.

Feature indices of different SAEs mean different things. There, a feature of the first SAE stands for the feature of the
second whose decoder row is nearest (largest cosine), if it is near enough; what has no counterpart is counted.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from scipy.stats import rankdata

from clampdown.errors import FeatureSetError, NotEnoughDataError
from clampdown.featuresets import Agreement, Mover
from clampdown.types import FeatureSet

SAME_FEATURE = 0.7
"""Cosine of decoder rows from which two SAEs' features count as the same."""
OVERLAPS = (10, 50)
MOVERS = 8


def counterparts(
    first: Float[np.ndarray, "n d_in"], second: Float[np.ndarray, "m d_in"], minimum: float = SAME_FEATURE
) -> dict[int, int]:
    """Feature of the first SAE -> its nearest feature of the second by decoder cosine, where that reaches `minimum`."""
    unit = second / np.linalg.norm(second, axis=1, keepdims=True).clip(min=1e-12)
    found = {}
    for start in range(0, len(first), 1024):
        rows = first[start : start + 1024]
        cosines = rows @ unit.T / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)
        nearest = cosines.argmax(axis=1)
        near = cosines[np.arange(len(rows)), nearest] >= minimum
        found |= {start + i: int(nearest[i]) for i in np.flatnonzero(near).tolist()}
    return found


def compare_sets(
    first: FeatureSet, second: FeatureSet, scores: tuple[str, str], matched: Mapping[int, int] | None = None
) -> Agreement:
    """Compare a score of each set, larger is better. `matched` maps the first SAE's features to the second's, None when
    both are about one SAE. Raises `FeatureSetError` for a score that a set has not, `NotEnoughDataError` below three
    features with both scores."""
    a, b = _values(first, scores[0]), _values(second, scores[1])
    pairs = [(f, f if matched is None else matched.get(f)) for f in np.flatnonzero(np.isfinite(a)).tolist()]
    shared = [(f, g) for f, g in pairs if g is not None and g < len(b) and np.isfinite(b[g])]
    if len(shared) < 3:
        raise NotEnoughDataError(
            f"only {len(shared)} features have both '{scores[0]}' and '{scores[1]}': three are needed to compare",
            hint="choose scores that more features have, with --score",
        )
    left, right = a[[f for f, _ in shared]], b[[g for _, g in shared]]
    order_a, order_b = _order(a), _order(b)
    return Agreement(
        labels=(first.finder, second.finder),
        scores=scores,
        n=len(shared),
        without_counterpart=sum(g is None for _, g in pairs),
        spearman=_spearman(left, right),
        overlap={
            k: _overlap(order_a[:k], order_b[:k], matched) for k in OVERLAPS if min(len(order_a), len(order_b)) >= k
        },
        movers=_movers(shared, _places(order_a), _places(order_b)),
    )


def _values(found: FeatureSet, score: str) -> Float[np.ndarray, " d_sae"]:
    try:
        return np.asarray(found.column(score))
    except KeyError as error:
        raise FeatureSetError(
            f"'{found.finder}' has no score called '{score}'", hint=f"it has: {', '.join(found.score_names)}"
        ) from error


def _order(values: Float[np.ndarray, " d_sae"]) -> list[int]:
    """Features that have the score, best first; equal scores by index."""
    known = np.flatnonzero(np.isfinite(values))
    return known[np.argsort(-values[known], kind="stable")].tolist()


def _places(order: list[int]) -> dict[int, int]:
    return {feature: place for place, feature in enumerate(order, 1)}


def _spearman(left: Float[np.ndarray, " n"], right: Float[np.ndarray, " n"]) -> float | None:
    """None when one side is the same for all features: there is no ranking to compare."""
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return None
    correlation: float = np.corrcoef(rankdata(left), rankdata(right))[0, 1]
    return float(correlation)


def _overlap(first: list[int], second: list[int], matched: Mapping[int, int] | None) -> float:
    """Share of the first's best features whose counterparts are among the second's best."""
    best = set(second)
    return sum((f if matched is None else matched.get(f)) in best for f in first) / len(first)


def _movers(shared: list[tuple[int, int]], first: dict[int, int], second: dict[int, int]) -> tuple[Mover, ...]:
    """Features whose place differs most, counted as a ratio: from 1 to 10 says more than from 500 to 600."""
    moved = [Mover(f, g, (first[f], second[g])) for f, g in shared]
    moved.sort(key=lambda m: -max(m.places) / min(m.places))
    return tuple(m for m in moved if m.places[0] != m.places[1])[:MOVERS]
