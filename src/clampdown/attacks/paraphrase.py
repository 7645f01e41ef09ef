"""The request in other words: another form of asking, another frame; by a model, if the attacker has one."""

from __future__ import annotations

from random import Random

from clampdown.attacks.attempt import Attempt, Scene, single
from clampdown.attacks.objective import Objective


def reworded(objective: Objective, rng: Random, scene: Scene) -> str:
    """By rule: a form for the bare request where it is known, and a frame around it."""
    question = objective.question
    if objective.request is not None:
        question = rng.choice(scene.words.forms).replace("{r}", objective.request)
    return rng.choice(scene.words.frames).replace("{q}", question)


def paraphrase(objective: Objective, rng: Random, scene: Scene) -> Attempt | None:
    return single(objective, reworded(objective, rng, scene))


def by_model(objective: Objective, rng: Random, scene: Scene) -> Attempt | None:
    """By the attacker's model; None without one, or when it says nothing."""
    if scene.rewrite is None:
        return None
    text = scene.rewrite(objective.question, rng.randrange(1 << 30)).strip()
    return single(objective, text) if text else None
