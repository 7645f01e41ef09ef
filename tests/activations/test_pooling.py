"""Poolings against plain loops, and folding over chunks against pooling at once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clampdown.activations.pooling import POOLINGS

BATCH, POS, CHANNELS = 3, 7, 5


def naive(name, acts, mask):
    """One prompt and channel at a time, from the definitions."""
    pooled = torch.zeros(acts.shape[0], acts.shape[2])
    for b in range(acts.shape[0]):
        for f in range(acts.shape[2]):
            counted = [float(acts[b, p, f]) for p in range(acts.shape[1]) if mask[b, p]]
            active = [value for value in counted if value > 0]
            if name == "assistant_start":
                pooled[b, f] = acts[b, -1, f]
            elif counted and name == "max":
                pooled[b, f] = max(counted)
            elif counted and name == "mean":
                pooled[b, f] = sum(counted) / len(counted)
            elif counted and name == "last":
                pooled[b, f] = counted[-1]
            elif active and name == "mean_active":
                pooled[b, f] = sum(active) / len(active)
    return pooled


@st.composite
def activations(draw):
    seed = draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randn(BATCH, POS, CHANNELS, generator=generator).clamp(min=0)
    mask = torch.rand(BATCH, POS, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    return acts, mask


@given(activations(), st.sampled_from(sorted(POOLINGS)))
def test_pooling_is_its_definition(inputs, name):
    acts, mask = inputs
    torch.testing.assert_close(POOLINGS[name](acts, mask), naive(name, acts, mask))


@given(activations(), st.sampled_from(sorted(POOLINGS)), st.integers(1, POS))
def test_folding_over_position_chunks_changes_nothing(inputs, name, step):
    acts, mask = inputs
    pooling = POOLINGS[name]
    state = None
    for start in range(0, POS, step):
        chunk = pooling.start(acts[:, start : start + step], mask[:, start : start + step])
        state = chunk if state is None else pooling.merge(state, chunk)
    torch.testing.assert_close(pooling.finish(state), pooling(acts, mask))


@pytest.mark.parametrize("name", sorted(name for name, pooling in POOLINGS.items() if pooling.signed))
def test_signed_poolings_suit_residuals(name):
    acts = torch.randn(BATCH, POS, CHANNELS)
    mask = torch.rand(BATCH, POS) < 0.7
    torch.testing.assert_close(POOLINGS[name](acts, mask), naive(name, acts, mask))
