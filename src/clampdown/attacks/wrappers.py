"""Wrappers that nobody wrote: one to four parts in random order, with the reworded request among them at random."""

from __future__ import annotations

from random import Random

from clampdown.attacks.attempt import Attempt, Scene, single
from clampdown.attacks.objective import Objective
from clampdown.attacks.paraphrase import reworded

MOST_PARTS = 4


def wrapped(objective: Objective, rng: Random, scene: Scene) -> str:
    parts = rng.sample(scene.words.parts, rng.randint(1, MOST_PARTS))
    parts.insert(rng.randint(0, len(parts)), reworded(objective, rng, scene))
    return " ".join(parts)


def wrapper(objective: Objective, rng: Random, scene: Scene) -> Attempt | None:
    return single(objective, wrapped(objective, rng, scene))


def template(objective: Objective, rng: Random, scene: Scene) -> Attempt | None:
    """A whole wrapper of a file, else of the words' own; None where there are none."""
    known = scene.templates or scene.words.templates
    if not known:
        return None
    found = rng.choice(known).replace("{o}", rng.choice((" - ", " / ")).join((objective.request or "").split()))
    return single(objective, found.replace("{q}", objective.question))
