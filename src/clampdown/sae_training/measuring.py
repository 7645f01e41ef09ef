"""What an SAE does to a model's residuals, its predictions and its refusals.

    FVU          |x - x'|^2 / |x - mean(x)|^2 over held-out residuals x with reconstructions x'
    L0           features active per token
    dead, rare   share of features that never fired, and that fired on fewer than one token in 10,000
    recovered    (CE without the site - CE with x') / (CE without the site - CE): 1 is as good as untouched
    refusal      the log-odds of opening a refusal, with x' in the place of x, against the untouched model

Sinks are left as they are, here as in steering: the first position and residuals longer than SINK times the median.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.activations.capture import forward_to, length_buckets
from clampdown.discovery.refusal_tokens import RefusalTokens, find_refusal_tokens, refusal_log_odds
from clampdown.errors import NotEnoughDataError, SaeError
from clampdown.evaluation.judges.table import JUDGES
from clampdown.models.chat import Batch, encode, pad_left
from clampdown.models.loading import LanguageModel
from clampdown.sae_training.rows import SINK, is_sink
from clampdown.sae_training.texts import Text, TokenRow
from clampdown.saes.sae import Sae
from clampdown.types import Prompt

Residuals = Float[Tensor, "tokens d_model"]
Put = Callable[[Residuals], Residuals]
Progress = Callable[[int, int], None]

RARE = 1e-4
REPLY_TOKENS = 24
_CHUNK, _TOKENS_PER_BATCH = 4096, 512


@dataclass(frozen=True, slots=True)
class Fit:
    """How well residuals are reconstructed. `fired_on`: over how many tokens features were counted as dead or rare."""

    fvu: float
    l0: float
    dead: float
    rare: float
    tokens: int
    fired_on: int


@dataclass(frozen=True, slots=True)
class Predictions:
    """Cross-entropies in nats per token: untouched, reconstructed, and with the site's residual zeroed."""

    ce: float
    ce_reconstructed: float
    ce_zeroed: float
    tokens: int

    @property
    def recovered(self) -> float | None:
        lost = self.ce_zeroed - self.ce
        return None if lost <= 0 else (self.ce_zeroed - self.ce_reconstructed) / lost


@dataclass(frozen=True, slots=True)
class Refusals:
    """Refusal log-odds of requests, untouched and reconstructed: means, correlation, how often the sign stays.
    `correlation` is None where the log-odds do not vary."""

    untouched: float
    reconstructed: float
    correlation: float | None
    same_side: float
    requests: int


@torch.no_grad()
def fit(sae: Sae, held_out: Residuals, counted: Float[Tensor, "counted d_model"] | None = None) -> Fit:
    """Reconstruction of held-out residuals; features are counted on these and on `counted`, when there are more."""
    mean = held_out.float().mean(0)
    error, spread, fired = 0.0, 0.0, torch.zeros(sae.cfg.d_sae)
    for part in held_out.split(_CHUNK):
        x = part.float()
        code = sae.encode(x)
        error += float((x - sae.decode(code, x)).double().square().sum())
        spread += float((x - mean).double().square().sum())
        fired += (code > 0).float().sum(0)
    l0 = float(fired.sum()) / len(held_out)
    for part in () if counted is None else counted.split(_CHUNK):
        fired += (sae.encode(part.float()) > 0).float().sum(0)
    tokens = len(held_out) + (0 if counted is None else len(counted))
    dead = float((fired == 0).float().mean())
    rare = float((fired < RARE * tokens).float().mean())
    return Fit(error / spread, l0, dead, rare, len(held_out), tokens)


@contextmanager
def replaced(lm: LanguageModel, sae: Sae, batch: Batch, put: Put, longest: float) -> Iterator[None]:
    """The model with the residual at the SAE's site replaced by `put` of it, sinks and padding excepted."""
    real = batch.attention_mask.bool()

    def hook(hidden: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        sinks = is_sink(hidden.float().norm(dim=-1), batch.position_ids, longest)
        chosen = real & ~sinks
        out = hidden.clone()
        out[chosen] = put(hidden[chosen].float()).to(hidden.dtype)
        return out

    handle = lm.layout.hook_point(sae.cfg.site).register(hook)
    try:
        yield
    finally:
        handle.remove()


def _logits(lm: LanguageModel, batch: Batch, keep: int = 0) -> Float[Tensor, "batch kept vocab"]:
    return lm.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=keep,
    ).logits


def _cross_entropy(logits: Float[Tensor, "batch pos vocab"], batch: Batch) -> float:
    """Summed over the real tokens that have one before them."""
    counted = batch.attention_mask[:, 1:].bool() & batch.attention_mask[:, :-1].bool()
    chosen = logits[:, :-1][counted].float().log_softmax(-1)
    return -float(chosen.gather(1, batch.input_ids[:, 1:][counted][:, None]).double().sum())


