"""The output score of Arad, Mueller & Belinkov (2505.20063): does amplifying a feature bring up the tokens it promotes?

On one neutral text, with T the `N_TOKENS` tokens that the feature's decoder row promotes most (logit lens), and p the
next-token probabilities after the feature's activation at the last token was raised by `FACTOR` times the largest
activation of any feature there, the error term kept:

    output score_f = (1 - min_{t in T} rank(t) / vocabulary) * max_{t in T} p(t)          ranks counted from 0

A high score says that the feature can be steered, not what it steers: refusal does not enter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.activations.collect import Progress
from clampdown.activations.continuation import Prefix, continue_logits, last_shared_layer, read_prefix
from clampdown.discovery.ranking import token_effects
from clampdown.errors import SiteError
from clampdown.models.chat import pad_left
from clampdown.models.loading import LanguageModel
from clampdown.saes.architectures import NORMALIZATIONS
from clampdown.saes.sae import Sae
from clampdown.types import Point

NEUTRAL = "From my experience,"
N_TOKENS = 20
FACTOR = 10.0
ROWS = 256


def output_scores(
    lm: LanguageModel,
    sae: Sae,
    text: Sequence[int],
    *,
    factor: float = FACTOR,
    on_progress: Progress | None = None,
) -> Float[np.ndarray, " d_sae"]:
    """The score of every feature of the SAE on one text, given as token ids.

    Raises `SiteError` for an SAE that does not read a block's output.
    """
    layer = last_shared_layer([sae.cfg.site])
    if layer is None or sae.cfg.site.point is not Point.RESID_POST:
        raise SiteError(f"the output score needs an SAE on a block's output, this one reads {sae.cfg.site.name}")
    prefix = read_prefix(lm, pad_left([text], lm.pad_id, lm.device), layer)
    found: list[Tensor] = []
    for start in range(0, sae.cfg.d_sae, ROWS):
        rows = sae.W_dec[start : start + ROWS]
        with torch.no_grad():
            found.append(_scores(lm, sae, prefix, rows, factor))
        if on_progress:
            on_progress(start + len(rows), sae.cfg.d_sae)
    return torch.cat(found).double().cpu().numpy()


def _scores(
    lm: LanguageModel, sae: Sae, prefix: Prefix, rows: Float[Tensor, "n d_model"], factor: float
) -> Float[Tensor, " n"]:
    """Scores of the features with these decoder rows: one row of the batch each."""
    last = prefix.residual[:, -1].to(sae.dtype)
    raised = factor * sae.encode(last).max()
    delta = NORMALIZATIONS[sae.cfg.normalize_activations](last).scaled(raised * rows)
    amplified = prefix.widened(len(rows))
    amplified.residual[:, -1] += delta.to(amplified.residual.dtype)
    probabilities = continue_logits(lm, amplified)[:, -1].float().softmax(-1)
    promoted = token_effects(lm, rows).topk(N_TOKENS, dim=-1).indices
    largest = probabilities.gather(1, promoted).amax(1)
    # The best-ranked promoted token is the most probable one: its rank is the number of tokens above it.
    rank = (probabilities > largest[:, None]).sum(1)
    return (1 - rank / probabilities.shape[1]) * largest
