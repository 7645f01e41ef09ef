"""Best of N (2412.03556): the same request with small random changes, drawn again and again at a temperature of 1."""

from __future__ import annotations

from random import Random

from clampdown.attacks.attempt import Attempt, Scene, user
from clampdown.attacks.encodings import augmented
from clampdown.attacks.objective import Objective
from clampdown.attacks.paraphrase import reworded
from clampdown.attacks.wrappers import wrapped

TEMPERATURE = 1.0


def best_of_n(objective: Objective, rng: Random, scene: Scene) -> Attempt | None:
    text = (wrapped if rng.random() < 0.5 else reworded)(objective, rng, scene)
    asked = objective.asked(user(augmented(text, rng)))
    return Attempt(asked, temperature=TEMPERATURE, seed=rng.randrange(1 << 62))
