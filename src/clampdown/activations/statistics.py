"""Moments: count, mean, variance, maximum and firing rate of every feature over prompts, mergeable across shards.

Chan, Golub & LeVeque (1979): with n = n_a + n_b and d = mean_b - mean_a,

    mean = mean_a + d n_b / n          m2 = m2_a + m2_b + d^2 n_a n_b / n

Everything is float64, so merging shards in any order equals one pass to rounding, and merging with nothing is exact.
Sparse input costs O(nonzeros + d_sae): a column's zeros contribute their share in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

PerFeature = Float[np.ndarray, " channels"]


def shape_of(values: csr_array) -> tuple[int, int]:
    """Rows and columns (scipy's stubs leave the shape untyped)."""
    rows, columns = cast("tuple[int, int]", values.shape)
    return rows, columns


@dataclass(frozen=True, slots=True)
class Moments:
    """Per-feature summary of `count` observations. `m2` is the summed squared deviation from `mean`; `max` is at
    least 0 (activations are non-negative); `n_active` counts the observations above 0."""

    count: int
    mean: PerFeature
    m2: PerFeature
    max: PerFeature
    n_active: Int[np.ndarray, " channels"]

    @classmethod
    def empty(cls, channels: int) -> Moments:
        zeros = np.zeros(channels)
        return cls(0, zeros, zeros, zeros, np.zeros(channels, dtype=np.int64))

    @classmethod
    def of(cls, values: csr_array) -> Moments:
        """Moments of the columns of a prompts x features matrix of non-negative activations."""
        count, channels = shape_of(values)
        if count == 0:
            return cls.empty(channels)
        columns, data = values.indices, values.data.astype(np.float64)
        stored = np.bincount(columns, minlength=channels)
        mean = np.bincount(columns, weights=data, minlength=channels) / count
        squares = np.bincount(columns, weights=(data - mean[columns]) ** 2, minlength=channels)
        largest = np.zeros(channels)
        np.maximum.at(largest, columns, data)
        active = np.bincount(columns, weights=data > 0, minlength=channels).astype(np.int64)
        return cls(count, mean, squares + (count - stored) * mean**2, largest, active)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of observations together."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        shift = other.mean - self.mean
        return Moments(
            count,
            self.mean + shift * (other.count / count),
            self.m2 + other.m2 + shift**2 * (self.count * other.count / count),
            np.maximum(self.max, other.max),
            self.n_active + other.n_active,
        )

    @property
    def variance(self) -> PerFeature:
        """Population variance; 0 when there are no observations."""
        return self.m2 / max(self.count, 1)

    @property
    def firing_rate(self) -> PerFeature:
        """Share of observations in which the feature is active."""
        return self.n_active / max(self.count, 1)


@dataclass(frozen=True, slots=True)
class ResidualMean:
    """Mean residual vector and mean residual length of `count` prompts at one token each; mergeable."""

    count: int
    mean: Float[np.ndarray, " d_model"]
    mean_norm: float

    @classmethod
    def empty(cls, d_model: int) -> ResidualMean:
        return cls(0, np.zeros(d_model), 0.0)

    @classmethod
    def of(cls, residual: Float[np.ndarray, "batch d_model"]) -> ResidualMean:
        exact = residual.astype(np.float64)
        return cls(len(exact), exact.mean(0), float(np.linalg.norm(exact, axis=1).mean()))

    def merge(self, other: ResidualMean) -> ResidualMean:
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        share = other.count / count
        return ResidualMean(
            count,
            self.mean + (other.mean - self.mean) * share,
            self.mean_norm + (other.mean_norm - self.mean_norm) * share,
        )
