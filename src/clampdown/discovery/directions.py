"""The dense baseline: the difference-of-means direction at a site (Arditi et al., 2406.11717).

v = mean of the residual over harmful prompts - mean over harmless ones, each read at one pooled token per prompt, by
default the last token of the template's generation prompt, where the model is about to choose its first word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from clampdown.activations.collect import collect
from clampdown.activations.statistics import ResidualMean
from clampdown.activations.store import ActivationStore
from clampdown.activations.stream import Reading, plan_pass
from clampdown.errors import PromptSetError
from clampdown.models.loading import LanguageModel
from clampdown.types import Prompt, Site

DModel = Float[np.ndarray, " d_model"]


@dataclass(frozen=True, slots=True)
class Direction:
    """A direction in the residual stream at `site`. `vector` is the raw difference of means (adding it once moves the
    mean harmless prompt onto the mean harmful one); `residual_norm` is the mean ||x|| where it was read."""

    site: Site
    vector: DModel
    residual_norm: float

    @property
    def norm(self) -> float:
        return float(np.linalg.norm(self.vector))

    @property
    def unit(self) -> DModel:
        """The direction at length 1 (zero when the two means coincide)."""
        return self.vector / self.norm if self.norm else self.vector

    def cosine(self, rows: Float[np.ndarray, "n d_model"]) -> Float[np.ndarray, " n"]:
        """Cosine of each row with the direction; 0 for a zero row."""
        lengths = np.linalg.norm(rows, axis=1)
        return np.divide(rows @ self.unit, lengths, out=np.zeros_like(lengths), where=lengths > 0)


def _direction(site: Site, harmful: ResidualMean, harmless: ResidualMean) -> Direction:
    return Direction(site, harmful.mean - harmless.mean, harmful.merge(harmless).mean_norm)


def direction_between(
    activations: ActivationStore,
    harmful: Bool[np.ndarray, " prompts"],
    pooling: str = "assistant_start",
    reading: str | None = None,
) -> Direction:
    """The direction from a pass that has been made: prompts where `harmful` is True against all others.

    Raises `PromptSetError` when a side is empty, or the pass did not keep the residual under that pooling.
    """
    if harmful.all() or not harmful.any():
        raise PromptSetError("a direction needs prompts of both kinds", hint="label some harmful and some harmless")
    sides = (activations.residual_mean(pooling, rows, reading=reading) for rows in (harmful, ~harmful))
    return _direction(activations.site(reading), *sides)


def difference_of_means(
    lm: LanguageModel,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    sites: Sequence[Site],
    pooling: str = "assistant_start",
) -> list[Direction]:
    """One direction per site, all from one pass over both prompt sets.

    Raises `PromptSetError` for an empty set, or a pooling that has no meaning for signed values.
    """
    job = plan_pass(lm, [Reading(site, dense=(pooling,)) for site in sites], [*harmful, *harmless])
    activations, is_harmful = collect(job), np.arange(len(job.prompts)) < len(harmful)
    return [direction_between(activations, is_harmful, pooling, site.name) for site in sites]
