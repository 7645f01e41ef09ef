"""What a pass is: the beginning of a turn, more of the one before, or all of it again. Decided from positions, from
what the cache holds, and from the library call that it belongs to; never from how many passes there were.

A turn begins with what `generate` was given, or with a pass that no call explains and that starts at column 0 or puts
several columns on top of a reply. Where two readings are possible and would be steered differently, it is an error
that says how to tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

import torch

from clampdown.errors import SteeringNotAppliedError
from clampdown.steering.batch_state import BatchState
from clampdown.steering.generate_calls import GenerateCall
from clampdown.steering.passes import Pass


class Next(Enum):
    """What a pass is to the turn before it."""

    BEGIN = auto()
    GO_ON = auto()
    AGAIN = auto()
    """Without a cache every pass computes everything; only the last one counts."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the block's owner said, and what its plans ask for. `told`: where prompts end was given. `alike`: no plan
    tells prompt from reply. `resumed`: the first pass goes on from a cache that was filled elsewhere, as it should be.
    """

    told: bool
    alike: bool
    resumed: bool


def what_next(state: BatchState | None, now: Pass, call: GenerateCall | None, rules: Rules) -> Next:
    """Raises `SteeringNotAppliedError` for a pass that cannot be placed."""
    if state is None or (call is not None and state.call is not call):
        if now.past and not (rules.resumed and state is None):
            _check_cache(state, now)
        return Next.BEGIN
    if now.past == 0:
        return _from_the_first_column(state, now, call, rules)
    _check_cache(state, now)
    if now.past == state.seen and (now.width == 1 or call is not None or rules.told):
        return Next.GO_ON
    if now.past < state.seen:
        return _after_a_cut(state, now, call, rules)
    return _several_columns(state, rules)


def _check_cache(state: BatchState | None, now: Pass) -> None:
    """What the cache holds was computed in this block, and in this turn or one before."""
    if state is None or (state.cache is not None and now.cache is not state.cache):
        raise SteeringNotAppliedError(
            f"the cache holds {now.past} tokens that this block did not compute: whether they are steered is unknown",
            hint="fill the cache inside this block and go on with the same cache object, or start with an empty one",
        )
    if now.past > state.seen:
        raise SteeringNotAppliedError(
            f"{now.past - state.seen} tokens of the cache were computed without steering",
            hint="run every pass of a conversation inside the same block",
        )


def _from_the_first_column(state: BatchState, now: Pass, call: GenerateCall | None, rules: Rules) -> Next:
    if now.cache is None and _one_token_more(state, now):
        if call is not None or rules.told or rules.alike:
            return Next.AGAIN
        raise SteeringNotAppliedError(
            "a pass without a cache shows one token more than the last: a longer prompt, or a reply's next token?",
            hint="say where prompts end with steer(..., prompt_width=...), use a cache, or call generate",
        )
    if call is not None:
        raise SteeringNotAppliedError(
            "this call of generate runs the model on something else than its prompt",
            hint="decode greedily or by sampling; guidance and contrastive decoding cannot be steered",
        )
    return Next.BEGIN


def _one_token_more(state: BatchState, now: Pass) -> bool:
    if now.ids is None or state.prompt_ids is None or now.width != state.seen + 1:
        return False
    before = state.prompt_ids[state.prompt_of]
    return now.n_rows == before.shape[0] and bool(torch.equal(now.ids[:, : before.shape[1]], before))


def _after_a_cut(state: BatchState, now: Pass, call: GenerateCall | None, rules: Rules) -> Next:
    """The cache was cut back to before the end of the last pass."""
    if now.past >= state.prompt_width and (now.width == 1 or call is not None or rules.told):
        return Next.GO_ON
    if call is not None or now.past >= state.prompt_width:
        raise SteeringNotAppliedError(
            "the cache was cut, and several columns follow: guesses at the reply, or a new prompt?",
            hint="call generate, or say where prompts end with steer(..., prompt_width=...)",
        )
    return Next.BEGIN


def _several_columns(state: BatchState, rules: Rules) -> Next:
    """On top of a reply they are the next prompt. On top of a prompt they could be its next piece."""
    if state.seen > state.prompt_width or state.call is not None:
        return Next.BEGIN
    if rules.alike:
        return Next.GO_ON
    raise SteeringNotAppliedError(
        "several columns follow a prompt: its next piece, or a given reply? This plan treats the two differently",
        hint="call generate(..., prefill_chunk_size=...), or say where prompts end with steer(..., prompt_width=...)",
    )
