"""A few features at every token of many prompts: the sparse view of the SAE, so a card costs a few encoder columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float

from clampdown.activations.capture import DEFAULT_TOKENS_PER_BATCH, capture
from clampdown.activations.sinks import sinks_at
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae


@dataclass(frozen=True, slots=True)
class Trace:
    """One prompt without its padding: the features' activations, and which tokens are content (what somebody wrote,
    not BOS, special or template tokens, nor attention sinks)."""

    activations: Float[np.ndarray, "pos n"]
    content: Bool[np.ndarray, " pos"]


def trace(
    lm: LanguageModel,
    sae: Sae,
    features: Sequence[int],
    prompts: Sequence[Sequence[int]],
    *,
    tokens_per_batch: int = DEFAULT_TOKENS_PER_BATCH,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Trace]:
    """Activations of the features, in the order given, at every token of each prompt, in the order of the prompts.

    Reads only the features' encoder columns, except for a top-k SAE, which needs all of them. Raises
    `FeatureIndexError` for a feature outside the SAE, `PromptSetError` when there is nothing to read.
    """
    view = sae.select(features)
    found: dict[int, Trace] = {}
    sinks = sinks_at(lm, [sae.cfg.site])[sae.cfg.site]
    for captured in capture(lm, prompts, sae.cfg.site, tokens_per_batch=tokens_per_batch):
        with torch.no_grad():
            residual = captured.residuals[sae.cfg.site].to(sae.device, sae.dtype)
            activations = view.read(residual).float().cpu().numpy()
        content = (captured.content & sinks.outside(captured.residuals[sae.cfg.site])).cpu().numpy()
        for row, prompt in enumerate(captured.rows):
            real = slice(-len(prompts[prompt]), None)  # rows are padded on the left
            found[prompt] = Trace(activations[row, real], content[row, real])
        if on_progress:
            on_progress(len(found), len(prompts))
    return [found[i] for i in range(len(prompts))]
