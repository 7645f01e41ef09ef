"""The activation store: what a pass found, in memory or mapped from a directory, as every finder reads it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array

from clampdown.activations import files
from clampdown.activations.statistics import Moments, ResidualMean, shape_of
from clampdown.activations.stream import Series
from clampdown.errors import PromptSetError, StoreError
from clampdown.types import Prompt, Site

ENTRIES_PER_BLOCK = 2**20

Rows = str | Collection[str] | Bool[np.ndarray, " prompts"] | None
"""Which prompts: a suite's name, several, a mask, or all (None)."""


@dataclass(frozen=True)
class ActivationStore:
    """Pooled activations of `prompts`, a row per prompt in their order, in memory or mapped from a directory.

    `sites` gives the site of each reading, by name. With one reading its name may be left out everywhere.
    """

    prompts: tuple[Prompt, ...]
    sites: Mapping[str, Site]
    features: Mapping[Series, csr_array]
    residuals: Mapping[Series, Float[np.ndarray, "prompts d_model"]]

    @classmethod
    def open(cls, directory: Path) -> ActivationStore:
        """Map a finished pass. Raises `StoreError` when it is unfinished, of another schema, or damaged."""
        manifest = files.read_manifest(directory)
        if not files.is_finished(directory):
            raise StoreError(f"the pass in {directory} is not finished", hint="repeat its command to resume it")
        sites = {reading["name"]: Site.parse(reading["site"]) for reading in manifest["key"]["readings"]}
        sparse: dict[Series, csr_array] = {}
        dense: dict[Series, np.ndarray] = {}
        for i, row in enumerate(manifest["series"]):
            series = Series(**row["series"])
            values = files.open_series(directory, i, series, row["d_sae"])
            if isinstance(values, csr_array):
                sparse[series] = values
            else:
                dense[series] = values
        return cls(files.read_prompts(directory / "prompts.jsonl"), sites, sparse, dense)

    @property
    def poolings(self) -> tuple[str, ...]:
        """Poolings of features that were read."""
        return tuple(dict.fromkeys(series.pooling for series in self.features))

    def site(self, reading: str | None = None) -> Site:
        """Where a reading was made. Raises `PromptSetError` when it is not there, or which one is not said."""
        names = [name for name in self.sites if reading in (None, name)]
        if len(names) != 1:
            raise PromptSetError(f"no single reading '{reading}'", hint=f"there are: {', '.join(self.sites)}")
        return self.sites[names[0]]

    def mask(self, rows: Rows) -> Bool[np.ndarray, " prompts"]:
        """Which rows are meant. Raises `PromptSetError` for a suite that no prompt belongs to."""
        if rows is None:
            return np.ones(len(self.prompts), dtype=bool)
        if isinstance(rows, np.ndarray):
            return rows
        wanted = {rows} if isinstance(rows, str) else set(rows)
        known = {prompt.suite for prompt in self.prompts}
        if not wanted <= known:
            raise PromptSetError(
                f"no prompts of '{sorted(wanted - known)[0]}' were read", hint=f"suites: {', '.join(sorted(known))}"
            )
        return np.array([prompt.suite in wanted for prompt in self.prompts])

    def matrix(self, pooling: str, rows: Rows = None, *, reading: str | None = None) -> csr_array:
        """Pooled feature activations, prompts x d_sae, float32. All rows are mapped, some rows are a copy.

        Raises `PromptSetError` for a pooling or reading that the pass did not make.
        """
        values = self.features[self._series(self.features, pooling, reading)]
        if rows is None:
            return values
        chosen: Any = np.flatnonzero(self.mask(rows))  # scipy's stubs do not know indexing by an array
        return csr_array(values[chosen])

    def dense(
        self, pooling: str, rows: Rows = None, *, reading: str | None = None
    ) -> Float[np.ndarray, "rows d_model"]:
        """Pooled residuals, prompts x d_model, float32. Raises `PromptSetError` as `matrix` does."""
        values = self.residuals[self._series(self.residuals, pooling, reading)]
        return values if rows is None else values[self.mask(rows)]

    def moments(self, pooling: str, rows: Rows = None, *, reading: str | None = None) -> Moments:
        """Moments of every feature over the prompts, in blocks of rows: O(d_sae) memory however many nonzeros."""
        values = self.features[self._series(self.features, pooling, reading)]
        wanted = self.mask(rows)
        total = Moments.empty(shape_of(values)[1])
        for start, stop in _blocks(values.indptr):
            block: Any = values[start:stop]
            total = total.merge(Moments.of(csr_array(block[np.flatnonzero(wanted[start:stop])])))
        return total

    def residual_mean(self, pooling: str, rows: Rows = None, *, reading: str | None = None) -> ResidualMean:
        """Mean residual and mean residual length over the prompts."""
        return ResidualMean.of(np.asarray(self.dense(pooling, rows, reading=reading)))

    def _series(self, among: Mapping[Series, Any], pooling: str, reading: str | None) -> Series:
        found = [s for s in among if s.pooling == pooling and reading in (None, s.reading)]
        if len(found) == 1:
            return found[0]
        which = f"pooling '{pooling}'" + (f" of '{reading}'" if reading else "")
        has = ", ".join(f"{s.pooling} of {s.reading}" for s in among) or "nothing of this kind"
        raise PromptSetError(f"{which} was not read" if not found else f"{which} was read at several sites", hint=has)


def _blocks(starts: Int[np.ndarray, " rows_and_end"]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `ENTRIES_PER_BLOCK` entries."""
    row, last = 0, len(starts) - 1
    while row < last:
        stop = int(np.searchsorted(starts, starts[row] + ENTRIES_PER_BLOCK, side="right")) - 1
        yield row, max(stop, row + 1)
        row = max(stop, row + 1)
