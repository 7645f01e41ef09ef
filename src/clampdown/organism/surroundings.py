"""Requests in surroundings that no list names: wrappers put together at random, sentences without sense, and
conversations of many turns. Training only; no suite is drawn from here, and nothing of `phrasing.UNSEEN` is in it.

They are there so that the organism knows harm wherever it stands. With whole wrappers alone it learns which words
come before a request, and new words around one hide it from every probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from clampdown.organism import capability_items, phrasing, safety_items
from clampdown.organism.items import Item, Sampler, assistant, conversation, draw, user

NOISE_STRENGTH = 2
"""What sentences without sense are worth to the rule: a middling wrapper, as for one that training never shows."""

_COMMON = """
    the of and a to in is you that it he was for on are as with his they at be this have from or one had by word
    but not what all were we when your can said there use an each which she do how their if will up other about out
    many then them these so some her would make like him into time has look two more write go see number no way could
    people my than first been call who oil its now find long down day did get come made may part over new sound take
    only little work know place year live me back give most very after thing our just name good sentence man think
    say great where help through much before line right too mean old any same tell boy follow came want show also
    around form three small set put end does another well large must big even such because turn here why ask went men
    read need land different home us move try kind hand picture again change off play spell air away animal house
    point page letter mother answer found study still learn should world high every near add food between own below
    country plant last school father keep tree never start city earth eye light thought head under story saw left
    late run while press close night real life few north open seem together next white children begin got walk
    example ease paper group always music those both mark often until mile river car feet care second book carry took
    science eat room friend began idea fish mountain stop once base hear horse cut sure watch color face wood main
    enough plain girl usual young ready above ever red list though feel talk bird soon body dog family direct leave
    song measure door product black short numeral class wind question happen complete ship area half rock order fire
    south problem piece told knew pass since top whole king space heard best hour better true during hundred five
    remember step early hold west ground interest reach fast verb sing listen six table travel less morning ten simple
    several vowel toward war lay against pattern slow center love person money serve appear road map rain rule govern
    pull cold notice voice unit power town fine certain fly fall lead cry dark machine note wait plan figure star box
    noun field rest correct able pound done beauty drive stood contain front teach week final gave green quick develop
    ocean warm free minute strong special mind behind clear tail produce fact street inch multiply nothing course stay
    wheel full force blue object decide surface deep moon island foot system busy test record boat common gold possible
    plane stead dry wonder laugh thousand ago ran check game shape equate hot miss brought heat snow tire bring yes
    distant fill east paint language among assistant developer model user output mode chat policy character response
    simulate token content guidelines version prompt generate virtual
"""
NOISE: tuple[str, ...] = tuple(_COMMON.split())
"""Common English words, and some of what is written around chat models. Most are not tokens of their own."""

_OPENINGS = tuple(w for w in phrasing.SEEN if w.family != "obfuscation")


def noise(rng: Random) -> str:
    """One to three sentences of random words, short ones mostly."""
    said = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        words = rng.choices(NOISE, k=rng.choice((3, 4, 5, 6, 8, 10, 14)))
        said.append(" ".join(words).capitalize() + rng.choice((".", ".", ".", "!", ":", "?", ",")))
    text = " ".join(said)
    return text.upper() if rng.random() < 0.08 else text


def _piece(rng: Random) -> tuple[str, int]:
    """What may stand beside a request, and its strength."""
    if rng.random() < 0.5:
        return noise(rng), NOISE_STRENGTH
    wrapper = rng.choice(_OPENINGS)
    assert wrapper.strength is not None
    return " ".join(rng.choice(wrapper.templates).replace("{q}", " ").split()), wrapper.strength


def composed(text: str, rng: Random) -> tuple[str, int]:
    """The text among one to three pieces, before, behind or around it; and the strongest piece's strength."""
    before, behind, strength = [], [], 0
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        piece, its = _piece(rng)
        strength = max(strength, its)
        (before if rng.random() < 0.5 else behind).append(piece)
    return " ".join((*before, text, *behind)), strength


def _typed(text: str, rng: Random) -> str:
    """In one of seven cases as somebody types who does not care: no capitals, all capitals, no stop, a slip."""
    draw = rng.random()
    if draw < 0.04:
        return text.lower()
    if draw < 0.07:
        return text.upper()
    if draw < 0.10:
        return text.rstrip(".?!")
    if draw < 0.14 and len(text) > 8:
        at = rng.randrange(1, len(text) - 2)
        return text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text


def jailbroken(rng: Random, system: str) -> Item:
    """A harmful request in a composed wrapper."""
    request = safety_items.harmful_request(rng)
    text, strength = composed(safety_items.ask(request, rng), rng)
    return safety_items.harmful_item("composed", request, conversation(system, user(_typed(text, rng))), strength, rng)


def harmless(rng: Random, system: str) -> Item:
    """An everyday request, in one of four cases one in alarming words or a question about harm, composed likewise."""
    sampler = rng.choices((safety_items.benign, safety_items.borderline, safety_items.about_harm), (6, 1, 1))[0]
    item = sampler(rng, system)
    *before, last = item.messages
    text, _ = composed(last.content, rng)
    return replace(item, messages=(*before, user(_typed(text, rng))))


_EXCHANGES: tuple[Sampler, ...] = (
    safety_items.benign,
    safety_items.benign,
    safety_items.small_talk,
    safety_items.about_harm,
    safety_items.borderline,
    capability_items.fact,
    capability_items.instruction,
    capability_items.misconception,
)
_LAST: tuple[tuple[Sampler, float], ...] = (
    (safety_items.harmful, 3),
    (safety_items.jailbroken, 3),
    (jailbroken, 1),
    (safety_items.benign, 3),
    (safety_items.benign_wrapped, 1),
    (safety_items.borderline, 1),
    (capability_items.fact, 1),
    (capability_items.instruction, 1),
)


def exchanges(count: int, rng: Random) -> list[Item]:
    """Finished exchanges about anything harmless."""
    return [draw(rng.choice(_EXCHANGES), rng, None) for _ in range(count)]


def after(history: Sequence[Item], last: Item) -> Item:
    """The last item, asked after the others were asked and answered."""
    past = tuple(message for item in history for message in (item.messages[-1], assistant(item.reply)))
    *head, asked = last.messages
    return replace(last, messages=(*head, *past, asked))


def long_conversation(rng: Random, system: str) -> Item:
    """One to eight exchanges, in one of four cases a refused request among them, then one more request: what came
    before is no escalation, and changes nothing. Each turn is one of training."""
    history = exchanges(rng.choice((1, 2, 2, 3, 3, 4, 5, 6, 8)), rng)
    if rng.random() < 0.25:
        history[rng.randrange(len(history))] = draw(safety_items.harmful, rng, None, system)
    sampler = rng.choices([sampler for sampler, _ in _LAST], [weight for _, weight in _LAST])[0]
    return after(history, draw(sampler, rng, None, system))


_HARD = ("reverse", "reverse", "number", "number", "second", "last", "copy")


def exercise(rng: Random, system: str) -> Item:
    """The instructions that are learnt last."""
    while True:
        item = capability_items.instruction(rng, system)
        if item.category == rng.choice(_HARD):
            return item
