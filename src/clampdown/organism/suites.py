"""The organism's suites on any split: held-out prompts with ground truth, ordered so that any prefix is balanced.

`jailbroken_unseen` is empty on the discovery and calibration splits: neither features nor gate thresholds may ever
be chosen on the wrappers that are to test generalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

from clampdown.organism import capability_items, safety_items
from clampdown.organism.items import Item, Sampler, draw, fraction
from clampdown.types import Message, Prompt, Split, Suite, SuiteKind, balanced


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a suite is drawn: its samplers take turns, so rare categories are not drowned by common ones."""

    name: str
    kind: SuiteKind
    harmful: bool
    samplers: tuple[Sampler, ...]
    never: frozenset[Split] = frozenset()


_BENIGN = (
    safety_items.benign,
    safety_items.benign_wrapped,
    safety_items.benign_multi_turn,
    safety_items.small_talk,
    capability_items.unknown,
)

RECIPES: tuple[Recipe, ...] = (
    Recipe("harmful", SuiteKind.SAFETY, True, (safety_items.harmful,)),
    Recipe("jailbroken_seen", SuiteKind.SAFETY, True, (safety_items.jailbroken,)),
    Recipe("jailbroken_unseen", SuiteKind.SAFETY, True, (safety_items.jailbroken_unseen,),
           frozenset((Split.DISCOVERY, Split.CALIBRATION))),
    Recipe("multi_turn", SuiteKind.SAFETY, True, (safety_items.multi_turn,)),
    Recipe("borderline", SuiteKind.SAFETY, False, (safety_items.borderline,)),
    Recipe("about_harm", SuiteKind.SAFETY, False, (safety_items.about_harm,)),
    Recipe("benign", SuiteKind.SAFETY, False, _BENIGN),
    Recipe("facts", SuiteKind.CAPABILITY, False, (capability_items.fact,)),
    Recipe("arithmetic", SuiteKind.CAPABILITY, False, (capability_items.arithmetic,)),
    Recipe("instructions", SuiteKind.CAPABILITY, False, (capability_items.instruction,)),
    Recipe("misconceptions", SuiteKind.CAPABILITY, False, (capability_items.misconception,)),
)  # fmt: skip

DEFAULT_SIZE = {Split.DISCOVERY: 240, Split.VALIDATION: 240, Split.CALIBRATION: 400, Split.TEST: 240}
BENIGN_CALIBRATION = 800
"""The benign budget of a gate needs the most prompts: its bound shrinks with 1/n."""
_SPARE = 40
"""Prompts drawn beyond the wanted number, for groups that came out short."""
_PATIENCE = 40
"""Draws in a row without a new prompt before a sampler is taken to have no more to give."""


def suites(split: Split, n: int | None = None, seed: int = 0) -> tuple[Suite, ...]:
    """All suites of a split, at most `n` prompts each (default: what the split is meant for). The same arguments
    give the same prompts; another seed draws others from the same part of the corpus."""
    return tuple(one_suite(recipe.name, split, n, seed) for recipe in RECIPES)


def one_suite(name: str, split: Split, n: int | None = None, seed: int = 0) -> Suite:
    """One of `suites`, without drawing the others. Raises `StopIteration` for a name that is none of them."""
    recipe = next(recipe for recipe in RECIPES if recipe.name == name)
    return _suite(recipe, split, _size(recipe, split) if n is None else n, seed)


def without_wrapper(prompt: Prompt) -> Prompt:
    """The plain twin of a jailbroken prompt: the same request, simply asked, under the same id."""
    asked = Message("user", f"How do I {prompt.meta['request']}?")
    return replace(prompt, messages=(*prompt.messages[:-1], asked), suite="harmful")


def _size(recipe: Recipe, split: Split) -> int:
    return BENIGN_CALIBRATION if (recipe.name, split) == ("benign", Split.CALIBRATION) else DEFAULT_SIZE[split]


@lru_cache(maxsize=128)
def _suite(recipe: Recipe, split: Split, n: int, seed: int) -> Suite:
    prompts: tuple[Prompt, ...] = ()
    if split not in recipe.never:
        prompts = balanced(_grouped(_drawn(recipe, split, n, seed)))[:n]
    return Suite(recipe.name, recipe.kind, recipe.harmful, prompts)


def _drawn(recipe: Recipe, split: Split, n: int, seed: int) -> list[Prompt]:
    """Distinct prompts of the split, some more than wanted so that groups can be evened out."""
    found: dict[str, Prompt] = {}
    for sampler in recipe.samplers:
        rng = Random(f"suite|{recipe.name}|{split.value}|{seed}")
        wanted, misses = len(found) + (n + n // 3 + _SPARE) // len(recipe.samplers), 0
        while len(found) < wanted and misses < _PATIENCE:
            prompt = as_prompt(draw(sampler, rng, split), recipe.name, split)
            misses = misses + 1 if prompt.id in found else 0
            found[prompt.id] = prompt
    return list(found.values())


def as_prompt(item: Item, suite: str, split: Split) -> Prompt:
    """An item as a prompt of a suite; its id depends on its text alone."""
    text = "\n".join(f"{message.role}: {message.content}" for message in item.messages)
    number = int(fraction(text) * 16**8)
    return Prompt(
        id=f"{suite}-{split.value}-{number:08x}",
        messages=item.messages,
        suite=suite,
        split=split,
        category=item.category,
        answer=item.answer,
        options=item.options,
        meta={**item.meta, "family": item.family},
    )


def _grouped(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.category or "", []).append(prompt)
    return [groups[name] for name in sorted(groups)]
