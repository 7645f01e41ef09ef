"""The layer scan: where in the model harmful and harmless prompts come apart, one row per layer and per SAE.

Dense: the difference of means at the assistant start, made on one half of the prompts, and how well the projection on
it separates the other half. SAE: the feature with the largest d' on the first half, and how well it separates the
other. Half against half, because a direction made on the prompts that it is tested on separates anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import mannwhitneyu

from clampdown.activations.collect import Progress, collect
from clampdown.activations.store import ActivationStore
from clampdown.activations.stream import plan_pass, read_layers
from clampdown.discovery.separation import d_prime
from clampdown.errors import NotEnoughDataError
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.types import Prompt

POOLING = "assistant_start"
Values = Float[np.ndarray, " prompts"]
Mask = Bool[np.ndarray, " prompts"]


@dataclass(frozen=True, slots=True)
class LayerScore:
    """Separation of held-out prompts at one site. `feature` is None for the dense direction. `d_prime` is None when
    nothing varies; `n` counts the held-out prompts. `harmful` and `harmless` are their projections, in standard
    deviations within a side from the mean of the harmless ones."""

    site: str
    sae: str | None
    feature: int | None
    auroc: float
    d_prime: float | None
    n: int
    harmful: tuple[float, ...] = ()
    harmless: tuple[float, ...] = ()


def scan_layers(
    lm: LanguageModel,
    saes: Sequence[Sae],
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    on_progress: Progress | None = None,
) -> tuple[LayerScore, ...]:
    """One pass over all prompts; a row per layer, then a row per SAE.

    Raises `NotEnoughDataError` with fewer than two prompts on a side.
    """
    if min(len(harmful), len(harmless)) < 2:
        raise NotEnoughDataError("a layer scan needs at least two prompts of each kind: one half is held out")
    found = collect(plan_pass(lm, read_layers(lm, saes, POOLING), [*harmful, *harmless]), on_progress)
    is_harmful = np.arange(len(found.prompts)) < len(harmful)
    made_on = np.concatenate([np.arange(len(side)) % 2 == 0 for side in (harmful, harmless)])
    by_name = {f"{sae.cfg.site.name} {sae.name}": sae for sae in saes}
    dense = [_dense(found, name, is_harmful, made_on) for name in found.sites if name not in by_name]
    return (*dense, *(_sparse(found, name, sae, is_harmful, made_on) for name, sae in by_name.items()))


def _dense(found: ActivationStore, name: str, is_harmful: Mask, made_on: Mask) -> LayerScore:
    x = np.asarray(found.dense(POOLING, reading=name), dtype=np.float64)
    direction = x[made_on & is_harmful].mean(0) - x[made_on & ~is_harmful].mean(0)
    return _row(name, None, None, x @ direction, is_harmful, made_on)


def _sparse(found: ActivationStore, name: str, sae: Sae, is_harmful: Mask, made_on: Mask) -> LayerScore:
    sides = (found.moments(POOLING, made_on & side, reading=name) for side in (is_harmful, ~is_harmful))
    best = int(np.nanargmax(np.nan_to_num(d_prime(*sides), nan=-np.inf)))
    values = found.matrix(POOLING, reading=name)[:, [best]].toarray().ravel().astype(np.float64)
    return _row(sae.cfg.site.name, sae.name, best, values, is_harmful, made_on)


def _row(
    site: str, sae: str | None, feature: int | None, values: Values, is_harmful: Mask, made_on: Mask
) -> LayerScore:
    a, b = values[~made_on & is_harmful], values[~made_on & ~is_harmful]
    spread = np.sqrt(((a - a.mean()) @ (a - a.mean()) + (b - b.mean()) @ (b - b.mean())) / max(len(a) + len(b) - 2, 1))
    auroc = float(mannwhitneyu(a, b).statistic) / (len(a) * len(b))
    apart = float((a.mean() - b.mean()) / spread) if spread > 0 else None
    shown = [tuple(np.round((side - b.mean()) / (spread or 1.0), 3).tolist()) for side in (a, b)]
    return LayerScore(site, sae, feature, auroc, apart, len(a) + len(b), *shown)
