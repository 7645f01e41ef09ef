"""The request in another writing. What is decoded by the model alone is refused by neither words nor, perhaps, a gate.

`ENCODINGS` is the table: a name that a reader would know it by, and the writing. All of them are public and reversible.
"""

from __future__ import annotations

from random import Random

from clampdown.attacks.attempt import Attempt, Scene, single
from clampdown.attacks.objective import Objective
from clampdown.study.wrapping import UNREADABLE, Writing, capitals, noisy, pulled_apart, random_case, scrambled

_LEET = str.maketrans("aeiostAEIOST", "431057431057")
_VOWELS = "aeiouAEIOU"


def _pig_latin(text: str, _rng: Random) -> str:
    def word(found: str) -> str:
        cut = next((i for i, letter in enumerate(found) if letter in _VOWELS), 0)
        return f"{found[cut:]}{found[:cut]}ay"

    return " ".join(map(word, text.split()))


ENCODINGS: dict[str, Writing] = {
    "base64": UNREADABLE["base64"],
    "rot13": UNREADABLE["rot13"],
    "leetspeak": lambda text, _: text.translate(_LEET),
    "spaced letters": lambda text, _: " ".join(text),
    "words pulled apart": pulled_apart,
    "capitals": capitals,
    "random capitals": random_case,
    "words backwards": lambda text, _: " ".join(reversed(text.split())),
    "letters backwards": UNREADABLE["letters backwards"],
    "pig latin": _pig_latin,
    "scrambled words": scrambled,
    "typing errors": noisy,
    "hexadecimal": lambda text, _: text.encode().hex(),
}


def encoding(objective: Objective, rng: Random, scene: Scene) -> Attempt | None:
    """One writing of the bare request or the question, mostly with a sentence that says how to read it."""
    name = rng.choice(list(ENCODINGS))
    written = ENCODINGS[name](
        objective.request if objective.request and rng.random() < 0.5 else objective.question, rng
    )
    asking = rng.choice((*scene.words.decoding, "{x}"))
    return single(objective, asking.replace("{how}", name).replace("{x}", written))


def augmented(text: str, rng: Random) -> str:
    """The small changes of best-of-N jailbreaking (2412.03556): letters' case, order within words, typing errors."""
    for change in (scrambled, random_case, noisy):
        if rng.random() < 0.3:
            text = change(text, rng)
    return text
