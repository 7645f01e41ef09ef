"""Rows that show the model the same prompt share its pass through the blocks below the lowest edit.

1. The model is called with every distinct prompt once. Blocks below the lowest edited site cannot tell one plan from
   another, so they run on prompts, not on rows.
2. Where the lowest edit acts, hidden states are widened from prompts to rows. Rows that cannot differ (one plan, a gate
   that stayed shut, neutral strengths) are one row: their results are shared, not computed again.
3. Blocks above get their batch-sized arguments (mask, position embeddings) widened to match, and after the pass the
   cached keys and values of the blocks below are widened too. Decoding then is an ordinary batch.

The hooks that do it are in `steering_block.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from clampdown.errors import PlanError
from clampdown.steering.batch_state import BatchState
from clampdown.steering.plan import Plan
from clampdown.steering.tally import Tally
from clampdown.types import Point, Site


@dataclass(frozen=True, slots=True)
class RowMap:
    """How the rows that were asked for lie in what the model computed.

    Output row i shows prompt `prompt_of[i]`; asked row r is answered by output row `row_of[r]`.
    """

    prompt_of: Int[Tensor, " outputs"]
    row_of: Int[Tensor, " rows"]


@dataclass
class SharedPass:
    """What a block knows of the pass that its rows share: the first `below` blocks run on prompts. `like` is each row's
    first row that it cannot differ from; `running` while the pass is going on."""

    below: int
    like: list[int] = field(default_factory=list)
    row_map: RowMap | None = None
    running: bool = False

    def begin(self, state: BatchState) -> None:
        self.like, self.running = [], state.narrow

    def choose(
        self, plans: Sequence[Plan | None], state: BatchState, gates_read: Collection[str]
    ) -> Int[Tensor, " kept"]:
        """The rows that are computed, for all that are like them."""
        self.like = rows_alike(plans, state, gates_read)
        return as_index(sorted(set(self.like)), state.alive.device)

    def widened(self, state: BatchState, kept: Int[Tensor, " kept"]) -> None:
        """From here on hidden states are one per row; `state` has the kept rows already."""
        output_of = {row: i for i, row in enumerate(kept.tolist())}
        state.gates = tuple(gate.at(kept) for gate in state.gates)
        state.narrow = False
        self.row_map = RowMap(state.prompt_of, as_index([output_of[row] for row in self.like], kept.device))

    def end(self, state: BatchState) -> None:
        """What blocks below the widening cached is per prompt: from now on it is per row."""
        if self.running and state.cache is not None:
            widen_cache(state.cache, self.below, state.prompt_of)
        self.running = False


def shared_blocks(sites: Iterable[Site], n_layers: int) -> int:
    """How many of the model's first blocks no edit at `sites` can reach."""
    return min((site.layer + (site.point is Point.RESID_POST) for site in sites), default=n_layers)


def first_alike(keys: Sequence[Hashable]) -> list[int]:
    """For every key the index of the first one equal to it."""
    first: dict[Hashable, int] = {}
    return [first.setdefault(key, i) for i, key in enumerate(keys)]


def rows_alike(plans: Sequence[Plan | None], state: BatchState, gates_read: Collection[str]) -> list[int]:
    """For each row the first row that cannot differ from it: one prompt, and one plan or none that acts.

    A plan whose gate is yet to be read stays with its own kind. `gates_read` are the sites where gates have been read.
    """

    def known(plan: Plan) -> bool:
        return all(not gate.site or gate.site in gates_read for gate in plan.gates)

    acting = {id(plan): None if plan is None or (plan.is_identity and known(plan)) else plan.digest for plan in plans}
    shut = (~state.fired.any(0)).tolist()
    rows = zip(state.prompt_of.tolist(), plans, shut, strict=True)
    return first_alike([(prompt, None if same else acting[id(plan)]) for prompt, plan, same in rows])


def share_verdicts(
    plans: Sequence[Plan | None], like: Sequence[int], site: str, state: BatchState, tally: Tally
) -> None:
    """A gate above the widening read one row for all that are computed as that one: they have its verdict."""
    for row, (plan, first) in enumerate(zip(plans, like, strict=True)):
        same = row != first and (0, row) not in state.read_ahead
        if same and plan is not None and any(gate.site == site for gate in plan.gates):
            for verdicts in (tally.gate_score, tally.fired, tally.factor):
                verdicts[:, row] = verdicts[:, first]


def checked_index(prompt_of: Int[Tensor, " rows"], n_prompts: int) -> Int[Tensor, " rows"]:
    """`prompt_of`, if every row names one of the prompts. Raises `PlanError`."""
    if len(prompt_of) and (int(prompt_of.min()) < 0 or int(prompt_of.max()) >= n_prompts):
        raise PlanError(
            f"rows name prompts up to {int(prompt_of.max())}, the batch has {n_prompts}",
            hint="`prompt_of` gives each row the index of its prompt in the batch",
        )
    return prompt_of


def widen_arguments(value: Any, n_prompts: int, prompt_of: Int[Tensor, " rows"]) -> Any:
    """Every batch-sized tensor inside a block's arguments, one row per row instead of one per prompt.

    One-dimensional tensors are positions, never batches.
    """
    if isinstance(value, Tensor):
        batched = value.ndim >= 2 and value.shape[0] == n_prompts
        return value[prompt_of.to(value.device)] if batched else value
    if isinstance(value, tuple | list):
        return type(value)(widen_arguments(item, n_prompts, prompt_of) for item in value)
    if isinstance(value, dict):
        return {key: widen_arguments(item, n_prompts, prompt_of) for key, item in value.items()}
    return value


def widen_cache(cache: Any, blocks: int, prompt_of: Int[Tensor, " rows"]) -> None:
    """Widen the cached keys and values of the first `blocks` blocks in place. The others hold rows already."""
    for layer in cache.layers[:blocks]:
        layer.batch_select_indices(prompt_of if layer.keys is None else prompt_of.to(layer.keys.device))


def as_index(values: Sequence[int], device: torch.device) -> Int[Tensor, " n"]:
    return torch.tensor(values, dtype=torch.long, device=device)


def distinct(sequences: Sequence[Sequence[Any]]) -> tuple[list[list[Any]], Int[Tensor, " rows"]]:
    """The different ones among sequences (of token ids, say), and for each sequence its place among them."""
    place: dict[tuple[Any, ...], int] = {}
    index = [place.setdefault(tuple(sequence), len(place)) for sequence in sequences]
    return [list(key) for key in place], torch.tensor(index, dtype=torch.long)
