"""Moments: count, mean, variance, maximum and firing rate of every feature over prompts, mergeable across shards.

`Moments` keep the exact sums of the activations and of their squares (`exact`) and round once, when they are read:

    mean = S / n          m2 = Q - S^2 / n          S = sum of a, Q = sum of a^2

so shards merged in any order and any grouping equal one pass to the last bit, and there is no cancellation.
Sparse input costs O(nonzeros + d_sae): zeros add nothing to either sum.

`ResidualMean` merges by Chan, Golub & LeVeque (1979), equal to one pass to rounding:
mean = mean_a + (mean_b - mean_a) n_b / n.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from clampdown.activations.exact import MOST_ADDENDS, ExactSums, scaled_ratio
from clampdown.errors import PromptSetError

PerFeature = Float[np.ndarray, " channels"]


def shape_of(values: csr_array) -> tuple[int, int]:
    """Rows and columns (scipy's stubs leave the shape untyped)."""
    rows, columns = cast("tuple[int, int]", values.shape)
    return rows, columns


@dataclass(frozen=True)
class Moments:
    """Per-feature summary of `count` observations. `max` is at least 0 (activations are non-negative); `n_active`
    counts the observations above 0. Exact for float32 observations; those of float64 are squared with one rounding."""

    count: int
    sums: ExactSums
    squares: ExactSums
    max: PerFeature
    n_active: Int[np.ndarray, " channels"]

    @classmethod
    def empty(cls, channels: int) -> Moments:
        nothing = ExactSums(channels, {})
        return cls(0, nothing, nothing, np.zeros(channels), np.zeros(channels, dtype=np.int64))

    @classmethod
    def of(cls, values: csr_array) -> Moments:
        """Moments of the columns of a prompts x features matrix of non-negative activations."""
        count, channels = shape_of(values)
        columns, data = values.indices, values.data.astype(np.float64)
        largest = np.zeros(channels)
        np.maximum.at(largest, columns, data)
        return cls(
            count,
            ExactSums.of(columns, data, channels),
            ExactSums.of(columns, data**2, channels),
            largest,
            np.bincount(columns[data > 0], minlength=channels).astype(np.int64),
        )

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of observations together. Raises `PromptSetError` beyond 8 million observations."""
        if self.count + other.count > MOST_ADDENDS:
            raise PromptSetError(f"moments hold at most {MOST_ADDENDS} prompts", hint="read the prompts in parts")
        return Moments(
            self.count + other.count,
            self.sums.merge(other.sums),
            self.squares.merge(other.squares),
            np.maximum(self.max, other.max),
            self.n_active + other.n_active,
        )

    @cached_property
    def mean(self) -> PerFeature:
        """Mean over all observations; 0 when there are none."""
        mean, live = np.zeros(len(self.max)), self._live
        unit = self.sums.lowest_unit
        mean[live] = scaled_ratio(self.sums.integers(unit, live), unit, max(self.count, 1))
        return mean

    @cached_property
    def m2(self) -> PerFeature:
        """Summed squared deviation from the mean."""
        m2, live = np.zeros(len(self.max)), self._live
        unit = min(2 * self.sums.lowest_unit, self.squares.lowest_unit)
        unit -= unit % 2  # an even exponent, so that S can be counted in units of its square root
        totals = self.sums.integers(unit // 2, live)
        excess = self.count * self.squares.integers(unit, live) - totals * totals
        m2[live] = scaled_ratio(excess, unit, max(self.count, 1)).clip(min=0)
        return m2

    @property
    def _live(self) -> Int[np.ndarray, " live"]:
        """Features with anything to sum: most of a large SAE's never fire, and Python integers are slow."""
        return np.flatnonzero(self.max > 0)

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
