"""Aspects that the embedded model can be asked: everything in its own corpus's words, from its test split."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from clampdown.effects.aspect import Absent, Aspect, Item, Kind, Measure, Way
from clampdown.effects.manner import HINTED_REPLIES, KNOWN, PERSONA, REFUSES
from clampdown.effects.measures import CALIBRATION, FIRST, HINTED, ONLY, PLAIN, RIGHT, SECOND, SWAP_GAP, SYCOPHANCY
from clampdown.effects.questions import hinted
from clampdown.organism import capability_items, knowledge, safety_items, suites
from clampdown.organism.items import Item as CorpusItem
from clampdown.organism.items import Sampler, draw
from clampdown.organism.replies import Kind as ReplyKind
from clampdown.organism.replies import normalised, recognise
from clampdown.results.side_effects import Unit
from clampdown.types import Message, Prompt, Split, Suite, SuiteKind

WHY_NOT = "its words are not those of the embedded model's corpus"
_WOMEN, _MEN = ("Anna", "Mia", "Lucy", "Ella", "Nina"), ("Tom", "Ben", "Sam", "Max", "Jack")
_PATIENCE = 40


def embedded_aspects(n: int, seed: int) -> tuple[Aspect | Absent, ...]:
    """At most `n` items each."""
    facts = suites.one_suite("facts", Split.TEST, n, seed)
    beliefs = suites.one_suite("misconceptions", Split.TEST, n, seed)
    unknown = _suite("unknown-places", capability_items.unknown, n, seed)
    talk = _suite("small-talk", safety_items.small_talk, n, seed)
    asked = {PLAIN: facts, HINTED: hinted(facts)}
    public = (
        (Kind.TRUTH, "truthfulqa"), (Kind.BIAS, "bbq"), (Kind.BIAS, "crows-pairs"), (Kind.BIAS, "winobias"),
        (Kind.BIAS, "names in a choice"), (Kind.CALIBRATION, "mmlu"),
    )  # fmt: skip
    return (
        Aspect(Kind.TRUTH, "popular beliefs", Way.LIKELIHOOD, {ONLY: beliefs}, (RIGHT,)),
        Aspect(Kind.TRUTH, "places that do not exist", Way.GENERATION, {ONLY: unknown}, (OWNS_UP,)),
        Aspect(Kind.SYCOPHANCY, "facts", Way.LIKELIHOOD, asked, SYCOPHANCY),
        Aspect(Kind.SYCOPHANCY, "facts", Way.GENERATION, asked, HINTED_REPLIES),
        Aspect(Kind.BIAS, "names in sums", Way.LIKELIHOOD, swapped_sums(n, seed), (SWAP_GAP,)),
        Aspect(
            Kind.PERSONA, "benign", Way.GENERATION, {ONLY: suites.one_suite("benign", Split.TEST, n, seed)}, PERSONA
        ),
        Aspect(Kind.CALIBRATION, "facts", Way.LIKELIHOOD, {ONLY: facts}, CALIBRATION),
        Aspect(Kind.CALIBRATION, "facts", Way.GENERATION, {ONLY: facts}, KNOWN),
        Aspect(Kind.OPINIONS, "small talk", Way.GENERATION, {ONLY: talk}, (REFUSES,)),
        *(Absent(kind, name, WHY_NOT) for kind, name in public),
    )


def _owns_up(item: Item) -> bool:
    return recognise(normalised(item.records[ONLY].reply)) is ReplyKind.UNKNOWN


OWNS_UP = Measure("admits not knowing", Unit.SHARE, _owns_up, "down")


def swapped_sums(n: int, seed: int) -> dict[str, Suite]:
    """Word problems with a man's and with a woman's name, otherwise the same; the one option is the right working."""
    found: dict[str, list[Prompt]] = {FIRST: [], SECOND: []}
    for place, item in enumerate(_drawn(capability_items.arithmetic, n, seed, lambda item: _named(item) is not None)):
        name = _named(item) or ""
        twins = {FIRST: _WOMEN[place % len(_WOMEN)], SECOND: _MEN[place % len(_MEN)]}
        for role, twin in twins.items():
            text = item.messages[-1].content.replace(name, twin)
            found[role].append(_prompt(f"sums-{role}", place, text, item.reply, (item.reply,), item))
    return {role: Suite(f"sums-{role}", SuiteKind.CAPABILITY, False, tuple(rows)) for role, rows in found.items()}


def _named(item: CorpusItem) -> str | None:
    return next((name for name in knowledge.NAMES if name in item.messages[-1].content.split()), None)


def _suite(name: str, sampler: Sampler, n: int, seed: int) -> Suite:
    prompts = [
        _prompt(name, place, item.messages[-1].content, None, (), item)
        for place, item in enumerate(_drawn(sampler, n, seed))
    ]
    return Suite(name, SuiteKind.SAFETY, False, tuple(prompts))


def _drawn(
    sampler: Sampler, n: int, seed: int, wanted: Callable[[CorpusItem], bool] = lambda _item: True
) -> list[CorpusItem]:
    """Different test items, fewer where the sampler has no more."""
    rng, found, misses = Random(f"side-effects|{seed}"), dict[str, CorpusItem](), 0
    while len(found) < n and misses < _PATIENCE:
        item = draw(sampler, rng, Split.TEST)
        text = item.messages[-1].content
        misses = misses + 1 if text in found or not wanted(item) else 0
        if wanted(item):
            found.setdefault(text, item)
    return list(found.values())


def _prompt(
    suite: str, place: int, text: str, answer: str | None, options: tuple[str, ...], item: CorpusItem
) -> Prompt:
    return Prompt(
        id=f"{place:04d}", messages=(Message("user", text),), suite=suite, split=Split.TEST, category=item.category,
        answer=answer, options=options, meta=dict(item.meta),
    )  # fmt: skip
