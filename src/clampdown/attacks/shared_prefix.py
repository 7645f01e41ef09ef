"""Candidates of a suffix differ behind the question only: what stands before it is passed once and kept in a cache.

Causal attention makes this exact. It holds for the bare model and for plans whose edit of a token does not depend on
what follows it; others are measured by whole passes. A gate pools over the whole prompt, so the residual that it read
of the beginning is kept too.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from clampdown.attacks.surrogate import Losses, Slot, Surrogate
from clampdown.discovery.refusal_tokens import refusal_log_odds
from clampdown.evaluation.utility import stack_rows
from clampdown.models.chat import pad_left
from clampdown.models.generation import growing_cache
from clampdown.steering.hooks import can_resume
from clampdown.types import Site


class SharedPrefix:
    """The prompts of some slots up to their free tokens."""

    def __init__(self, surrogate: Surrogate, slots: Sequence[Slot]) -> None:
        lm = surrogate.lm
        self._surrogate, self._slots = surrogate, tuple(slots)
        self._batch = pad_left([place.before for place in slots], lm.pad_id, lm.device)
        self._width = self._batch.input_ids.shape[1]
        self._seen: dict[Site, Tensor] = {}
        self._cache: Any = growing_cache()
        with torch.no_grad(), surrogate.hooks(len(slots), self._width, self._seen):
            lm.model(
                input_ids=self._batch.input_ids,
                attention_mask=self._batch.attention_mask,
                position_ids=self._batch.position_ids,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )

    @staticmethod
    def of(surrogate: Surrogate, slots: Sequence[Slot]) -> SharedPrefix | None:
        """None for a plan whose edits look ahead."""
        return SharedPrefix(surrogate, slots) if can_resume(surrogate.plan) else None

    @torch.no_grad()
    def losses(self, rows: Sequence[tuple[int, Sequence[int]]]) -> Losses:
        """As `Surrogate.losses`, of (number of the slot, free tokens)."""
        surrogate, lm = self._surrogate, self._surrogate.lm
        which = torch.tensor([number for number, _ in rows], device=lm.device)
        prompts = [[*free, *self._slots[number].after] for number, free in rows]
        openings = [self._slots[number].opening for number, _ in rows]
        ids, real, end = stack_rows(prompts, openings, lm.pad_id, lm.device)
        mask = torch.cat([self._batch.attention_mask[which], real.long()], dim=1)
        seen: dict[Site, Tensor] = {}
        with surrogate.hooks(len(rows), self._width + end, seen, resumed=True):
            logits = lm.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, self._width :],
                past_key_values=self._widened(which),
                use_cache=True,
                logits_to_keep=ids.shape[1] - end + 1,
            ).logits
        whole = torch.cat([self._batch.input_ids[which], ids[:, :end]], dim=1)
        content = lm.chat.content_mask(whole, mask[:, : whole.shape[1]])
        read = {site: torch.cat([self._seen[site][which], x[:, :end]], dim=1) for site, x in seen.items()}
        return Losses(
            refusal_log_odds(logits[:, 0], surrogate.tokens).float(),
            surrogate.opening(logits[:, :-1].float(), ids[:, end:], real[:, end:]),
            surrogate.gate_losses(read, content, whole.shape[1]),
        )

    def _widened(self, which: Int[Tensor, " rows"]) -> Any:
        cache = copy.deepcopy(self._cache)
        cache.batch_select_indices(which)
        return cache
