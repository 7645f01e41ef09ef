"""The one-prompt finder of O'Brien et al. (2411.11296).

1. Let the model answer one archetypal harmful prompt, greedily; the answer must be a refusal.
2. Run prompt and answer through the model once and encode the residual at the answer's tokens.
3. Candidates are the features active on at least `min_tokens` (2) of those tokens; the paper's fewer than 100 remain.

The paper then clamps every candidate and keeps the one that raises refusals most: `discovery.causal`.
Candidates are listed by the number of answer tokens on which they are active, then by their mean activation there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import csr_array

from clampdown.activations.capture import forward_to
from clampdown.discovery.ranking import Finding, build_feature_set, make_provenance
from clampdown.errors import PromptSetError
from clampdown.models.chat import encode, pad_left
from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.types import FeatureSet, Judge, Prompt, Verdict


@dataclass(frozen=True, slots=True)
class SinglePromptSettings:
    """`min_tokens`: answer tokens on which a candidate must be active. `top`: how many candidates to keep."""

    min_tokens: int = 2
    max_new_tokens: int = 64
    top: int = 100


def reply_codes(
    lm: LanguageModel, sae: Sae, prompt: Sequence[int], reply: Sequence[int]
) -> Float[np.ndarray, "reply d_sae"]:
    """Feature activations at the positions of the reply's own tokens, the end token and other specials left out."""
    special = lm.chat.special_ids
    ids = [*prompt, *reply]
    residual = forward_to(lm, pad_left([ids], lm.pad_id, lm.device), [sae.cfg.site])[sae.cfg.site]
    kept = [i for i in range(len(prompt), len(ids)) if ids[i] not in special]
    with torch.no_grad():
        codes = sae.encode(residual[0, kept].to(sae.device, sae.dtype))
    return codes.float().cpu().numpy()


def _order(codes: Float[np.ndarray, "reply d_sae"], settings: SinglePromptSettings) -> list[int]:
    """Candidates by tokens active, then by mean activation; ties by feature index."""
    n_active = (codes > 0).sum(0)
    order = np.lexsort((-codes.mean(0), -n_active))
    return order[n_active[order] >= settings.min_tokens][: settings.top].tolist()


def find_from_one_prompt(
    lm: LanguageModel,
    sae: Sae,
    prompt: Prompt,
    *,
    judge: Judge | None = None,
    settings: SinglePromptSettings | None = None,
) -> FeatureSet:
    """Candidates from the model's own refusal of `prompt`.

    Scores: `reply_tokens_active`, `reply_mean_activation` (over all reply tokens), `max_activation` and
    `p99_activation` (over the reply tokens on which the feature is active). The reply is kept in `settings`.
    Raises `PromptSetError` when `judge` finds that the model did not refuse, or when the reply is too short.
    """
    settings = settings or SinglePromptSettings()
    ids = encode(lm, prompt.messages)
    reply = generate(lm, [ids], max_new_tokens=settings.max_new_tokens)[0]
    if judge is not None and judge(prompt, reply.text).verdict is not Verdict.REFUSED:
        raise PromptSetError(
            f"the model did not refuse '{prompt.text}': it answered '{reply.text}'",
            hint="single-prompt discovery reads the model's refusal; choose a prompt that it refuses",
        )
    if len(reply.ids) < settings.min_tokens:
        raise PromptSetError(f"the model answered '{prompt.text}' with fewer than {settings.min_tokens} tokens")
    codes = reply_codes(lm, sae, ids, reply.ids)
    finding = Finding(
        finder="single-prompt",
        ranked_by="reply_tokens_active",
        scores={"reply_tokens_active": (codes > 0).sum(0).astype(float), "reply_mean_activation": codes.mean(0)},
        order=_order(codes, settings),
        peaks=csr_array(codes),
        texts=[prompt.text] * len(codes),
        settings={"reply": reply.text} | {k: str(v) for k, v in dataclasses.asdict(settings).items()},
    )
    return build_feature_set(lm, sae, finding, make_provenance(lm, sae, [prompt]))


TRIED = 8  # harmful prompts, before giving up on a model that refuses none of them


def find_from_first_refusal(
    lm: LanguageModel,
    sae: Sae,
    prompts: Sequence[Prompt],
    *,
    judge: Judge | None = None,
    settings: SinglePromptSettings | None = None,
) -> FeatureSet:
    """`find_from_one_prompt` on the first of the prompts that the model refuses.

    Raises `PromptSetError` (the last prompt's) when it refuses none of the first `TRIED`.
    """
    last = PromptSetError("no harmful prompt to read a refusal from")
    for prompt in prompts[:TRIED]:
        try:
            return find_from_one_prompt(lm, sae, prompt, judge=judge, settings=settings)
        except PromptSetError as error:
            last = error
    raise last
