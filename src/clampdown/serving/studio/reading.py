"""What the model holds and expects at one token of a conversation: features and next tokens, unsteered and steered.

The conversation up to its last answer is the prompt, as it was when that answer was made, so that gates read and scopes
cover what they did then. Both passes are over the same tokens: the difference is what the plan does at this token, not
what another answer would have been.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.errors import RequestError
from clampdown.models.chat import encode, pad_left, token_texts
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Plan
from clampdown.types import Message

SHOWN = 8
LEAST = 0.001
"""Next tokens that are rarer than this on both sides are not shown."""


@dataclass(frozen=True, slots=True)
class Line:
    """A feature's activation, or a next token's probability, without the plan and with it."""

    name: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class Looked:
    """One token: the strongest features there and the likeliest next tokens, on either side. `steered` says whether the
    plan acted at all: a gate may have stayed shut."""

    token: str
    features: tuple[Line, ...]
    following: tuple[Line, ...]
    steered: bool


@dataclass(frozen=True, slots=True)
class _Seen:
    residual: Float[Tensor, " d_model"]
    logits: Float[Tensor, " vocab"]


def look(lm: LanguageModel, sae: Sae, plan: Plan, messages: Sequence[Message], place: int) -> Looked:
    """Read both sides at the token number `place` of the encoded conversation.

    Raises `RequestError` for a token that the conversation does not have.
    """
    ids = encode(lm, messages, add_generation_prompt=False)
    if not 0 <= place < len(ids):
        raise RequestError("this token is no longer in the conversation", hint="click one that is shown now")
    before = _seen(lm, sae, ids, place)
    with steer(lm, plan, sae, prompt_width=_prompt(lm, messages, ids), require_reach=False) as steering:
        after = _seen(lm, sae, ids, place)
    (receipt,) = steering.receipts()
    words = token_texts(lm, messages, add_generation_prompt=False)
    acted = receipt is not None and receipt.tokens_touched > 0
    return Looked(words[place], _features(sae, before, after), _following(lm, before, after), acted)


def _prompt(lm: LanguageModel, messages: Sequence[Message], ids: Sequence[int]) -> int:
    """How many of the tokens are the prompt: all before the last answer, its header among them."""
    if messages[-1].role != "assistant":
        return len(ids)
    prompt = encode(lm, messages[:-1])
    same = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids)))
    return max(1, same)


@torch.no_grad()
def _seen(lm: LanguageModel, sae: Sae, ids: Sequence[int], place: int) -> _Seen:
    """Steering's hooks run first, so what is kept here is what the blocks above get."""
    kept: list[Tensor] = []
    batch = pad_left([ids], lm.pad_id, lm.device)

    def keep(hidden: Tensor) -> None:
        kept.append(hidden[0, place].clone())

    handle = lm.layout.hook_point(sae.cfg.site).register(keep)
    try:
        found = lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        handle.remove()
    return _Seen(kept[-1], found.logits[0, place].float())


@torch.no_grad()
def _features(sae: Sae, before: _Seen, after: _Seen) -> tuple[Line, ...]:
    codes = [sae.encode(seen.residual.to(sae.device, sae.dtype)).float() for seen in (before, after)]
    return tuple(
        Line(str(i), codes[0][i].item(), codes[1][i].item()) for i in _leading(*codes) if codes[0][i] or codes[1][i]
    )


def _following(lm: LanguageModel, before: _Seen, after: _Seen) -> tuple[Line, ...]:
    shares = [seen.logits.softmax(-1) for seen in (before, after)]
    lines = (Line(lm.tokenizer.decode([i]), shares[0][i].item(), shares[1][i].item()) for i in _leading(*shares))
    return tuple(line for line in lines if max(line.before, line.after) >= LEAST)


def _leading(one: Tensor, other: Tensor) -> list[int]:
    """The largest of either side, largest first."""
    either = torch.maximum(one, other)
    found = {*one.topk(min(SHOWN, len(one))).indices.tolist(), *other.topk(min(SHOWN, len(other))).indices.tolist()}
    return sorted(found, key=lambda i: -float(either[i]))
