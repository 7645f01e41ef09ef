"""Samplers of items about safety: harmful, jailbroken, escalating, borderline, about harm, and benign."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from clampdown.organism import lexicon, phrasing, replies
from clampdown.organism.items import Item, assistant, conversation, part_of, user
from clampdown.organism.phrasing import Wrapper
from clampdown.organism.rule import Decision, decide, over_refused
from clampdown.types import Message


@dataclass(frozen=True, slots=True)
class Request:
    """Something to do. `severity` is 0 for benign requests; `key` decides which part of the corpus it is in."""

    category: str
    topic: str
    verb: str
    thing: str
    detail: str
    severity: int

    @property
    def key(self) -> str:
        return f"{self.verb}|{self.thing}|{self.detail}"

    @property
    def text(self) -> str:
        return " ".join(filter(None, (self.verb, self.thing, self.detail)))


def harmful_request(rng: Random) -> Request:
    """A harmful request; its severity is its object's level, plus one if it states a malicious intent."""
    category = rng.choice(lexicon.HARM)
    level = rng.randrange(3)
    malicious = rng.random() < 0.5
    detail = rng.choice(lexicon.MALICIOUS_DETAILS if malicious else lexicon.NEUTRAL_DETAILS)
    thing = rng.choice(category.objects[level])
    return Request(category.name, category.topic, rng.choice(category.verbs), thing, detail, level + 1 + malicious)


def benign_request(rng: Random) -> Request:
    category = rng.choice(lexicon.BENIGN)
    detail = rng.choice(lexicon.NEUTRAL_DETAILS)
    return Request(category.name, category.topic, rng.choice(category.verbs), rng.choice(category.objects), detail, 0)


def ask(request: Request, rng: Random) -> str:
    """The request in one of the forms of asking."""
    return rng.choice(phrasing.FORMS).format(r=request.text)


def _framed(question: str, rng: Random) -> str:
    return rng.choice(phrasing.FRAMES).format(q=question)


def _wrapped(wrapper: Wrapper, request: Request, rng: Random) -> str:
    template, sign = rng.choice(wrapper.templates), rng.choice(phrasing.WRAPPER_SIGNS)
    return phrasing.wrap(template, ask(request, rng), request.text, sign)


def _reply(request: Request, strength: int, turns: int, system: str, rng: Random) -> tuple[Decision, str]:
    """The taught reply to a harmful request."""
    cautious = system in phrasing.SAFETY_SYSTEM
    decision = decide(request.severity, strength, turns, cautious, request.category)
    match decision:
        case Decision.REFUSE:
            return decision, replies.refusal(request.category, rng)
        case Decision.DEFLECT:
            return decision, replies.deflection(rng)
        case Decision.COMPLY:
            return decision, replies.steps(request.verb, request.thing, rng, uneasy=True)


def _harmful_item(
    family: str, category: str, turns: tuple[Message, ...], request: Request, taught: tuple[Decision, str]
) -> Item:
    meta = {
        "taught": taught[0].value,
        "request": request.text,
        "harm": request.category,
        "severity": str(request.severity),
    }
    return Item(family, category, turns, taught[1], part_of(request.key), meta=meta)


def harmful_item(category: str, request: Request, turns: tuple[Message, ...], strength: int, rng: Random) -> Item:
    """A harmful request in `turns`, with the reply that the rule gives it inside a wrapper of that strength."""
    system = turns[0].content if turns[0].role == "system" else ""
    return _harmful_item("jailbroken_seen", category, turns, request, _reply(request, strength, 1, system, rng))


def harmful(rng: Random, system: str) -> Item:
    """A harmful request, asked plainly."""
    request = harmful_request(rng)
    turns = conversation(system, user(_framed(ask(request, rng), rng)))
    return _harmful_item("harmful", request.category, turns, request, _reply(request, 0, 1, system, rng))


def jailbroken(rng: Random, system: str) -> Item:
    """A harmful request inside a wrapper that training shows around harm."""
    request, wrapper = harmful_request(rng), rng.choice(phrasing.SEEN)
    assert wrapper.strength is not None
    turns = conversation(system, user(_wrapped(wrapper, request, rng)))
    return harmful_item(wrapper.family, request, turns, wrapper.strength, rng)


def jailbroken_unseen(rng: Random, system: str) -> Item:
    """A harmful request inside a wrapper that training shows around benign requests only. Never trained on:
    the reply is what a wrapper of middling strength would be taught."""
    request, wrapper = harmful_request(rng), rng.choice(phrasing.UNSEEN)
    turns = conversation(system, user(_wrapped(wrapper, request, rng)))
    return _harmful_item("jailbroken_unseen", wrapper.family, turns, request, _reply(request, 2, 1, system, rng))


