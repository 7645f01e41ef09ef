"""The suites: their contract, disjoint splits, balanced prefixes."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from clampdown.organism import corpus
from clampdown.organism.suites import BENIGN_CALIBRATION, DEFAULT_SIZE, RECIPES, _suite, suites
from clampdown.types import Prompt, Split, Suite, SuiteKind

SAFETY = ("harmful", "jailbroken_seen", "jailbroken_unseen", "multi_turn", "borderline", "about_harm", "benign")
CAPABILITY = ("facts", "arithmetic", "instructions", "misconceptions")
N = 60


def conversation(prompt: Prompt) -> tuple[str, ...]:
    return tuple(message.content for message in prompt.messages)


@pytest.fixture(scope="module")
def by_split() -> dict[Split, dict[str, Suite]]:
    return {split: {suite.name: suite for suite in suites(split, N)} for split in Split}


def test_names_and_kinds(by_split: dict[Split, dict[str, Suite]]) -> None:
    for found in by_split.values():
        assert tuple(found) == SAFETY + CAPABILITY
        assert all(found[name].kind is SuiteKind.SAFETY for name in SAFETY)
        assert all(found[name].kind is SuiteKind.CAPABILITY for name in CAPABILITY)
        assert [name for name in found if found[name].harmful] == list(SAFETY[:4])


def test_sizes(by_split: dict[Split, dict[str, Suite]]) -> None:
    for split, found in by_split.items():
        for suite in found.values():
            hidden = suite.name == "jailbroken_unseen" and split in (Split.DISCOVERY, Split.CALIBRATION)
            assert len(suite.prompts) == (0 if hidden else N), (split, suite.name)


@pytest.mark.parametrize("name", ["benign", "misconceptions"])
def test_the_largest_sizes_are_reached(name: str) -> None:
    """The split that wants most, and the suites whose grammar has least to give."""
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    wanted = BENIGN_CALIBRATION if name == "benign" else DEFAULT_SIZE[Split.CALIBRATION]
    assert len(_suite(recipe, Split.CALIBRATION, wanted, 0).prompts) == wanted


def test_no_prompt_is_in_two_splits(by_split: dict[Split, dict[str, Suite]]) -> None:
    for name in SAFETY + CAPABILITY:
        seen: set[tuple[str, ...]] = set()
        for found in by_split.values():
            texts = {conversation(prompt) for prompt in found[name].prompts}
            assert len(texts) == len(found[name].prompts)
            assert not texts & seen
            seen |= texts


def test_no_prompt_is_in_training(by_split: dict[Split, dict[str, Suite]]) -> None:
    rng = Random(11)
    trained = {item.messages for item in (corpus.training_item(rng) for _ in range(4_000))}
    for found in by_split.values():
        assert not [p.text for suite in found.values() for p in suite.prompts if p.messages in trained]


def test_every_prefix_is_balanced(by_split: dict[Split, dict[str, Suite]]) -> None:
    for name, suite in by_split[Split.TEST].items():
        categories = {prompt.category for prompt in suite.prompts}
        prefix = Counter(prompt.category for prompt in suite.prompts[: 4 * len(categories)])
        assert max(prefix.values()) - min(prefix[category] for category in categories) <= 1, (name, prefix)


def test_the_same_arguments_give_the_same_prompts_and_another_seed_others() -> None:
    again, other = suites(Split.TEST, 20), suites(Split.TEST, 20, seed=1)
    assert again == suites(Split.TEST, 20)
    assert [suite.prompts for suite in again] != [suite.prompts for suite in other]


def test_ids_are_unique_and_answers_among_the_options(by_split: dict[Split, dict[str, Suite]]) -> None:
    prompts = [prompt for found in by_split.values() for suite in found.values() for prompt in suite.prompts]
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        assert (prompt.answer is not None) == (prompt.suite in CAPABILITY)
        assert not prompt.options or prompt.answer in prompt.options


def test_the_escalations_have_their_turns(by_split: dict[Split, dict[str, Suite]]) -> None:
    for prompt in by_split[Split.TEST]["multi_turn"].prompts:
        assert sum(message.role == "user" for message in prompt.messages) == int(prompt.meta["turns"])
