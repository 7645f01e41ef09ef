"""The table of methods that a study compares. A new one is a row here and a file beside this one.

The published methods are chosen as published: by the refusals that they gain, with no regard to what safe prompts and
capability pay. The gated set must also refuse no more safe validation prompts than the unsteered model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from clampdown.errors import PromptSetError
from clampdown.study.groundwork import Groundwork
from clampdown.study.methods import clamp, dense, gated_set, refine, two_sided
from clampdown.study.methods.method import Method


@dataclass(frozen=True, slots=True)
class MethodRow:
    """One method: what it is called where it is asked for and in results, and how it is made."""

    name: str
    what: str
    make: Callable[[Groundwork], Method]
    usual: bool = True
    """Whether it is compared when no method is named."""


METHODS: dict[str, MethodRow] = {
    "clamp": MethodRow(
        clamp.NAME, "the feature of one refusal that raises refusal most, clamped", clamp.clamp_of_one_refusal
    ),
    "refine": MethodRow(refine.NAME, "contrast score, both signs, refined into a set", refine.score_and_refine),
    "dense": MethodRow(dense.ADDED, "the difference of means added (2406.11717)", dense.added_direction),
    "cast": MethodRow(dense.CAST, "the same behind a dense condition (2409.05907)", dense.conditional_direction),
    "gated-set": MethodRow(gated_set.NAME, "sets of features clamped behind calibrated gates", gated_set.gated_set),
    "two-sided": MethodRow(
        two_sided.NAME,
        "the direction of refusing, or its features, up and down behind two gates",
        two_sided.two_sided,
        usual=False,
    ),
}
ALL = tuple(name for name, row in METHODS.items() if row.usual)


def check_methods(names: Sequence[str]) -> None:
    """Raises `PromptSetError` for a method that there is not."""
    for name in names:
        if name not in METHODS:
            raise PromptSetError(f"no method is called '{name}'", hint=f"one of: {', '.join(METHODS)}")


def make_methods(ground: Groundwork, names: Sequence[str]) -> tuple[Method, ...]:
    """The named methods with their candidate arms. One that the prompts cannot carry is left out, and that is said."""
    found: list[Method] = []
    for name in names:
        with ground.stages.attempt(f"the method {METHODS[name].name}"):
            found.append(METHODS[name].make(ground))
    return tuple(found)
