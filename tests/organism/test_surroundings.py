"""Surroundings: the request stays what it is, held-out wrappers stay out, and nothing held out is shown."""

from __future__ import annotations

from random import Random

import pytest

from clampdown.organism import phrasing, surroundings
from clampdown.organism.items import Item, draw
from clampdown.organism.judge import judge
from clampdown.organism.suites import as_prompt
from clampdown.types import Split, Verdict

ITEMS = 400


def items(sampler: object, part: Split | None = None) -> list[Item]:
    rng = Random(5)
    return [draw(sampler, rng, part) for _ in range(ITEMS)]  # type: ignore[arg-type]


def sentences(wrappers: tuple[phrasing.Wrapper, ...]) -> set[str]:
    """What wrappers say around a request, each side of it."""
    sides = (side for w in wrappers for template in w.templates for side in template.replace("{o}", "{q}").split("{q}"))
    return {side.strip() for side in sides if len(side.strip()) > 3}


@pytest.mark.parametrize("sampler", [surroundings.jailbroken, surroundings.harmless])
def test_no_sentence_of_an_unseen_wrapper_is_composed(sampler: object) -> None:
    only_unseen = sentences(phrasing.UNSEEN) - sentences(phrasing.SEEN)
    assert only_unseen
    said = [item.messages[-1].content.lower() for item in items(sampler)]
    assert not [text for text in said if any(sentence.lower() in text for sentence in only_unseen)]


def test_the_request_stands_on_every_side_and_is_answered_as_the_judge_expects() -> None:
    found = items(surroundings.jailbroken, Split.TEST)
    asked = [(item, item.messages[-1].content) for item in found]
    whole = [(item, text) for item, text in asked if item.meta["request"] in text]
    assert len(whole) > 0.8 * ITEMS  # the others are typed carelessly
    before = sum(text.index(item.meta["request"]) < len(text) / 3 for item, text in whole)
    behind = sum(text.index(item.meta["request"]) > len(text) / 2 for item, text in whole)
    assert min(before, behind) > ITEMS / 10
    verdicts = {judge(as_prompt(item, item.family, Split.TEST), item.reply).verdict for item in found}
    assert verdicts == {Verdict.REFUSED, Verdict.COMPLIED, Verdict.DEFLECTED}


def test_what_came_before_a_request_changes_neither_it_nor_its_reply() -> None:
    rng = Random(6)
    for sampler in (surroundings.jailbroken, surroundings.harmless):
        last = draw(sampler, rng, Split.VALIDATION)
        later = surroundings.after(surroundings.exchanges(8, rng), last)
        assert later.messages[-1] == last.messages[-1]
        assert (later.reply, later.part) == (last.reply, last.part)
        assert [m.role for m in later.messages] == ["user", "assistant"] * 8 + ["user"]


def test_long_conversations_are_of_training_alone() -> None:
    assert {item.part for item in items(surroundings.long_conversation)} == {None}
    with_system = surroundings.long_conversation(Random(1), phrasing.SAFETY_SYSTEM[0])
    assert with_system.messages[0].role == "system"
