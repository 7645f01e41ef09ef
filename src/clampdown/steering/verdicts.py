"""From a prompt to whether each row is steered: what gates read, and what follows from it.

1. A pass that holds whole prompts is read as it goes by. Where a prompt comes in pieces, or on top of a cache, gates
   have to decide before its first column is edited: then the unsteered model runs ahead over the whole of it, up to the
   highest gate's site and no further.
2. Gates with a window read the conversation turn by turn instead, in passes of their own (`turn_reading.py`).
3. A score above the threshold opens the branch for this turn. External gates decide from the prompt's text instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from clampdown.models.chat import content_texts
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import FeatureSource
from clampdown.steering.batch_state import BatchState
from clampdown.steering.gate_kinds import external_score
from clampdown.steering.passes import aligned
from clampdown.steering.plan import Plan
from clampdown.steering.program import Rows
from clampdown.steering.tally import Tally
from clampdown.steering.turn_reading import read_ahead

AHEAD = 1024
"""Columns that run ahead at once, at least."""


class Enough(Exception):
    """The highest gate's site has been reached: nothing above it is needed."""


def score_texts(lm: LanguageModel, plans: Sequence[Plan | None], state: BatchState, tally: Tally) -> None:
    """External gates decide before the model runs, from the text of each row's prompt."""
    texts = content_texts(lm, state.prompts, content_of(lm, state))
    found: dict[tuple[str, str], float] = {}
    for row, plan in enumerate(plans):
        for branch, gate in enumerate(plan.gates if plan is not None else ()):
            if gate.scorer and not gate.window:
                key = (gate.scorer, texts[int(state.prompt_of[row])])
                score = found[key] = found[key] if key in found else external_score(*key)
                one = torch.arange(len(state.alive), device=state.alive.device) == row
                scores = torch.full_like(state.opened[0], score, dtype=torch.float32)
                factors = torch.full_like(scores, gate.factor(score))
                decide(state, tally, branch, one, scores, gate.threshold, factors)


def read_turns(
    lm: LanguageModel, plans: Rows, saes: Mapping[str, FeatureSource], state: BatchState, tally: Tally
) -> None:
    """Gates that read turn by turn decide before the prompt's pass, except on prompts that are one turn."""
    prompts = [
        (ids[kept].tolist(), inside[kept].tolist())
        for ids, inside, kept in zip(state.prompts, content_of(lm, state), state.real_prompts, strict=True)
    ]
    state.read_ahead = read_ahead(lm, plans, saes, prompts, state.prompt_of.tolist())
    decided = torch.zeros_like(state.opened)
    for (branch, row), read in state.read_ahead.items():
        decided[branch, row] = True
        state.opened[branch, row] = read.opens
        state.factor[branch, row] = tally.factor[branch, row] = read.factor
        tally.gate_score[branch, row] = read.score
    state.gates = tuple(replace(gate, gated=gate.gated & ~decided[gate.branch]) for gate in state.gates)
    tally.fired[:, state.alive] = state.fired


def content_of(lm: LanguageModel, state: BatchState) -> Bool[Tensor, "prompts prompt"]:
    """Which tokens of `state.prompts` somebody wrote."""
    return lm.chat.content_mask(state.prompts, state.real_prompts.long())


def read_prompts(
    lm: LanguageModel, state: BatchState, tally: Tally, site: str, x: Float[Tensor, "rows pos d_model"]
) -> None:
    """Let a site's gates decide. x are the columns from the conversation's first on, of prompts while `narrow`."""
    content = content_of(lm, state)
    # Below the widening x is one prompt per row and each row looks its own up; above it, x holds the rows.
    row_of = state.prompt_of if state.narrow else None
    own = content if state.narrow else content[state.prompt_of]
    prompt = aligned(x[:, : state.prompt_width], state.shift if state.narrow else state.row_shift)
    for gate in state.gates:
        if gate.site.name == site:
            scores = gate.scores(prompt, own, row_of)
            decide(state, tally, gate.branch, gate.gated, scores, gate.threshold, gate.factors(scores))


def decide(
    state: BatchState,
    tally: Tally,
    branch: int,
    gated: Bool[Tensor, " rows"],
    scores: Float[Tensor, " rows"],
    threshold: Float[Tensor, " rows"] | float,
    factors: Float[Tensor, " rows"],
) -> None:
    """Open or shut a branch's gate on the rows that have one, and say how strong its edits are."""
    state.opened[branch] = torch.where(gated, scores > threshold, state.opened[branch])
    state.factor[branch] = torch.where(gated, factors, state.factor[branch])
    tally.factor[branch, state.alive[gated]] = factors[gated]
    tally.gate_score[branch, state.alive[gated]] = scores[gated]
    tally.fired[:, state.alive] = state.fired


@torch.no_grad()
def run_ahead(
    lm: LanguageModel,
    ids: Int[Tensor, "rows prompt"],
    real: Bool[Tensor, "rows prompt"],
    positions: Tensor | None,
    at_once: int,
) -> None:
    """The whole prompt through the decoder, in pieces if it is long. The caller's hooks see it; the first piece that
    raises `Enough` has been seen."""
    decoder: Callable[..., Any] = lm.layout.decoder
    size = max(at_once, AHEAD)
    cache = DynamicCache(config=decoder.config) if ids.shape[1] > size else None  # type: ignore[attr-defined]
    for start in range(0, ids.shape[1], size):
        end = min(start + size, ids.shape[1])
        try:
            decoder(
                input_ids=ids[:, start:end],
                attention_mask=real[:, :end].long(),
                **({} if positions is None else {"position_ids": positions[..., start:end]}),
                past_key_values=cache,
                use_cache=cache is not None,
            )
        except Enough:
            continue
