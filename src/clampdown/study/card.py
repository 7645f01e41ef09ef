"""Measuring a feature card: one pass over some prompts for the feature and its nearest neighbours, nothing more.

Only a few encoder columns are read (a top-k SAE needs all of them). What ranks prompts and fills the histogram are
activations on content tokens; template tokens, BOS and other specials are kept for showing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.activations.traces import Trace, trace
from clampdown.cards import Card, CardScore, Example, Firing, Histogram, Neighbour, Token, TokenEffect
from clampdown.discovery.ranking import make_provenance, token_effects
from clampdown.evaluation.intervals import wilson
from clampdown.models.chat import encode, token_texts
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae, check_features
from clampdown.types import FeatureSet, Interval, Prompt

N_EFFECTS, N_NEIGHBOURS, N_EXAMPLES, N_BINS, WINDOW = 12, 8, 10, 24, 160
NEURONPEDIA = "https://www.neuronpedia.org"
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Read:
    """A prompt and the activations on it: the card's feature is the first column, its neighbours follow."""

    prompt: Prompt
    trace: Trace

    @property
    def own(self) -> Float[np.ndarray, " content"]:
        return self.trace.activations[self.trace.content, 0]

    @property
    def peak(self) -> float:
        return float(self.own.max(initial=0.0))

    @property
    def fires_at_start(self) -> bool:
        return bool(self.trace.activations[-1, 0] > 0)


def make_card(
    lm: LanguageModel,
    sae: Sae,
    feature: int,
    prompts: Sequence[Prompt],
    sets: Sequence[FeatureSet] = (),
    *,
    on_progress: Progress | None = None,
) -> Card:
    """Measure one feature on prompts. `sets` give the scores; they must be about this SAE.

    Raises `FeatureIndexError` for a feature outside the SAE.
    """
    check_features([feature], sae.cfg.d_sae)
    near = nearest(sae.W_dec, feature, N_NEIGHBOURS)
    shown = [feature, *near]
    effects = token_effects(lm, sae.W_dec[shown])
    traces = (
        trace(lm, sae, shown, [encode(lm, p.messages) for p in prompts], on_progress=on_progress) if prompts else []
    )
    reads = [Read(prompt, found) for prompt, found in zip(prompts, traces, strict=True)]
    return Card(
        feature=feature,
        site=sae.cfg.site.name,
        architecture=sae.cfg.architecture,
        d_sae=sae.cfg.d_sae,
        neuronpedia=neuronpedia_page(sae, feature),
        provenance=make_provenance(lm, sae, prompts),
        scores=tuple(score for found in sets for score in scores_of(found, feature)),
        promoted=_effects(lm, effects[0], largest=True),
        demoted=_effects(lm, effects[0], largest=False),
        firing=tuple(firing(suite, group) for suite, group in by_suite(reads).items()),
        histogram=histogram(reads),
        examples=tuple(_example(lm, read) for read in strongest(reads)),
        neighbours=_neighbours(lm, near, effects[1:], reads),
    )


def nearest(decoder: Float[Tensor, "d_sae d_in"], feature: int, n: int) -> dict[int, float]:
    """The `n` other features whose decoder rows have the largest cosine with this one's, nearest first."""
    with torch.no_grad():
        row = decoder[feature]
        cosines = (decoder @ row).float() / (decoder.norm(dim=1) * row.norm()).float().clamp(min=1e-12)
        cosines[feature] = -torch.inf
        values, indices = cosines.topk(min(n, len(decoder) - 1))
    return {int(i): float(v) for i, v in zip(indices, values, strict=True)}


def neuronpedia_page(sae: Sae, feature: int) -> str | None:
    """The feature's page, for SAEs that the catalogue knows to be on Neuronpedia."""
    return f"{NEURONPEDIA}/{sae.cfg.neuronpedia_id}/{feature}" if sae.cfg.neuronpedia_id else None


