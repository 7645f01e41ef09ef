"""Where the request stands: among harmless sentences, after many harmless turns, behind turns that nobody said, or
before a reply that is already begun. A gate that reads the last turn, or a whole prompt, is wrong about one of them.
"""

from __future__ import annotations

from random import Random

from clampdown.attacks.attempt import Attempt, Scene, single, user
from clampdown.attacks.objective import Objective
from clampdown.attacks.paraphrase import reworded
from clampdown.attacks.wrappers import wrapped
from clampdown.types import Message

TURNS = (1, 2, 3, 4, 6, 8, 12)


def said(scene: Scene, rng: Random, exchanges: int) -> list[Message]:
    """Harmless exchanges, repeated when there are not enough."""
    talk = list(scene.words.talk)
    rng.shuffle(talk)
    chosen = [talk[i % len(talk)] for i in range(exchanges)]
    return [message for ask, reply in chosen for message in (user(ask), Message("assistant", reply))]


def _either(objective: Objective, rng: Random, scene: Scene) -> str:
    return (wrapped if rng.random() < 0.5 else reworded)(objective, rng, scene)


def position(objective: Objective, rng: Random, scene: Scene) -> Attempt | None:
    """One turn, in which the request begins, ends or interrupts harmless sentences."""
    around = [rng.choice(scene.words.filler) for _ in range(rng.randint(1, 6))]
    around.insert(rng.randint(0, len(around)), _either(objective, rng, scene))
    return single(objective, rng.choice((" ", "\n")).join(around))


def many_turns(objective: Objective, rng: Random, scene: Scene) -> Attempt | None:
    """Harmless turns first, the request last."""
    history = said(scene, rng, rng.choice(TURNS))
    return Attempt(objective.asked(*history, user(_either(objective, rng, scene))))


def forged(objective: Objective, rng: Random, scene: Scene) -> Attempt | None:
    """A history in which the model has already agreed: the last turn only asks it to go on. Sometimes harmless talk
    lies between."""
    agreed = scene.words.agreement(rng.choice(scene.words.agreed), objective.request)
    history = [user(_either(objective, rng, scene)), Message("assistant", agreed)]
    history += said(scene, rng, rng.choice((0, 0, 1)))
    last = rng.choice(scene.words.go_on) if rng.random() < 0.7 else _either(objective, rng, scene)
    return Attempt(objective.asked(*history, user(last)))


def prefill(objective: Objective, rng: Random, scene: Scene) -> Attempt | None:
    """The reply is begun for the model, which needs an API that takes a given beginning, or the model itself."""
    begun = scene.words.agreement(rng.choice(scene.words.agreed), objective.request)
    return Attempt(objective.asked(user(_either(objective, rng, scene))), begun=begun)
