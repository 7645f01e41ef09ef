"""One item of the corpus: a conversation, the reply that is right, and the part of the corpus it belongs to.

Held out are combinations of words, never words: an item's `key` names the combination (verb, object and detail of a
request; entity, template and frame of a fact; the operands of a sum), and the key's hash decides its part. So no
held-out prompt occurs in training by construction, whatever the sampler draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from clampdown.types import Message, Split

_SHARES: tuple[tuple[Split, float], ...] = (
    (Split.DISCOVERY, 0.20),
    (Split.VALIDATION, 0.25),
    (Split.CALIBRATION, 0.30),
    (Split.TEST, 0.25),
)
HELD_OUT = 0.40


@dataclass(frozen=True, slots=True)
class Item:
    """`part` is None for training. `reply` is the taught reply; `meta` is ground truth for the judge."""

    family: str
    category: str
    messages: tuple[Message, ...]
    reply: str
    part: Split | None
    answer: str | None = None
    options: tuple[str, ...] = ()
    meta: Mapping[str, str] = field(default_factory=dict)


Sampler = Callable[[Random, str], Item]
"""Draws an item of any part; the second argument is the system prompt, "" for none."""


def fraction(key: str) -> float:
    """A fixed pseudo-random number in [0, 1) for a key, the same on every machine and in every process."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def part_of(key: str, held_out: float = HELD_OUT) -> Split | None:
    """The part of the corpus a key belongs to; None is training."""
    position = fraction(key) - (1 - held_out)
    if position < 0:
        return None
    for split, share in _SHARES:
        position -= share * held_out
        if position < 0:
            return split
    return Split.TEST


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def conversation(system: str, *turns: Message) -> tuple[Message, ...]:
    """The turns, after a system turn if there is one."""
    return (Message("system", system), *turns) if system else turns


def draw(sampler: Sampler, rng: Random, part: Split | None, system: str = "") -> Item:
    """Sample until the item belongs to `part`."""
    while True:
        item = sampler(rng, system)
        if item.part == part:
            return item
