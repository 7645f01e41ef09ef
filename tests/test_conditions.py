"""The conditions of conftest.py hold: without this test they could be lost and everything would still pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import beartype
import pytest
import torch
from huggingface_hub import constants
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from clampdown.types import Interval, Site
from tests.checked import checked

CHECKER = beartype.beartype(conf=beartype.BeartypeConf(violation_type=TypeCheckError))


def test_types_are_checked_at_every_call() -> None:
    with pytest.raises(TypeCheckError, match="value"):
        Interval("high", 0.0, 1.0, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeCheckError, match="name"):
        Site.parse(3)  # type: ignore[arg-type]


def test_an_int_is_a_float() -> None:
    assert Interval(1, 0, 1, 3).value == 1.0


def test_axes_of_one_name_are_of_one_length() -> None:
    assert rotated(torch.eye(2), torch.ones(2)).tolist() == [1, 1]
    with pytest.raises(TypeCheckError):
        rotated(torch.eye(2), torch.ones(3))
    with pytest.raises(TypeCheckError):
        rotated(torch.eye(2), torch.ones(2).int())


def rotated(matrix: Tensor, vector: Tensor) -> Tensor:
    def multiplied(m: Float[Tensor, "n n"], x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return m[:, : len(x)] @ x[: len(m)]

    return checked(multiplied, typechecker=CHECKER)(matrix, vector)


def test_what_a_function_holds_is_its_own_though_its_checks_are_shared() -> None:
    def adding(n: Any) -> Any:
        def added(x: int) -> int:
            return x + n

        return checked(added, typechecker=CHECKER)

    assert [adding(n)(1) for n in range(3)] == [1, 2, 3]
    with pytest.raises(TypeCheckError, match="return"):
        adding(0.5)(1)
    with pytest.raises(TypeCheckError, match="x"):
        adding(1)("1")


def test_dataclasses_alike_but_for_their_types_are_not_taken_for_each_other() -> None:
    @dataclass
    class Count:
        value: int

    @dataclass
    class Word:
        value: str

    for made, good, bad in ((Count, 1, "a"), (Word, "a", 1)):
        found = checked(made, typechecker=CHECKER)
        assert found(good).value == good
        with pytest.raises(TypeCheckError, match="value"):
            found(bad)


def test_one_thread_and_no_network() -> None:
    assert torch.get_num_threads() == 1
    assert constants.HF_HUB_OFFLINE
