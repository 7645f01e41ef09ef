"""The attacks by name. A new one is a function and a row."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from clampdown.attacks import best_of_n, encodings, paraphrase, places, wrappers
from clampdown.attacks.attempt import Attempt, BlackBox, Scene
from clampdown.attacks.objective import Objective
from clampdown.errors import PromptSetError

BLACK_BOX: dict[str, BlackBox] = {
    "paraphrase": paraphrase.paraphrase,
    "wrapper": wrappers.wrapper,
    "template": wrappers.template,
    "encoding": encodings.encoding,
    "position": places.position,
    "many_turns": places.many_turns,
    "forged": places.forged,
    "best_of_n": best_of_n.best_of_n,
    "model": paraphrase.by_model,
}
"""What an attacker can do who may only talk to the model."""

BEGUN: dict[str, BlackBox] = {"prefill": places.prefill}
"""What one can do who may also begin the reply, as some APIs and everybody with the weights can."""

WHITE_BOX = ("suffix", "soft_prompt", "error_direction")
"""What one can do who holds its weights, or its activations."""

ALL = (*BLACK_BOX, *BEGUN, *WHITE_BOX)


def check_names(names: Sequence[str]) -> None:
    """Raises `PromptSetError` for an attack that is not there."""
    unknown = [name for name in names if name not in ALL]
    if unknown or not names:
        raise PromptSetError(f"no attack '{', '.join(unknown)}'", hint=f"some of: {', '.join(ALL)}")


def attempt_of(objective: Objective, query: int, names: Sequence[str], scene: Scene, seed: int) -> tuple[str, Attempt]:
    """Query `query` of an objective: the attacks take turns, and one that has no form for it leaves its turn to the
    next. A function of its arguments alone."""
    rng = Random(f"attack|{seed}|{objective.key}|{query}")
    for offset in range(len(names)):
        name = names[(query + offset) % len(names)]
        found = {**BLACK_BOX, **BEGUN}[name](objective, rng, scene)
        if found is not None:
            return name, found
    raise PromptSetError(f"none of {', '.join(names)} has a form for '{objective.key}'")
