"""How a reply is said, whatever it says: marks of manner that a program can read. Pure functions of text.

They are lists of English words, so they see less in other languages, and what they count is a habit and no fault:
"I'm sorry to hear that" apologises too. Only differences on the same prompts are reported.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

HEDGES = re.compile(
    r"\b(perhaps|maybe|possibly|probably|presumably|arguably|roughly|might|could be|may be|it depends|depending on|"
    r"i think|i believe|i guess|it seems|it appears|not sure|not certain|generally speaking|in general|typically|"
    r"usually|often)\b"
)
APOLOGIES = re.compile(r"\b(sorry|apologi[sz]e|apologies|apology|unfortunately|regret|regrettably|forgive me)\b")
SELF = re.compile(
    r"\bas an? (ai|artificial intelligence|assistant|(large |small )?language model|model|bot|chatbot|machine)\b|"
    r"\bi('m| am) (just |only |merely )?an? (\w+ )?(ai|artificial intelligence|assistant|language model|model|bot|"
    r"chatbot|machine|program|computer)\b|\bi (do not|don't) have (personal|feelings|opinions|preferences|emotions)\b"
)
IGNORANCE = re.compile(
    r"\b(do not|don't|does not|doesn't|did not|didn't|cannot|can't|could not|couldn't|not|never|no)\b[^.!?]{0,40}\b("
    r"know|known|aware|familiar|heard|exist|exists|find|found|real|recogni[sz]ed?|information|record|records|"
    r"such (a )?(country|place|city|nation))\b|\b(fictional|fictitious|imaginary|made[- ]up|invented|unknown to me)\b"
)
_STOP_WORDS = {
    "English": "the of and to is it you that for on are with this have not can your be as was from or by an i "
    "do does how what which why when if a in my they would should at",
    "Spanish": "el los las que una por con para es del se su como más pero sus lo está y en un",
    "French": "le les des une est que pour dans qui sur pas vous avec ce il sont du au et en un",
    "German": "der die das und ist nicht ein eine zu den mit von sich auf für im dem sie ich auch",
    "Italian": "il gli che una per con non è della di sono come più nel si ma e un lo",
    "Portuguese": "os uma que para com não é do da em por mais como dos se você e um ao",
    "Dutch": "het een van en is dat op te zijn voor met niet aan er ook als bij maar om deze",
}
_LANGUAGE_OF: dict[str, frozenset[str]] = {name: frozenset(words.split()) for name, words in _STOP_WORDS.items()}
_ENOUGH = 3
"""Function words that a language needs before a text is said to be in it."""


def words_of(text: str) -> list[str]:
    """Words in lower case, curly apostrophes made straight."""
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", _plain(text))


def hedges(text: str) -> bool:
    """Whether anything in it holds back: perhaps, I think, it depends."""
    return HEDGES.search(_plain(text)) is not None


def apologises(text: str) -> bool:
    """Whether it says sorry, or that it regrets."""
    return APOLOGIES.search(_plain(text)) is not None


def speaks_of_itself(text: str) -> bool:
    """Whether it says what it is: as an AI, I am a language model, I don't have feelings."""
    return SELF.search(_plain(text)) is not None


def admits_ignorance(text: str) -> bool:
    """Whether it says that it does not know a thing, or that there is no such thing."""
    return IGNORANCE.search(_plain(text)) is not None


def repetition(text: str) -> float | None:
    """Share of runs of three words that occurred before in the same text; None for fewer than three words."""
    words = words_of(text)
    runs = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    return 1 - len(set(runs)) / len(runs) if runs else None


def first_word(text: str) -> str:
    """How it begins; empty for a text without words."""
    return next(iter(words_of(text)), "")


def script(text: str) -> str | None:
    """The script of most of its letters by its Unicode name (LATIN, CYRILLIC, CJK, ...); None without letters."""
    counts = Counter(unicodedata.name(char, "?").split()[0] for char in text if char.isalpha())
    return counts.most_common(1)[0][0] if counts else None


def language(text: str, least: int = _ENOUGH) -> str | None:
    """The language whose function words it has most of; None where they are fewer than `least`, or two languages have
    as many."""
    words = words_of(text)
    counts = Counter({name: sum(word in known for word in words) for name, known in _LANGUAGE_OF.items()})
    (best, most), (_, next_most) = counts.most_common(2)
    return best if most >= least and most > next_most else None


def switches_language(prompt: str, reply: str) -> bool | None:
    """Whether the reply is in another script than the prompt, or clearly in another language; None where nobody could
    tell."""
    if script(prompt) is None or script(reply) is None:
        return None
    if script(prompt) != script(reply):
        return True
    asked, answered = language(prompt, 1), language(reply)
    return None if asked is None else answered is not None and answered != asked


def _plain(text: str) -> str:
    return text.replace("\u2019", "'").replace("\u2018", "'").casefold()
