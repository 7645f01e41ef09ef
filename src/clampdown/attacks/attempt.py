"""One query of an attack: a conversation to answer, perhaps a reply that is already begun, perhaps a draw of chance.

A black-box attack is a function `(Objective, Random, Scene) -> Attempt | None`; None: no form for this objective.
The generator is seeded by run, objective and number of the query alone, so every arm is asked the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from clampdown.attacks.objective import Objective
from clampdown.attacks.words import Words
from clampdown.types import Message

Rewriter = Callable[[str, int], str]
"""An attacker's model: a question and a seed to the question in other words."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """`begun` is the beginning of the reply, put into the model's mouth. With a `temperature` the reply is drawn, by
    `seed`; without, it is the likeliest."""

    messages: tuple[Message, ...]
    begun: str = ""
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Scene:
    """What attacks have to work with: words, templates of a file with {q} for the question, a model that rewords."""

    words: Words
    templates: tuple[str, ...] = ()
    rewrite: Rewriter | None = None


BlackBox = Callable[[Objective, Random, Scene], Attempt | None]


def user(text: str) -> Message:
    return Message("user", text)


def single(objective: Objective, text: str) -> Attempt:
    """One user turn."""
    return Attempt(objective.asked(user(text)))
