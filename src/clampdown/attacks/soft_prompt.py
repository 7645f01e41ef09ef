"""A soft prompt: vectors in place of a suffix's tokens, found by gradient descent. No text is that good: it bounds what
any suffix of this length could do, for somebody who holds the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.attacks.budget import Budget, Clock
from clampdown.attacks.objective import Objective
from clampdown.attacks.suffix import Progress, first_suffix, plain_tokens
from clampdown.attacks.surrogate import Embedded, Slot, Surrogate

RATE = 0.1
"""Step of Adam, as a share of the embeddings' own spread."""


@dataclass(frozen=True, slots=True)
class SoftPrompt:
    """One objective's vectors. `free` are the tokens that hold their place."""

    objective: Objective
    slot: Slot
    free: tuple[int, ...]
    vectors: Float[Tensor, "free d_model"]
    loss: float
    log_odds: float


def fit_soft_prompts(
    surrogate: Surrogate, places: Sequence[tuple[Objective, Slot]], budget: Budget, clock: Clock, tick: Progress
) -> list[SoftPrompt]:
    """For every objective its own; those of the smallest loss on the way."""
    lm = surrogate.lm
    allowed = plain_tokens(lm)
    free = first_suffix(lm, allowed, budget.suffix_tokens)
    table = lm.model.get_input_embeddings()(allowed).float()
    start = lm.model.get_input_embeddings()(torch.tensor(free, device=lm.device)).float()
    vectors = start.repeat(len(places), 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=RATE * float(table.std()))
    best = [SoftPrompt(o, s, tuple(free), start.clone(), float("inf"), float("inf")) for o, s in places]
    for step in range(1, budget.steps + 1):
        if clock.over():
            break
        losses = surrogate.losses([(place, free) for _, place in places], lambda x: _placed(x, vectors, places))
        _keep_better(best, vectors.detach(), losses.total.tolist(), losses.log_odds.tolist())
        optimizer.zero_grad()
        losses.total.sum().backward()
        optimizer.step()
        tick(step, budget.steps)
    return best


def _keep_better(
    best: list[SoftPrompt], vectors: Float[Tensor, "rows free d_model"], totals: list[float], log_odds: list[float]
) -> None:
    for i, (old, total) in enumerate(zip(best, totals, strict=True)):
        if total < old.loss:
            best[i] = SoftPrompt(old.objective, old.slot, old.free, vectors[i].clone(), total, log_odds[i])


def _placed(
    x: Float[Tensor, "rows pos d_model"],
    vectors: Float[Tensor, "rows free d_model"],
    places: Sequence[tuple[Objective, Slot]],
) -> Float[Tensor, "rows pos d_model"]:
    """The vectors in the free columns of prompts with their openings behind."""
    behind = max(len(place.opening) for _, place in places) + len(places[0][1].after)
    return with_vectors(x, vectors, behind)


def with_vectors(
    x: Float[Tensor, "rows pos d_model"], vectors: Float[Tensor, "rows free d_model"], behind: int
) -> Float[Tensor, "rows pos d_model"]:
    """The vectors in the columns that end `behind` before the last."""
    end = x.shape[1] - behind
    return torch.cat([x[:, : end - vectors.shape[1]], vectors.to(x.dtype), x[:, end:]], dim=1)


def in_prompts(found: Sequence[SoftPrompt]) -> Callable[[Embedded], Embedded]:
    """A change of embeddings for the batch that answers these prompts. It acts on the prompts' own pass: a reply's
    tokens, and what a gate reads by itself, have another shape."""
    vectors = torch.stack([each.vectors for each in found])
    behind = len(found[0].slot.after)
    width = max(len(each.slot.prompt(each.free)) for each in found)

    def change(x: Embedded) -> Embedded:
        return with_vectors(x, vectors, behind) if x.shape[:2] == (len(found), width) else x

    return change
