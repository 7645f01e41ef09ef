"""Causal attribution: one backward pass of the refusal log-odds scores every feature of the SAE at once.

The residual at the site is written as x = sum_f a_f d_f + b + error, the error term kept, so that the model's output is
unchanged and d log-odds / d a_f = g . d_f with g the gradient at x (after 2505.23556; Marks et al., 2403.19647). Per
prompt, summed over its tokens t (padding excluded):

    gradient x activation   sum_t a_tf (g_t . d_f)          first-order effect of removing the feature, sign reversed
    integrated gradients    sum_t a_tf (mean_k g_t^k . d_f)  gradients at x - (1 - alpha_k) sum_f a_f d_f, K = 10
                                                             midpoints alpha_k: sums over features to the exact effect
                                                             of all of them (completeness)
    steering gradient       sum_t g_t . d_f / ||d_f||        first-order effect of writing the feature's row at every
                                                             token: says something about features that are silent too

Everything is the mean over prompts, in nats (per unit of edit length for the steering gradient). The blocks below the
site run once and are never differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clampdown.activations.capture import length_buckets
from clampdown.activations.collect import Progress
from clampdown.activations.continuation import Prefix, continue_logits, last_shared_layer, read_prefix
from clampdown.discovery.refusal_tokens import RefusalTokens, refusal_log_odds
from clampdown.errors import PromptSetError, SiteError
from clampdown.models.chat import encode, pad_left
from clampdown.models.loading import LanguageModel
from clampdown.saes.architectures import NORMALIZATIONS
from clampdown.saes.sae import Sae
from clampdown.types import Point, Prompt

STEPS = 10
CODES_PER_CHUNK = 2**24
TOKENS_PER_BATCH = 2048

Residual = Float[Tensor, "batch pos d_model"]
PerFeature = Float[np.ndarray, " d_sae"]


@dataclass(frozen=True, slots=True)
class Attribution:
    """Scores of every feature, means over prompts. `removed` is the exact mean effect, in nats, of all features
    together (log-odds as they are minus log-odds with no feature left): what integrated gradients should sum to."""

    gradient_x_activation: PerFeature
    integrated_gradients: PerFeature
    steering_gradient: PerFeature
    removed: float


def attribute(
    lm: LanguageModel,
    sae: Sae,
    prompts: Sequence[Prompt],
    tokens: RefusalTokens,
    *,
    steps: int = STEPS,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    on_progress: Progress | None = None,
) -> Attribution:
    """Score every feature by the gradient of the refusal log-odds at the first reply token.

    Raises `PromptSetError` without prompts, `SiteError` for an SAE that does not read a block's output.
    """
    if not prompts:
        raise PromptSetError("no prompts to attribute refusal on")
    encoded = [encode(lm, prompt.messages) for prompt in prompts]
    sums = _Sums.empty(sae.cfg.d_sae)
    for rows in length_buckets([len(ids) for ids in encoded], tokens_per_batch):
        batch = pad_left([encoded[i] for i in rows], lm.pad_id, lm.device)
        sums.add(_Batch(lm, sae, read_prefix(lm, batch, _layer(sae)), tokens), steps)
        if on_progress:
            on_progress(sums.count, len(prompts))
    return sums.mean()


def _layer(sae: Sae) -> int:
    layer = last_shared_layer([sae.cfg.site])
    if layer is None or sae.cfg.site.point is not Point.RESID_POST:
        raise SiteError(f"attribution needs an SAE on a block's output, this one reads {sae.cfg.site.name}")
    return layer


@dataclass(frozen=True)
class _Batch:
    """One batch of prompts at the site."""

    lm: LanguageModel
    sae: Sae
    prefix: Prefix
    tokens: RefusalTokens

    @property
    def real(self) -> Bool[Tensor, "batch pos"]:
        return self.prefix.batch.attention_mask.bool()

    def gradient(self, residual: Residual) -> tuple[Residual, Float[Tensor, " batch"]]:
        """Of the log-odds, each row's with respect to its own residual; and the log-odds."""
        leaf = residual.detach().requires_grad_()
        with torch.enable_grad():
            log_odds = refusal_log_odds(
                continue_logits(self.lm, replace(self.prefix, residual=leaf))[:, -1], self.tokens
            )
            (gradient,) = torch.autograd.grad(log_odds.sum(), leaf)
        return gradient.masked_fill(~self.real[..., None], 0.0).float(), log_odds.detach()

    @torch.no_grad()
    def codes_part(self) -> Residual:
        """What all features together contribute to the residual: decode(a) without the decoder's bias. 0 on padding,
        which is never attended to."""
        x = self.prefix.residual.to(self.sae.dtype)
        part = torch.cat([self._contribution(chunk) for chunk in x.flatten(0, 1).split(self._chunk)])
        return part.view_as(x).to(self.prefix.residual.dtype).masked_fill(~self.real[..., None], 0.0)

    def _contribution(self, x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        return NORMALIZATIONS[self.sae.cfg.normalize_activations](x).scaled(self.sae.encode(x) @ self.sae.W_dec)

    @property
    def _chunk(self) -> int:
        return max(1, CODES_PER_CHUNK // self.sae.cfg.d_sae)

    @torch.no_grad()
    def per_feature(self, gradient: Residual, *, weighted: bool) -> PerFeature:
        """sum over tokens of (g . d_f), times the feature's activation there when `weighted`."""
        total = torch.zeros(self.sae.cfg.d_sae, dtype=torch.float64, device=self.sae.device)
        x = self.prefix.residual.flatten(0, 1).to(self.sae.dtype)
        g = gradient.flatten(0, 1).to(self.sae.device, self.sae.dtype)
        for x_part, g_part in zip(x.split(self._chunk), g.split(self._chunk), strict=True):
            pulled = NORMALIZATIONS[self.sae.cfg.normalize_activations](x_part).scaled(g_part) @ self.sae.W_dec.T
            total += (pulled * self.sae.encode(x_part) if weighted else pulled).double().sum(0)
        return total.cpu().numpy()


@dataclass(slots=True)
class _Sums:
    """Sums over the prompts so far."""

    count: int
    gradient: PerFeature
    integrated: PerFeature
    steering: PerFeature
    lengths: PerFeature
    removed: float = 0.0

    @classmethod
    def empty(cls, d_sae: int) -> _Sums:
        return cls(0, np.zeros(d_sae), np.zeros(d_sae), np.zeros(d_sae), np.zeros(d_sae))

    def add(self, batch: _Batch, steps: int) -> None:
        x = batch.prefix.residual
        part = batch.codes_part()
        gradient, whole = batch.gradient(x)
        path = torch.zeros_like(gradient)
        for k in range(steps):
            path += batch.gradient(x - (1 - (k + 0.5) / steps) * part)[0] / steps
        self.gradient += batch.per_feature(gradient, weighted=True)
        self.steering += batch.per_feature(gradient, weighted=False)
        if steps:
            self.integrated += batch.per_feature(path, weighted=True)
        self.removed += float((whole - batch.gradient(x - part)[1]).sum())
        self.lengths = batch.sae.W_dec.double().norm(dim=1).clamp(min=1e-12).cpu().numpy()
        self.count += len(x)

    def mean(self) -> Attribution:
        n = self.count
        return Attribution(self.gradient / n, self.integrated / n, self.steering / n / self.lengths, self.removed / n)
