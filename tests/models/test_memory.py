"""The batch size follows the model's shape and what is free, and never asks for nothing."""

from __future__ import annotations

import pytest

from clampdown.models import memory
from clampdown.models.memory import row_bytes, rows_that_fit


def test_a_row_holds_its_keys_and_values(architecture, tiny):
    lm = tiny(architecture)
    config = lm.layout.decoder.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or lm.d_model // config.num_attention_heads
    assert row_bytes(lm, 200) - row_bytes(lm, 100) > 100 * 2 * lm.n_layers * heads * dim * 4


def test_rows_shrink_with_length_and_memory_and_never_reach_zero(tiny, monkeypatch: pytest.MonkeyPatch):
    lm = tiny("llama")
    monkeypatch.setattr(memory, "free_bytes", lambda _device: 20 * row_bytes(lm, 100))
    assert rows_that_fit(lm, 100) == 10
    assert rows_that_fit(lm, 400) < 10
    assert rows_that_fit(lm, 10**6) == 1


def test_free_memory_is_known_here(tiny):
    assert 2**20 < memory.free_bytes(tiny("llama").device) < 2**50