@torch.no_grad()
def predictions(
    lm: LanguageModel, sae: Sae, rows: Sequence[TokenRow], longest: float, on_progress: Progress | None = None
) -> Predictions:
    """Cross-entropy of texts under the three conditions."""
    sums, tokens = [0.0, 0.0, 0.0], 0
    buckets = length_buckets([len(row.ids) for row in rows], _TOKENS_PER_BATCH)
    for number, bucket in enumerate(buckets):
        batch = pad_left([rows[i].ids for i in bucket], lm.pad_id, lm.device)
        sums[0] += _cross_entropy(_logits(lm, batch), batch)
        for place, put in ((1, sae.reconstruct), (2, torch.zeros_like)):
            with replaced(lm, sae, batch, put, longest):
                sums[place] += _cross_entropy(_logits(lm, batch), batch)
        tokens += sum(len(rows[i].ids) - 1 for i in bucket)
        if on_progress is not None:
            on_progress(number + 1, len(buckets))
    if not tokens:
        raise NotEnoughDataError("no text has two tokens: nothing is predicted")
    untouched, reconstructed, zeroed = (total / tokens for total in sums)
    return Predictions(untouched, reconstructed, zeroed, tokens)


def refusal_tokens(lm: LanguageModel, requests: Sequence[Text]) -> RefusalTokens:
    """How this model opens a refusal, from its own short replies. Raises `NotEnoughDataError` when it refuses none."""
    prompts = [Prompt(str(i), request.messages, request.source) for i, request in enumerate(requests)]
    return find_refusal_tokens(lm, prompts, JUDGES["rules"](""), max_new_tokens=REPLY_TOKENS)


@torch.no_grad()
def refusals(lm: LanguageModel, sae: Sae, requests: Sequence[Text], tokens: RefusalTokens, longest: float) -> Refusals:
    """Refusal log-odds of requests, untouched and with the reconstruction in the residual's place."""
    before, after = [], []
    for request in requests:
        batch = pad_left([encode(lm, request.messages)], lm.pad_id, lm.device)
        before.append(refusal_log_odds(_logits(lm, batch, 1)[:, -1], tokens))
        with replaced(lm, sae, batch, sae.reconstruct, longest):
            after.append(refusal_log_odds(_logits(lm, batch, 1)[:, -1], tokens))
    plain, rebuilt = torch.cat(before), torch.cat(after)
    varies = len(plain) > 2 and float(plain.std()) > 0 and float(rebuilt.std()) > 0
    correlation = float(torch.corrcoef(torch.stack([plain, rebuilt]))[0, 1]) if varies else None
    same = float(((plain > 0) == (rebuilt > 0)).float().mean())
    return Refusals(float(plain.mean()), float(rebuilt.mean()), correlation, same, len(requests))


def longest_of(lm: LanguageModel, sae: Sae, rows: Sequence[TokenRow]) -> float:
    """SINK times the median length of residuals at the SAE's site, first positions left out."""
    norms = []
    for bucket in length_buckets([len(row.ids) for row in rows], 4 * _TOKENS_PER_BATCH):
        batch = pad_left([rows[i].ids for i in bucket], lm.pad_id, lm.device)
        later = batch.attention_mask.bool() & (batch.position_ids > 0)
        norms.append(forward_to(lm, batch, [sae.cfg.site])[sae.cfg.site][later].float().norm(dim=1))
    return SINK * float(torch.cat(norms).median())


def grafted(sae: Sae, residuals: Residuals, rounds: int = 8) -> Sae:
    """The SAE moved to where these residuals lie: their mean takes the place of the mean that it was trained around.

    With shift s, x' = decode(encode(x - s)) + s. s is what is left over on average, added up until nothing is. Raises
    `SaeError` for an SAE that normalises its input, because a shift is another one for every residual then.
    """
    if sae.cfg.normalize_activations not in ("none", "expected_average_only_in"):
        raise SaeError(f"SAE '{sae.name}' normalises its input: there is no mean to graft")
    moved, x = sae, residuals.float()
    for _ in range(rounds):
        with torch.no_grad():
            moved = _shifted(moved, (x - moved.reconstruct(x)).mean(0))
    return moved


def _shifted(sae: Sae, by: Float[Tensor, " d_in"]) -> Sae:
    tensors = {**sae.tensors, "b_dec": sae.b_dec + by}
    if not sae.cfg.apply_b_dec_to_input:
        read = by @ sae.W_enc
        tensors |= {name: tensors[name] - read for name in ("b_enc", "b_gate") if name in tensors}
        if "b_mag" in tensors:
            tensors["b_mag"] = tensors["b_mag"] - read * tensors["r_mag"].exp()
    return replace(sae, tensors=tensors)
