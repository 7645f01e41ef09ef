"""The jailbreak contrast: the same requests with and without the wrapper that gets them answered (after 2602.12418).

A wrapper works by silencing what refuses. For each feature, with d_i = a_f(plain request i) - a_f(wrapped request i):

    Wilcoxon signed-rank on the d_i that are not zero (ties share their mean rank, normal approximation without
    continuity correction), two-sided, Benjamini-Hochberg over all features
    drop = the signed z of that test: large and positive where wrapping reliably lowers the feature

Pairing takes the topic out: a feature that fires on a request fires in both members of the pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.sparse import csc_array, csr_array
from scipy.stats import false_discovery_control, norm, rankdata

from clampdown.activations.statistics import shape_of
from clampdown.errors import PromptSetError
from clampdown.types import Prompt

PerFeature = Float[np.ndarray, " d_sae"]
_COLUMNS = 2048


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Per feature: the signed z, its two-sided p, the BH-adjusted q, and the mean drop from plain to wrapped.

    A feature that wrapping never changes has z = 0 and p = q = 1.
    """

    z: PerFeature
    p_value: PerFeature
    q_value: PerFeature
    mean_drop: PerFeature


def signed_rank(plain: csr_array, wrapped: csr_array) -> PairedTest:
    """Wilcoxon's test of every column of two pairs x features matrices whose rows are pairs.

    Raises `ValueError` when their shapes differ.
    """
    if shape_of(plain) != shape_of(wrapped):
        raise ValueError(f"pairs must match: {shape_of(plain)} and {shape_of(wrapped)}")
    difference = csc_array(plain.astype(np.float64) - wrapped.astype(np.float64))
    _, d_sae = shape_of(csr_array(difference))
    z = np.concatenate(
        [_z(difference[:, start : start + _COLUMNS].toarray()) for start in range(0, d_sae, _COLUMNS)] or [np.zeros(0)]
    )
    p_value = np.minimum(2 * norm.sf(np.abs(z)), 1.0)
    mean_drop = np.asarray(difference.mean(axis=0)).ravel()
    return PairedTest(z, p_value, false_discovery_control(p_value, method="bh"), mean_drop)


def _z(difference: Float[np.ndarray, "pairs columns"]) -> Float[np.ndarray, " columns"]:
    """z of W = sum of sign x rank: its variance under no effect is the sum of squared ranks, ties included."""
    size = np.where(difference == 0, np.nan, np.abs(difference))
    ranks = np.nan_to_num(rankdata(size, axis=0, nan_policy="omit"))
    spread = np.sqrt((ranks**2).sum(0))
    total = (np.sign(difference) * ranks).sum(0)
    return np.divide(total, spread, out=np.zeros_like(total), where=spread > 0)


@dataclass(frozen=True, slots=True)
class Pair:
    """One request, asked plainly and inside a jailbreak."""

    plain: Prompt
    wrapped: Prompt


def pair_by_id(plain: Sequence[Prompt], wrapped: Sequence[Prompt]) -> tuple[Pair, ...]:
    """Pairs of prompts with the same id, in the order of `wrapped`.

    Raises `PromptSetError` for a wrapped prompt whose plain twin is missing.
    """
    by_id = {prompt.id: prompt for prompt in plain}
    for prompt in wrapped:
        if prompt.id not in by_id:
            raise PromptSetError(
                f"jailbroken prompt '{prompt.id}' has no harmful prompt of that id",
                hint="give every jailbroken prompt the id of the plain request that it wraps",
            )
    return tuple(Pair(by_id[prompt.id], prompt) for prompt in wrapped)