def scores_of(found: FeatureSet, feature: int) -> list[CardScore]:
    """The feature's scores in one set, each with its place among the features that have it."""
    scores = []
    for name in found.score_names:
        column = np.asarray(found.column(name))
        if feature >= len(column) or not np.isfinite(column[feature]):
            continue
        known, value = column[np.isfinite(column)], float(column[feature])
        scores.append(CardScore(name, value, 1 + int((known > value).sum()), len(known), found.source(name)))
    return scores


def by_suite(reads: Sequence[Read]) -> Mapping[str, list[Read]]:
    """Reads by suite, in order of first appearance."""
    groups: dict[str, list[Read]] = {}
    for read in reads:
        groups.setdefault(read.prompt.suite, []).append(read)
    return groups


def firing(suite: str, reads: Sequence[Read]) -> Firing:
    """How often the feature fires on a suite's prompts, with Wilson intervals."""

    def share(fires: Callable[[Read], bool]) -> Interval:
        return wilson(sum(map(fires, reads)), len(reads))

    mean_peak = float(np.mean([read.peak for read in reads]))
    return Firing(suite, share(lambda r: r.peak > 0), share(lambda r: r.fires_at_start), mean_peak)


def histogram(reads: Sequence[Read]) -> Histogram:
    """Activations on all content tokens, in bins of equal width from 0 to the largest."""
    values = np.concatenate([read.own for read in reads]) if reads else np.zeros(0)
    active = values[values > 0]
    if not len(active):
        return Histogram((), (), len(values))
    counts, edges = np.histogram(active, bins=N_BINS, range=(0.0, float(active.max())))
    return Histogram(tuple(map(float, edges)), tuple(map(int, counts)), int(len(values) - len(active)))


def strongest(reads: Sequence[Read]) -> list[Read]:
    """The prompts with the highest peaks on content tokens; equal texts once, prompts without activation never."""
    ranked = sorted((r for r in reads if r.peak > 0), key=lambda r: -r.peak)
    unique = {read.prompt.messages: read for read in reversed(ranked)}
    return sorted(unique.values(), key=lambda r: -r.peak)[:N_EXAMPLES]


def _example(lm: LanguageModel, read: Read) -> Example:
    """The prompt's tokens, or as many around the peak as fit the window."""
    values, content = read.trace.activations[:, 0], read.trace.content
    pieces = token_texts(lm, read.prompt.messages)
    tokens = [Token(t, round(float(v), 6), bool(c)) for t, v, c in zip(pieces, values, content, strict=True)]
    at = int(np.argmax(np.where(content, values, -np.inf)))
    start = max(0, min(at - WINDOW // 2, len(tokens) - WINDOW))
    return Example(
        read.prompt.suite, read.prompt.id, read.peak, tuple(tokens[start : start + WINDOW]), len(tokens) > WINDOW
    )


def _effects(lm: LanguageModel, effects: Float[Tensor, " vocab"], *, largest: bool) -> tuple[TokenEffect, ...]:
    values, ids = effects.topk(min(N_EFFECTS, len(effects)), largest=largest)
    return tuple(TokenEffect(lm.tokenizer.decode([i]), v) for i, v in zip(ids.tolist(), values.tolist(), strict=True))


def _neighbours(
    lm: LanguageModel, near: Mapping[int, float], effects: Float[Tensor, "n vocab"], reads: Sequence[Read]
) -> tuple[Neighbour, ...]:
    live = [read.trace.activations[read.trace.content] for read in reads]
    active = [rows[rows[:, 0] > 0, 1:] > 0 for rows in live]
    stacked = np.concatenate(active) if active else np.zeros((0, len(near)), dtype=bool)
    together = stacked.mean(axis=0).tolist() if len(stacked) else [None] * len(near)
    return tuple(
        Neighbour(feature, cosine, share, tuple(e.text for e in _effects(lm, row, largest=True)[:5]))
        for (feature, cosine), share, row in zip(near.items(), together, effects, strict=True)
    )
