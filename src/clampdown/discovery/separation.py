"""How well each feature separates two prompt sets: d', AUROC, Mann-Whitney U, and Benjamini-Hochberg over all features.

All features at once from sparse columns, O(nonzeros log nonzeros). Activations are non-negative, so a column's zeros
are one group of ties below everything else. With R the sum of the first set's ranks (ties share their mean rank):

    U = R - n_a (n_a + 1) / 2        AUROC = U / (n_a n_b)
    z = (|U - n_a n_b / 2| - 1/2) / sigma,
    sigma^2 = n_a n_b / 12 (n + 1 - sum(t^3 - t) / (n (n - 1)))     over groups of t tied values

the two-sided asymptotic test with continuity correction, as `scipy.stats.mannwhitneyu(method="asymptotic")`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_array, vstack
from scipy.stats import false_discovery_control, norm

from clampdown.activations.statistics import Moments, shape_of

PerFeature = Float[np.ndarray, " d_sae"]


@dataclass(frozen=True, slots=True)
class Separation:
    """Per feature: P(a > b) + P(a = b) / 2 for prompts a, b of the two sets; two-sided p; BH-adjusted q.

    A feature that is the same on every prompt has AUROC 0.5 and p = q = 1.
    """

    auroc: PerFeature
    p_value: PerFeature
    q_value: PerFeature


@dataclass(frozen=True, slots=True)
class _Ranks:
    """First set's rank sum and the tie term sum(t^3 - t), per column."""

    rank_sum: PerFeature
    ties: PerFeature


def _column_ranks(values: csr_array, n_first: int) -> _Ranks:
    n, d_sae = shape_of(values)
    entries = values.tocoo()
    stored = entries.data > 0  # explicit zeros belong to the zeros' group
    column, row = entries.col[stored].astype(np.int64), entries.row[stored]
    order = np.lexsort((entries.data[stored], column))
    column, row, value = column[order], row[order], entries.data[stored][order]
    n_stored = np.bincount(column, minlength=d_sae)
    n_zero = (n - n_stored).astype(np.float64)
    place = np.arange(len(value)) - (np.cumsum(n_stored) - n_stored)[column] + 1.0

    opens = np.ones(len(value), dtype=bool)
    opens[1:] = (column[1:] != column[:-1]) | (value[1:] != value[:-1])
    group = np.cumsum(opens) - 1
    size = np.bincount(group).astype(np.float64)
    rank = n_zero[column] + (np.bincount(group, weights=place) / size)[group] if len(value) else place

    first = row < n_first
    zeros_in_first = n_first - np.bincount(column[first], minlength=d_sae)
    rank_sum = np.bincount(column[first], weights=rank[first], minlength=d_sae) + zeros_in_first * (n_zero + 1) / 2
    ties = np.bincount(column[opens], weights=size**3 - size, minlength=d_sae) + n_zero**3 - n_zero
    return _Ranks(rank_sum, ties)


def separate(first: csr_array, second: csr_array) -> Separation:
    """Compare the columns of two prompts x features matrices of non-negative activations, neither without rows."""
    n_a, n_b = shape_of(first)[0], shape_of(second)[0]
    n = n_a + n_b
    ranks = _column_ranks(csr_array(vstack([first, second], format="csr")), n_a)
    u = ranks.rank_sum - n_a * (n_a + 1) / 2
    sigma = np.sqrt(n_a * n_b / 12 * ((n + 1) - ranks.ties / (n * max(n - 1, 1))).clip(min=0))
    distance = np.abs(u - n_a * n_b / 2) - 0.5
    z = np.divide(distance, sigma, out=np.zeros_like(distance), where=sigma > 0)
    p_value = np.where(sigma > 0, np.minimum(2 * norm.sf(z), 1.0), 1.0)
    return Separation(u / (n_a * n_b), p_value, false_discovery_control(p_value, method="bh"))


def d_prime(first: Moments, second: Moments) -> PerFeature:
    """Difference of means in pooled standard deviations (n - 1 weights). NaN where neither set varies at all."""
    freedom = max(first.count + second.count - 2, 1)
    spread = np.sqrt((first.m2 + second.m2) / freedom)
    difference = first.mean - second.mean
    return np.divide(difference, spread, out=np.full_like(difference, np.nan), where=spread > 0)