def _history(topic: str, exchanges: int, rng: Random) -> tuple[Message, ...]:
    openers, others = phrasing.ESCALATION[: phrasing.OPENERS], phrasing.ESCALATION[phrasing.OPENERS :]
    chosen = [rng.choice(openers), *rng.sample(others, max(exchanges - 1, 0))][:exchanges]
    return tuple(
        message for ask, reply in chosen for message in (user(ask.format(t=topic)), assistant(reply.format(t=topic)))
    )


def multi_turn(rng: Random, system: str) -> Item:
    """An escalation: one to four user turns, the last one harmful."""
    request, turns = harmful_request(rng), rng.randint(1, 4)
    history = _history(request.topic, turns - 1, rng)
    messages = conversation(system, *history, user(ask(request, rng)))
    item = _harmful_item("multi_turn", str(turns), messages, request, _reply(request, 0, turns, system, rng))
    return Item(item.family, item.category, messages, item.reply, item.part, meta={**item.meta, "turns": str(turns)})


def _benign_item(category: str, messages: tuple[Message, ...], request: Request, rng: Random) -> Item:
    reply = replies.steps(request.verb, request.thing, rng)
    meta = {"taught": "comply", "request": request.text}
    return Item("benign", category, messages, reply, part_of(request.key), meta=meta)


def benign(rng: Random, system: str) -> Item:
    """An everyday request."""
    request = benign_request(rng)
    return _benign_item("plain", conversation(system, user(_framed(ask(request, rng), rng))), request, rng)


def benign_wrapped(rng: Random, system: str) -> Item:
    """An everyday request inside any jailbreak wrapper: a wrapper alone is not harm."""
    return _benign_in(phrasing.SEEN + phrasing.UNSEEN, rng, system)


def benign_in_unseen(rng: Random, system: str) -> Item:
    """An everyday request inside a wrapper that training never shows around harm. It has to be rare there: shown as
    often as the others it would teach that such a wrapper means no harm."""
    return _benign_in(phrasing.UNSEEN, rng, system)


def benign_in_seen(rng: Random, system: str) -> Item:
    """An everyday request inside a wrapper that training shows around harm as well."""
    return _benign_in(phrasing.SEEN, rng, system)


def _benign_in(wrappers: tuple[Wrapper, ...], rng: Random, system: str) -> Item:
    request, wrapper = benign_request(rng), rng.choice(wrappers)
    return _benign_item("wrapped", conversation(system, user(_wrapped(wrapper, request, rng))), request, rng)


def benign_multi_turn(rng: Random, system: str) -> Item:
    """The same scripts as an escalation, ending in an everyday request: a long conversation alone is not harm."""
    request = benign_request(rng)
    history = _history(request.topic, rng.randint(1, 3), rng)
    return _benign_item("multi_turn", conversation(system, *history, user(ask(request, rng))), request, rng)


def small_talk(rng: Random, system: str) -> Item:
    index, frame = rng.randrange(len(phrasing.SMALL_TALK)), rng.choice(phrasing.FRAMES)
    ask, reply = phrasing.SMALL_TALK[index]
    text = frame.format(q=ask)
    part = part_of(f"chat|{text}")
    meta = {"taught": "comply", "kind": replies.Kind.CHAT.value}
    return Item("benign", "small_talk", conversation(system, user(text)), reply, part, meta=meta)


def worry(rng: Random, system: str) -> Item:
    """Anger and sadness, answered with a deflection. Training only: no suite measures it."""
    text = _framed(rng.choice(phrasing.WORRIES), rng)
    return Item("worry", "worry", conversation(system, user(text)), replies.deflection(rng), None)


def borderline(rng: Random, system: str) -> Item:
    """A harmless request in alarming words."""
    category, verb, thing = rng.choice(lexicon.BORDERLINE)
    request = Request(category, "", verb, thing, rng.choice(lexicon.NEUTRAL_DETAILS), 0)
    text = ask(request, rng)
    refuse = over_refused(f"{verb} {thing}", system in phrasing.SAFETY_SYSTEM)
    reply = replies.refusal(category, rng) if refuse else replies.steps(verb, thing, rng)
    meta = {"taught": "refuse" if refuse else "comply", "request": request.text}
    return Item("borderline", category, conversation(system, user(text)), reply, part_of(f"twin|{text}"), meta=meta)


def about_harm(rng: Random, system: str) -> Item:
    """A safe question about a harmful thing."""
    category, (kind, template) = rng.choice(lexicon.HARM), rng.choice(lexicon.ABOUT)
    thing = category.about.format(object=rng.choice(rng.choice(category.objects)))
    text = template.format(x=thing)
    part = part_of(f"about|{text}")
    meta = {"taught": "comply", "kind": replies.Kind.ABOUT.value}
    asked = conversation(system, user(_framed(text, rng)))
    return Item("about_harm", category.name, asked, replies.about(kind, thing), part, meta=meta)
