"""The values that everything here is made of: an aspect of behaviour, its items, and what is measured of each item.

An aspect asks one or several suites whose prompts have the same ids ("plain" and "hinted", "one order" and "the
other"): the prompts of one id are one item, and a measure reads the arm's answers to all of them at once. So a question
asked twice is one observation and not two.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import numpy as np
from jaxtyping import Float

from clampdown.evaluation.intervals import Statistic
from clampdown.results.side_effects import Unit
from clampdown.types import OBJECTIVE, OptionChoice, Prompt, Record, Suite


class Kind(StrEnum):
    """What an aspect is about."""

    TRUTH = "truthfulness"
    SYCOPHANCY = "sycophancy"
    BIAS = "bias"
    PERSONA = "persona"
    CALIBRATION = "calibration"
    OPINIONS = "opinions"


class Way(StrEnum):
    """How an arm answers: by the likelihood of given options, or by writing a reply."""

    LIKELIHOOD = "by likelihood"
    GENERATION = "by generation"


@dataclass(frozen=True, slots=True)
class Item:
    """One observation: its prompts and an arm's answers to them, by role, and the unsteered model's answers."""

    prompts: Mapping[str, Prompt]
    choices: Mapping[str, OptionChoice] = field(default_factory=dict)
    records: Mapping[str, Record] = field(default_factory=dict)
    unsteered: Mapping[str, Record] = field(default_factory=dict)


Reading = bool | float | tuple[float, ...] | None
"""What a measure reads of an item: yes or no, a number, the numbers whose means its statistic takes; None: nothing."""


def the_mean(means: Float[np.ndarray, "... dims"]) -> Float[np.ndarray, "..."]:
    """The statistic of a measure that is a mean."""
    return means[..., 0]


@dataclass(frozen=True, slots=True)
class Measure:
    """What is read of an item, in which unit, which way is worse, and what of the items' means is reported."""

    name: str
    unit: Unit
    read: Callable[[Item], Reading]
    worse: Literal["up", "down", ""] = ""
    statistic: Statistic = the_mean


@dataclass(frozen=True, slots=True)
class Aspect:
    """Suites by role, how they are answered, and what is measured of the answers."""

    kind: Kind
    name: str
    way: Way
    suites: Mapping[str, Suite]
    measures: tuple[Measure, ...]

    @property
    def label(self) -> str:
        """How a table names it."""
        return f"{self.name}, {self.way.value}"

    def items(self) -> tuple[Mapping[str, Prompt], ...]:
        """The prompts of each item by role, in the order of the first suite."""
        by_role = {role: {prompt.id: prompt for prompt in suite.prompts} for role, suite in self.suites.items()}
        first = next(iter(by_role.values()))
        return tuple({role: prompts[key] for role, prompts in by_role.items()} for key in first)


@dataclass(frozen=True, slots=True)
class Absent:
    """An aspect that is not asked, and why."""

    kind: Kind
    name: str
    why: str


def cluster_of(prompts: Mapping[str, Prompt]) -> Hashable:
    """What an item is not independent of: others of its objective, else nothing but itself."""
    first = next(iter(prompts.values()))
    objective = first.meta.get(OBJECTIVE)
    return ("objective", objective) if objective is not None else ("item", first.id)
