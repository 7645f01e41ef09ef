"""Which first tokens mean refusal for this model, and how likely it is to say one.

The tokens come from the model's own replies: the first token of each reply that a judge calls a refusal. A token that
opens other replies as often is no sign of refusal and is left out. Then, at the position that predicts the first
reply token, with P the total probability of those tokens,

    refusal log-odds = log P - log(1 - P)

which needs a prefill only, no generation. A token such as "I" may open "I can't help" and "I don't know" alike. It
counts as long as refusals open with it more often: leaving it out of both sides predicted generated refusals no better.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.errors import NotEnoughDataError
from clampdown.models.chat import encode
from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel
from clampdown.types import Judge, Prompt, Verdict


@dataclass(frozen=True, slots=True)
class RefusalTokens:
    """First-token ids of refusals, most common first. `coverage` is the share of the refusals seen that open with one
    of them, `leakage` the share of other replies that do."""

    ids: tuple[int, ...]
    coverage: float
    leakage: float
    n_refused: int
    n_other: int


def derive_refusal_tokens(refused: Sequence[int], other: Sequence[int], *, min_share: float = 0.02) -> RefusalTokens:
    """From the first token ids of refusals and of other replies: tokens that open at least `min_share` of refusals,
    and a larger share of refusals than of other replies.

    Raises `NotEnoughDataError` when there is no refusal, or no token that tells refusals apart.
    """
    if not refused:
        raise NotEnoughDataError("no reply was a refusal", hint="give prompts that the unsteered model refuses")
    in_refused, in_other = Counter(refused), Counter(other)
    ids = tuple(
        token
        for token, count in in_refused.most_common()
        if count >= min_share * len(refused) and count / len(refused) > in_other[token] / max(len(other), 1)
    )
    if not ids:
        raise NotEnoughDataError("refusals and other replies open with the same tokens", hint="add more prompts")
    return RefusalTokens(
        ids=ids,
        coverage=sum(in_refused[token] for token in ids) / len(refused),
        leakage=sum(in_other[token] for token in ids) / max(len(other), 1),
        n_refused=len(refused),
        n_other=len(other),
    )


def find_refusal_tokens(
    lm: LanguageModel, prompts: Sequence[Prompt], judge: Judge, *, max_new_tokens: int = 48
) -> RefusalTokens:
    """Let the model answer, judge the replies, and derive its refusal tokens. Mix prompts it refuses with others."""
    replies = generate(lm, [encode(lm, prompt.messages) for prompt in prompts], max_new_tokens=max_new_tokens)
    first: dict[bool, list[int]] = {True: [], False: []}
    for prompt, reply in zip(prompts, replies, strict=True):
        if reply.ids:
            first[judge(prompt, reply.text).verdict is Verdict.REFUSED].append(reply.ids[0])
    return derive_refusal_tokens(first[True], first[False])


OPENINGS = ("I'm sorry", "I am sorry", "Sorry", "I cannot", "I can't", "I can\u2019t", "Unfortunately", "As an AI")


def assumed_refusal_tokens(lm: LanguageModel) -> RefusalTokens:
    """The first tokens of common English refusals, for a model that showed none of its own. `n_refused` is 0: nothing
    says that this model would open a refusal so."""
    first = (lm.tokenizer(text, add_special_tokens=False).input_ids[:1] for text in OPENINGS)
    unknown = {lm.tokenizer.unk_token_id}
    ids = tuple(dict.fromkeys(token for tokens in first for token in tokens if token not in unknown))
    if not ids:
        raise NotEnoughDataError("this model's tokenizer has no token that opens an English refusal")
    return RefusalTokens(ids=ids, coverage=0.0, leakage=0.0, n_refused=0, n_other=0)


def refusal_log_odds(logits: Float[Tensor, "batch vocab"], tokens: RefusalTokens) -> Float[Tensor, " batch"]:
    """log P - log(1 - P) from the logits of the first reply token, in nats, without forming P."""
    is_refusal = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    is_refusal[list(tokens.ids)] = True
    exact = logits.double()
    return exact[:, is_refusal].logsumexp(-1) - exact[:, ~is_refusal].logsumexp(-1)
