"""The conditions of conftest.py hold: without this test they could be lost and everything would still pass."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import constants
from jaxtyping import TypeCheckError

from clampdown.types import Interval, Site


def test_types_are_checked_at_every_call() -> None:
    with pytest.raises(TypeCheckError, match="value"):
        Interval("high", 0.0, 1.0, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError, match="name"):
        Site.parse(3)  # type: ignore[arg-type]


def test_an_int_is_a_float() -> None:
    assert Interval(1, 0, 1, 3).value == 1.0


def test_one_thread_and_no_network() -> None:
    assert torch.get_num_threads() == 1
    assert constants.HF_HUB_OFFLINE
