"""Which split a prompt without one belongs to: drawn from a hash of its text, so that every command deals alike.

The same prompt gets the same split in every file, run and seed. A prompt that is after something (`meta["objective"]`)
is dealt by that, so that a request and its twins stay together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from clampdown.types import OBJECTIVE, Prompt, Split

SHARES: Mapping[Split, float] = {
    Split.DISCOVERY: 0.35,
    Split.VALIDATION: 0.3,
    Split.CALIBRATION: 0.15,
    Split.TEST: 0.2,
}
"""Trials and the bounds of budgets both come out of validation, which is why it is large."""


def place_of(text: str) -> int:
    """A number below 2**64 that depends on the text alone: an order, or a choice, that no seed and no company moves."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_of(text: str) -> Split:
    """The split of a text; case and white space do not count."""
    place = place_of(" ".join(text.casefold().split())) / 2**64
    for split, share in SHARES.items():
        place -= share
        if place < 0:
            return split
    return Split.TEST


def dealt(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """The prompts, each with its split; those that share an objective share a split."""
    return tuple(replace(prompt, split=split_of(prompt.meta.get(OBJECTIVE) or prompt.text)) for prompt in prompts)


def has_splits(prompts: Sequence[Prompt]) -> bool:
    """Whether the rows themselves say which split they are of (a row that does not say is read as `test`)."""
    return any(prompt.split is not Split.TEST for prompt in prompts)
