"""Sums without rounding, so that the order of adding and the cut into shards cannot show in a result.

A floating-point sum depends on its order. Here a number is cut into pieces of at most 24 significant bits (a float32
is one piece), and a piece with exponent e, 2^(e-1) <= |piece| < 2^e, is added to bin e // 16 of its column as a whole
number of units of 2^(16 bin - 24). Such a number is below 2^40, so 64-bit integers add 2^23 of them exactly. Integer
addition is associative and commutative: any grouping of the same numbers gives the same bins, bit for bit. This is a
small fixed form of the superaccumulator of Kulisch (1971); Neal (1505.05571) describes a fast one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

MANTISSA, WIDTH = 24, 16
MOST_ADDENDS = 2 ** (63 - MANTISSA - WIDTH)
"""How many numbers one column can hold: about 8.4 million."""

Values = Float[np.ndarray, " entries"]
Columns = Int[np.ndarray, " entries"]


def _pieces(values: Values) -> Iterator[Values]:
    """Numbers of at most 24 significant bits that add up to the values exactly: three for float64 at most."""
    rest = values
    while rest.any():
        mantissa, exponent = np.frexp(rest)
        head = np.ldexp(np.trunc(np.ldexp(mantissa, MANTISSA)), exponent - MANTISSA)
        yield head
        rest = rest - head


@dataclass(frozen=True)
class ExactSums:
    """One exact sum per column. `bins[b]` counts units of 2^(16 b - 24); bins that hold nothing are absent."""

    channels: int
    bins: Mapping[int, Int[np.ndarray, " channels"]]

    @classmethod
    def of(cls, columns: Columns, values: Values, channels: int) -> ExactSums:
        """The sum of `values` by column. The values must be finite, and at most `MOST_ADDENDS` per column."""
        bins: dict[int, np.ndarray] = {}
        for piece in _pieces(values.astype(np.float64)):
            places = np.frexp(piece)[1] // WIDTH
            for place in np.unique(places[piece != 0]).tolist():
                here = (places == place) & (piece != 0)
                units = np.ldexp(piece[here], MANTISSA - WIDTH * place).astype(np.int64)
                np.add.at(bins.setdefault(place, np.zeros(channels, dtype=np.int64)), columns[here], units)
        return cls(channels, bins)

    def merge(self, other: ExactSums) -> ExactSums:
        places = {**self.bins, **other.bins}
        nothing = np.zeros(self.channels, dtype=np.int64)
        bins = {place: self.bins.get(place, nothing) + other.bins.get(place, nothing) for place in places}
        return ExactSums(self.channels, bins)

    def integers(self, unit: int, columns: Int[np.ndarray, " chosen"]) -> np.ndarray:
        """The sums of some columns as Python integers in units of 2^unit (an array of objects).

        `unit` must be at most the exponent of the smallest bin's unit, `lowest_unit`.
        """
        total = np.zeros(len(columns), dtype=object)
        for place, counts in self.bins.items():
            total += counts[columns].astype(object) << (WIDTH * place - MANTISSA - unit)
        return total

    @property
    def lowest_unit(self) -> int:
        """Exponent of the smallest unit in use; 0 when everything is zero."""
        return WIDTH * min(self.bins) - MANTISSA if self.bins else 0


def scaled_ratio(numerators: np.ndarray, unit: int, denominator: int) -> Float[np.ndarray, " chosen"]:
    """numerators * 2^unit / denominator, rounded once: Python divides integers correctly."""
    above, below = (numerators << unit, denominator) if unit >= 0 else (numerators, denominator << -unit)
    return (above / below).astype(np.float64)
