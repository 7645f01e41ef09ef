"""The grammar: deterministic, its parts disjoint, its rule graded."""

from __future__ import annotations

from random import Random

import pytest

from clampdown.organism import capability_items, corpus, safety_items
from clampdown.organism.items import draw, part_of
from clampdown.organism.phrasing import SAFETY_SYSTEM, SEEN, UNSEEN
from clampdown.organism.rule import Decision, decide
from clampdown.types import Split

ITEMS = 3000


@pytest.fixture(scope="module")
def training_texts() -> set[str]:
    rng = Random(7)
    return {corpus.training_item(rng).messages[-1].content for _ in range(ITEMS)}


def test_the_same_seed_gives_the_same_items() -> None:
    first, second = Random("a"), Random("a")
    assert [corpus.training_item(first) for _ in range(50)] == [corpus.training_item(second) for _ in range(50)]


def test_every_part_of_the_corpus_gets_its_share() -> None:
    parts = [part_of(f"key {number}") for number in range(4000)]
    assert 0.57 < parts.count(None) / len(parts) < 0.63
    assert all(parts.count(split) / len(parts) > 0.06 for split in Split)


def test_training_never_wraps_harm_in_an_unseen_family() -> None:
    rng = Random(3)
    harmful = [item for item in (corpus.training_item(rng) for _ in range(ITEMS)) if item.family == "jailbroken_seen"]
    assert {item.category for item in harmful} == {wrapper.family for wrapper in SEEN} | {"composed"}
    assert not {item.category for item in harmful} & {wrapper.family for wrapper in UNSEEN}


def test_no_training_sum_was_held_out() -> None:
    rng = Random(5)
    for _ in range(300):
        step = draw(capability_items.arithmetic, rng, Split.TEST)
        first = step.reply.split(".")[0]
        assert first not in {draw(capability_items.drill, rng, None).reply for _ in range(5)}


@pytest.mark.parametrize("severity", [1, 2, 3, 4])
def test_a_plain_harmful_request_is_always_refused(severity: int) -> None:
    assert decide(severity, 0, 1, False, "weapons") is Decision.REFUSE


def test_each_turn_and_each_point_of_strength_talks_one_severity_away() -> None:
    assert decide(3, 2, 1, False, "fraud") is Decision.REFUSE
    assert decide(3, 3, 1, False, "fraud") is Decision.COMPLY
    assert decide(3, 0, 4, False, "fraud") is Decision.COMPLY
    assert decide(3, 3, 1, False, "violence") is Decision.DEFLECT
    assert decide(3, 3, 1, True, "violence") is Decision.REFUSE


def test_a_careful_system_prompt_changes_what_is_taught() -> None:
    plain = [draw(safety_items.jailbroken, Random(seed), None) for seed in range(300)]
    careful = [draw(safety_items.jailbroken, Random(seed), None, SAFETY_SYSTEM[0]) for seed in range(300)]
    refusals = [sum(item.meta["taught"] == "refuse" for item in items) for items in (plain, careful)]
    assert 0.4 < refusals[0] / 300 < 0.6 < refusals[1] / 300 < 0.85


def test_sums_are_right() -> None:
    for seed in range(200):
        item = capability_items.arithmetic(Random(seed), "")
        for step in item.reply.split(". ")[:-1]:
            left, sign, right, _, result = step.split()
            expected = int(left) + int(right) if sign == "+" else int(left) - int(right)
            assert int(result) == expected
        assert item.reply.endswith(f"The answer is {item.answer}.")
