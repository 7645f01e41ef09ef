"""What an SAE fails to reconstruct of ordinary text, as a few directions: the principal directions of its error.

A clamp that keeps the SAE's error term hands on whatever hides in it (2606.18322); one that drops it hands on nothing,
and the model loses what it needs. Most of what it needs lies in few directions, which are fitted here on benign
prompts and the replies that the unsteered model gives. The error is taken as it is, not less its mean: what is dropped
is dropped whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.activations.capture import capture
from clampdown.activations.sinks import sinks_at
from clampdown.errors import PlanError, PromptSetError
from clampdown.models.chat import encode
from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.types import Prompt

REPLY_TOKENS = 48
BATCH = 64


@dataclass(frozen=True, slots=True)
class ErrorSubspace:
    """Orthonormal directions, the largest share of the error first. `fvu` is the share of the residual's variance that
    is lost when the error is passed on within them only; `dropped` when none of it is."""

    directions: Float[Tensor, "rank d_model"]
    fvu: float
    dropped: float


def fit_error_subspace(lm: LanguageModel, sae: Sae, prompts: Sequence[Prompt], rank: int) -> ErrorSubspace:
    """Raises `PromptSetError` without prompts, `PlanError` for a rank that the residual does not have."""
    if not 1 <= rank <= lm.d_model:
        raise PlanError(f"a subspace of a residual of {lm.d_model} has 1 to {lm.d_model} directions, not {rank}")
    if not prompts:
        raise PromptSetError("what the SAE's error is on ordinary text is read on benign prompts", hint="give some")
    x = _read(lm, sae, _texts(lm, prompts))
    error = (x - sae.reconstruct(x.to(sae.dtype)).float()).double()
    return subspace_of_error(x.double(), error, rank)


def subspace_of_error(
    x: Float[Tensor, "tokens d_model"], error: Float[Tensor, "tokens d_model"], rank: int
) -> ErrorSubspace:
    """From residuals and what is missing of each."""
    values, vectors = torch.linalg.eigh(error.T @ error)
    variance = float((x - x.mean(0)).square().sum())
    left = float(values[: len(values) - rank].clamp(min=0).sum())
    return ErrorSubspace(
        vectors[:, -rank:].flip(1).T.float().contiguous(), left / variance, float(values.sum()) / variance
    )


def _texts(lm: LanguageModel, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Each prompt with the unsteered model's reply."""
    asked = [encode(lm, prompt.messages) for prompt in prompts]
    found = []
    for start in range(0, len(asked), BATCH):
        here = asked[start : start + BATCH]
        replies = generate(lm, here, max_new_tokens=REPLY_TOKENS)
        found += [[*ids, *reply.ids] for ids, reply in zip(here, replies, strict=True)]
    return found


@torch.no_grad()
def _read(lm: LanguageModel, sae: Sae, texts: Sequence[Sequence[int]]) -> Float[Tensor, "tokens d_model"]:
    """The residual at the SAE's site at every token but sinks: edits act on the template's tokens too."""
    site = sae.cfg.site
    sinks, found = sinks_at(lm, [site])[site], []
    for batch in capture(lm, [list(ids) for ids in texts], site):
        x = batch.residuals[site]
        found.append(x[batch.batch.attention_mask.bool() & sinks.outside(x)].float())
    return torch.cat(found)
