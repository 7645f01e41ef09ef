"""Threads follow the size of the model and the load, and the user's own word."""

from __future__ import annotations

import torch

from clampdown.config import ORGANISM
from clampdown.models.loading import load_model
from clampdown.models.threads import SMALL, choose_threads, threads_for


def test_small_models_get_one_thread_and_large_ones_what_is_free() -> None:
    assert threads_for(SMALL, 64, 0.0) == 1
    assert [threads_for(SMALL + 1, 8, load) for load in (0.0, 3.2, 8.0, 40.0)] == [8, 5, 1, 1]


def test_the_environment_wins(monkeypatch) -> None:
    lm = load_model(ORGANISM)
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert choose_threads(lm) is None and torch.get_num_threads() == before
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert choose_threads(lm) == 1
