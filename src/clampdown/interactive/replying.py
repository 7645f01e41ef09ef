"""A model that is steered while it replies: `steer` around `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clampdown.interactive.given import plan_of, saes_for
from clampdown.interactive.loading import AnyPlan, Asked, Model, load
from clampdown.models.chat import encode
from clampdown.models.generation import Generation
from clampdown.models.generation import generate as generate_ids
from clampdown.steering import hooks
from clampdown.steering.hooks import Steering
from clampdown.steering.ownership import owner_of
from clampdown.steering.plan import Plan
from clampdown.types import Message, Prompt


def steer(
    lm: Model, plans: AnyPlan | Sequence[AnyPlan | None] | None, **options: Any
) -> AbstractContextManager[Steering]:
    """Steer every call of the model inside the block: `with cd.steer(lm, plan) as s: ...; s.receipts()`.

    One plan for every row, or a list with one (or None) per row of the batch. The SAEs are those that the plans name.
    Raises `PlanMismatchError` for a plan that was made for another model or SAE.
    """
    model = load(lm)
    if plans is None or isinstance(plans, Plan | str | Path):
        found = None if plans is None else plan_of(plans)
        every = [found] if found else []
    else:
        found = [None if one is None else plan_of(one) for one in plans]
        every = [one for one in found if one is not None]
    return hooks.steer(model, found, saes_for(every, model), **options)


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model answered, in text and tokens, and whether it ended by itself."""

    prompt: str
    text: str
    ids: tuple[int, ...]
    finished: bool

    def __str__(self) -> str:
        return self.text


def generate(lm: Model, prompts: Asked | Sequence[Asked], *, max_new_tokens: int = 64) -> list[Reply]:
    """Greedy replies to one prompt or several, steered by the enclosing `steer` block if there is one.

    Plain strings are user turns.
    """
    model = load(lm)
    asked = [_messages(one) for one in _several(prompts)]
    ids = [encode(model, messages) for messages in asked]
    owner = owner_of(id(model.layout.decoder))
    on_keep = owner.keep_rows if isinstance(owner, Steering) else None
    replies = generate_ids(model, ids, max_new_tokens=max_new_tokens, on_keep=on_keep)
    return [_reply(messages, reply) for messages, reply in zip(asked, replies, strict=True)]


def _several(prompts: Asked | Sequence[Asked]) -> list[Asked]:
    """One prompt as a list of one; a list of messages is one conversation."""
    if isinstance(prompts, str | Prompt):
        return [prompts]
    listed = list(prompts)
    return [listed] if listed and all(isinstance(one, Message) for one in listed) else listed  # type: ignore[list-item]


def _messages(asked: Asked) -> tuple[Message, ...]:
    if isinstance(asked, str):
        return (Message("user", asked),)
    return asked.messages if isinstance(asked, Prompt) else tuple(asked)


def _reply(messages: Sequence[Message], reply: Generation) -> Reply:
    return Reply(messages[-1].content, reply.text, reply.ids, reply.finished)
