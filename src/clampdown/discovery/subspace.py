"""Several directions of refusal at a site, at right angles to each other, read where the reply is decided.

1. The first is the difference of means between harmful and harmless prompts (2406.11717).
2. Harmful prompts come in groups: kinds of harm, or suites. What the first direction leaves of each group's own
   difference is a row of a matrix; its leading right singular vectors are the next directions, each turned to the side
   of the group that lies furthest along it.
3. A gap belongs to each: where harmless prompts lie along it, and how much further harmful ones do (the furthest
   group's). Setting or raising a coordinate is said in multiples of it.

One direction may not hold refusal (2502.17420): edits along all of these clamp a subspace, or raise into a cone.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from clampdown.activations.collect import collect
from clampdown.activations.stream import Reading, plan_pass
from clampdown.errors import NotEnoughDataError, PromptSetError
from clampdown.models.loading import LanguageModel
from clampdown.types import Prompt, Site

POOLING = "assistant_start"
GROUP = 3
"""Prompts that a group needs."""
NOTHING = 1e-4
"""Of the first direction's length: a direction whose groups differ by less is rounding."""

Rows = Float[np.ndarray, "rows d_model"]


@dataclass(frozen=True, slots=True)
class Subspace:
    """Orthonormal directions at a site. `harmless` is the mean harmless prompt's coordinate along each, `gap` how much
    larger the harmful ones' is."""

    site: Site
    directions: Float[np.ndarray, "k d_model"]
    harmless: Float[np.ndarray, " k"]
    gap: Float[np.ndarray, " k"]

    def __len__(self) -> int:
        return len(self.gap)


def find_subspace(
    lm: LanguageModel, harmful: Sequence[Prompt], harmless: Sequence[Prompt], site: Site, k: int
) -> Subspace:
    """`k` directions from one pass. Raises `PromptSetError` for an empty set or no direction, `NotEnoughDataError` when
    the groups of harmful prompts span fewer."""
    if k < 1 or not harmful or not harmless:
        raise PromptSetError(
            "directions need harmful and harmless prompts, and their number is 1 or more",
            hint="rows that say `harmful`, and --directions 3",
        )
    read = collect(plan_pass(lm, [Reading(site, dense=(POOLING,))], [*harmful, *harmless]))
    rows = np.asarray(read.dense(POOLING, reading=site.name), dtype=np.float64)
    return subspace_of(site, rows[: len(harmful)], rows[len(harmful) :], groups_of(harmful), k)


def groups_of(prompts: Sequence[Prompt]) -> list[Hashable]:
    """What kind of harm each prompt is: its suite and category."""
    return [(prompt.suite, prompt.category) for prompt in prompts]


def subspace_of(
    site: Site,
    harmful: Rows,
    harmless: Float[np.ndarray, "others d_model"],
    groups: Sequence[Hashable],
    k: int,
) -> Subspace:
    """The directions of activations. Raises as `find_subspace`."""
    middle = harmless.mean(0)
    first = harmful.mean(0) - middle
    length = float(np.linalg.norm(first))
    if not length > 0:
        raise PromptSetError("harmful and harmless prompts have one mean: there is no direction between them")
    own = _group_means(harmful, groups) - middle
    unit = first / length
    left = own - np.outer(own @ unit, unit)
    _, sizes, others = np.linalg.svd(left, full_matrices=False) if len(left) else (None, np.zeros(0), left)
    found = 1 + int((sizes > NOTHING * length).sum())
    if k > found:
        raise NotEnoughDataError(
            f"{len(own)} groups of harmful prompts differ along {found} directions, not {k}",
            hint=f"--directions {found}, or prompts of more categories with {GROUP} or more each",
        )
    directions = np.vstack([unit, others[: k - 1]])
    along = np.array([length, *(_furthest(own @ direction) for direction in directions[1:])])
    directions *= np.where(along < 0, -1.0, 1.0)[:, None]
    return Subspace(site, directions, directions @ middle, np.abs(along))


def _group_means(rows: Rows, groups: Sequence[Hashable]) -> Float[np.ndarray, "groups d_model"]:
    kept = [name for name in dict.fromkeys(groups) if groups.count(name) >= GROUP]
    member: list[Bool[np.ndarray, " rows"]] = [np.array([group == name for group in groups]) for name in kept]
    return np.array([rows[own].mean(0) for own in member]).reshape(len(kept), rows.shape[1])


def _furthest(values: Float[np.ndarray, " groups"]) -> float:
    return float(values[np.abs(values).argmax()])
