"""The dense baseline: the difference-of-means direction at a site (Arditi et al., 2406.11717).

v = mean of the residual over harmful prompts - mean over harmless ones, each read at one pooled token per prompt, by
default the last token of the template's generation prompt, where the model is about to choose its first word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from clampdown.activations.capture import capture
from clampdown.activations.collect import Collected
from clampdown.activations.pooling import POOLINGS
from clampdown.activations.statistics import ResidualMean
from clampdown.errors import PromptSetError
from clampdown.models.chat import encode
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


def direction_of(harmful: Collected, harmless: Collected) -> Direction:
    """The direction at the assistant start from passes that `collect` has already made."""
    return _direction(harmful.site, harmful.residual, harmless.residual)


def _pooled_means(
    lm: LanguageModel, prompts: Sequence[Prompt], sites: Sequence[Site], pooling: str
) -> list[ResidualMean]:
    means = [ResidualMean.empty(lm.d_model) for _ in sites]
    for captured in capture(lm, [encode(lm, prompt.messages) for prompt in prompts], sites):
        for i, site in enumerate(sites):
            pooled = POOLINGS[pooling](captured.residuals[site].float(), captured.content)
            means[i] = means[i].merge(ResidualMean.of(pooled.cpu().numpy()))
    return means


def difference_of_means(
    lm: LanguageModel,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    sites: Sequence[Site],
    pooling: str = "assistant_start",
) -> list[Direction]:
    """One direction per site, all from one pass over each prompt set.

    Raises `PromptSetError` for an empty set, or a pooling that has no meaning for signed values.
    """
    if pooling not in POOLINGS or not POOLINGS[pooling].signed:
        usable = ", ".join(name for name, fold in POOLINGS.items() if fold.signed)
        raise PromptSetError(f"pooling '{pooling}' does not suit residuals", hint=f"one of: {usable}")
    with torch.no_grad():
        sides = (_pooled_means(lm, side, sites, pooling) for side in (harmful, harmless))
        return [_direction(site, a, b) for site, a, b in zip(sites, *sides, strict=True)]
