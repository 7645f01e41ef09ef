"""Scopes: which token positions an edit may touch.

Positions are counted in columns of a batch whose prompts end together, so one number serves all rows: the prompt is
the columns before `prompt_width`, the assistant's turn opens at `assistant_start` (the template's generation prompt,
whose last token predicts the first reply token). Offsets come from the template's own token ids, never from guesses.

A new scope is one function and one row of `SCOPES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

PromptMask = Bool[Tensor, "rows prompt"]


@dataclass(frozen=True, slots=True)
class Window:
    """The columns that one forward pass computes, numbered so that every prompt ends before `prompt_width`: one row of
    numbers, or one for each row. `real` is False on padding.

    `assistant_start` and `last_user` are None until a plan needs them.
    """

    columns: Int[Tensor, "#rows pos"]
    real: Bool[Tensor, "rows pos"]
    prompt_width: int
    assistant_start: int | None = None
    last_user: PromptMask | None = None


ScopeMask = Callable[[Window], Bool[Tensor, "rows pos"]]


def whole(window: Window) -> Bool[Tensor, "rows pos"]:
    return window.real


def prompt(window: Window) -> Bool[Tensor, "rows pos"]:
    return window.real & (window.columns < window.prompt_width)


def generated(window: Window) -> Bool[Tensor, "rows pos"]:
    return window.real & (window.columns >= window.prompt_width)


def assistant(window: Window) -> Bool[Tensor, "rows pos"]:
    assert window.assistant_start is not None, "the caller resolves assistant_start when a plan uses this scope"
    return window.real & (window.columns >= window.assistant_start)


def last_user(window: Window) -> Bool[Tensor, "rows pos"]:
    assert window.last_user is not None, "the caller resolves the last user turn when a plan uses this scope"
    columns = window.columns.clamp(max=window.prompt_width - 1).expand_as(window.real)
    return window.real & (window.columns < window.prompt_width) & window.last_user.gather(1, columns)


def last_run(content: PromptMask) -> PromptMask:
    """Only the last unbroken run of True in each row: the content tokens of the last turn."""
    backwards = content.flip(1)
    seen = backwards.cumsum(1) > 0
    ended = (seen & ~backwards).cumsum(1) > 0
    return (backwards & ~ended).flip(1)


SCOPES: dict[str, ScopeMask] = {
    "all": whole,
    "prompt": prompt,
    "generated": generated,
    "assistant": assistant,
    "last_user": last_user,
}


@cache
def covers_generated(scope: str) -> bool:
    """Whether a scope holds the tokens that a reply adds: asked of the scope itself, for one such column."""
    nothing = torch.zeros(1, 1, dtype=torch.bool)
    window = Window(torch.tensor([[1]]), ~nothing, prompt_width=1, assistant_start=0, last_user=nothing)
    return bool(SCOPES[scope](window).any())


@cache
def overlap(one: str, other: str) -> bool:
    """Whether some token can lie in both scopes: asked of the scopes themselves, for a prompt with a user turn and an
    assistant header, and a token that follows."""
    user = torch.tensor([[False, True, False]])
    window = Window(torch.arange(4)[None], torch.ones(1, 4, dtype=torch.bool), 3, assistant_start=2, last_user=user)
    return bool((SCOPES[one](window) & SCOPES[other](window)).any())


LOCAL = frozenset({"all", "prompt", "generated"})
"""Scopes that ask only who wrote a token, not what follows it: a prompt that goes on in another way changes nothing in
what they did to its beginning."""
