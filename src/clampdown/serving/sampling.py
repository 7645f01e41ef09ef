"""The next token of every row of a batch, each by its own rules and its own randomness.

1. Penalties that the model's generation config asks for, or the request, change a row's logits first.
2. Greedy rows take the likeliest token.
3. Sampled rows draw one uniform number each from a generator of their own, and take the token whose interval of the
   cumulative distribution holds it. `top_k` keeps as many of the likeliest tokens, `top_p` those of them that together
   reach it, `min_p` those that are at least this many times as likely as the likeliest: in the library's meaning and
   order. So a seed gives the same reply whoever else is in the batch.
4. Log-probabilities are those of the model as it is steered, at temperature 1, whatever the request samples with.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clampdown.models.generation_config import Penalties
from clampdown.serving.requests import Sampling, Token

TokenText = Callable[[int], str]
_COLDEST = 1e-9  # logits divided by less than this leave the range of a float, and would end the whole batch


@dataclass(frozen=True, slots=True)
class Drawing:
    """How one row draws: its request's sampling, the generator that is its alone, and its penalties."""

    sampling: Sampling
    generator: random.Random
    penalties: Penalties | None = None

    @classmethod
    def of(cls, sampling: Sampling, penalties: Penalties | None = None) -> Drawing:
        seed = sampling.seed  # Python's generator drops an integer's sign: -1 and 1 must not be the same draw
        return cls(sampling, random.Random(seed if seed is None else seed % 2**65), penalties or None)


def choose(
    logits: Float[Tensor, "rows vocab"], drawings: Sequence[Drawing], pasts: Sequence[Sequence[int]] = ()
) -> list[int | None]:
    """The next token of each row, or None where the model gave no number to choose by. `pasts` are what comes before,
    for rows with penalties."""
    logits = _penalised(logits, drawings, pasts)
    highest, likeliest = logits.max(-1)
    chosen: list[int | None] = [
        token if abs(value) < float("inf") else None
        for token, value in zip(likeliest.tolist(), highest.tolist(), strict=True)
    ]
    sampled = [i for i, d in enumerate(drawings) if d.sampling.temperature > 0 and chosen[i] is not None]
    if sampled:
        drawn = _draw(logits[sampled].float(), [drawings[i] for i in sampled])
        for row, token in zip(sampled, drawn, strict=True):
            chosen[row] = token
    return chosen


def _penalised(
    logits: Float[Tensor, "rows vocab"], drawings: Sequence[Drawing], pasts: Sequence[Sequence[int]]
) -> Float[Tensor, "rows vocab"]:
    rows = [i for i, drawing in enumerate(drawings) if drawing.penalties]
    if not rows:
        return logits
    changed = logits.float().clone()
    for i in rows:
        penalties = drawings[i].penalties
        if penalties is not None:
            changed[i] = penalties(pasts[i], logits[i])
    return changed


def _draw(logits: Float[Tensor, "rows vocab"], drawings: Sequence[Drawing]) -> list[int]:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    scaled = logits.double() / column([max(d.sampling.temperature, _COLDEST) for d in drawings])
    weights, order = scaled.softmax(-1).sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(weights.shape[-1], device=logits.device)
    first = weights * (ranks < column([d.sampling.top_k or weights.shape[-1] for d in drawings]))
    share = first / first.sum(-1, keepdim=True)
    enough = (share.cumsum(-1) - share) < column([d.sampling.top_p for d in drawings])
    likely = weights >= column([d.sampling.min_p for d in drawings]) * weights[:, :1]
    kept = first * enough * likely
    kept[:, 0] = weights[:, 0]  # top_p = 0 means the likeliest
    cumulative = kept.cumsum(-1)
    point = column([d.generator.random() for d in drawings]) * cumulative[:, -1:]
    rank: Int[Tensor, "rows 1"] = (cumulative <= point).sum(-1, keepdim=True)
    last = (kept > 0).sum(-1, keepdim=True) - 1
    return order.gather(-1, torch.minimum(rank, last)).flatten().tolist()


def describe(
    logits: Float[Tensor, "rows vocab"], ids: Sequence[int], n_top: Sequence[int | None], text_of: TokenText
) -> list[Token]:
    """Each row's token with its log-probability and as many of the likeliest as it asked for (None: no figures)."""
    asked = [i for i, n in enumerate(n_top) if n is not None]
    tokens = [Token(token, text_of(token)) for token in ids]
    if not asked:
        return tokens
    scores = logits[asked].float().log_softmax(-1)
    own = scores.gather(-1, torch.tensor([[ids[i]] for i in asked], device=logits.device)).flatten().tolist()
    width = min(max(n_top[i] or 0 for i in asked), scores.shape[-1])
    best = scores.topk(width, dim=-1)
    for row, score, values, indices in zip(asked, own, best.values.tolist(), best.indices.tolist(), strict=True):
        pairs = list(zip(indices, values, strict=True))[: n_top[row]]
        top = tuple((index, text_of(index), value) for index, value in pairs)
        tokens[row] = Token(ids[row], text_of(ids[row]), score, top)
    return tokens
