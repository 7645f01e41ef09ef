"""From score arrays to a `FeatureSet`: the best features with what a person needs to recognise them.

Tokens that a feature promotes and demotes are read by the logit lens: its decoder row through the model's own final
norm and unembedding. An RMS norm ignores a row's length, so the order of tokens does not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csc_array, csr_array
from torch import Tensor

from clampdown.config import CODE_VERSION
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.store import prompts_hash
from clampdown.types import FeatureScore, FeatureSet, Prompt, Provenance, ScoreColumns

N_TOKENS = 8
N_PROMPTS = 3

ScoreTable = Mapping[str, Float[np.ndarray, " d_sae"]]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a finder concluded: a score array per name, and the features it keeps, best first.

    `peaks` is prompts x features: each prompt's largest activation at any token that was read; `texts` are its rows.
    """

    finder: str
    ranked_by: str
    scores: ScoreTable
    order: Sequence[int]
    peaks: csr_array
    texts: Sequence[str]
    settings: Mapping[str, str] = field(default_factory=dict)


def make_provenance(lm: LanguageModel, sae: Sae, prompts: Sequence[Prompt], seed: int = 0) -> Provenance:
    return Provenance(
        model=lm.name,
        model_revision=lm.revision,
        sae=sae.name,
        prompts_hash=prompts_hash(prompts),
        code_version=CODE_VERSION,
        seed=seed,
        extra={"sae_revision": sae.revision, "d_sae": str(sae.cfg.d_sae), "n_prompts": str(len(prompts))},
    )


def token_effects(lm: LanguageModel, rows: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
    """What adding each row to the final residual does to the logits, up to a positive factor per row.

    Biases of the norm and of the unembedding are common to all rows and are taken out.
    """
    norm, unembed = lm.layout.final_norm, lm.model.get_output_embeddings()
    rows = rows.to(lm.device, lm.dtype)
    with torch.no_grad():
        return unembed(norm(rows)).float() - unembed(norm(torch.zeros_like(rows[:1]))).float()


def _tokens(lm: LanguageModel, effects: Float[Tensor, "n vocab"], *, largest: bool) -> list[tuple[str, ...]]:
    ids = effects.topk(min(N_TOKENS, effects.shape[1]), largest=largest).indices.tolist()
    return [tuple(lm.tokenizer.decode([token]) for token in row) for row in ids]


def _top_prompts(column: csc_array, texts: Sequence[str]) -> tuple[str, ...]:
    """Texts of the prompts on which a feature (a one-column matrix) is strongest, without repeats."""
    order = np.argsort(column.data, kind="stable")[::-1]
    strongest = dict.fromkeys(texts[int(row)] for row in column.indices[order])
    return tuple(strongest)[:N_PROMPTS]


def _finite(scores: Mapping[str, float]) -> dict[str, float]:
    """A score that does not exist for a feature is absent, never a number."""
    return {name: value for name, value in scores.items() if math.isfinite(value)}


def _score_one(finding: Finding, columns: csc_array, i: int, feature: int) -> dict[str, float]:
    column = columns[:, [i]]
    named = {name: float(values[feature]) for name, values in finding.scores.items()}
    peaks = column.data[column.data > 0]
    named["max_activation"] = float(peaks.max()) if len(peaks) else 0.0
    named["p99_activation"] = float(np.percentile(peaks, 99)) if len(peaks) else 0.0
    return _finite(named)


def build_feature_set(lm: LanguageModel, sae: Sae, finding: Finding, provenance: Provenance) -> FeatureSet:
    """A `FeatureSet` that keeps the features in `finding.order`, with the finding's scores of all features as columns.

    Adds to every feature `max_activation` (largest of its peaks) and `p99_activation` (99th percentile of its peaks
    over the prompts on which it fires at all); a peak is one prompt's largest activation at any token that was read.
    """
    order = [int(feature) for feature in finding.order]
    columns = csc_array(finding.peaks)[:, order]
    effects = token_effects(lm, sae.W_dec[order])
    promoted, demoted = _tokens(lm, effects, largest=True), _tokens(lm, effects, largest=False)
    features = tuple(
        FeatureScore(
            feature=feature,
            scores=_score_one(finding, columns, i, feature),
            top_prompts=_top_prompts(columns[:, [i]], finding.texts),
            promoted_tokens=promoted[i],
            demoted_tokens=demoted[i],
        )
        for i, feature in enumerate(order)
    )
    columns = ScoreColumns({name: values.astype(np.float64) for name, values in finding.scores.items()})
    return FeatureSet(
        finding.finder, sae.cfg.site.name, finding.ranked_by, features, provenance, finding.settings, columns
    )
