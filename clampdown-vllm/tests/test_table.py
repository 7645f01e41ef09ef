"""Replies and receipts equal clampdown's own engine, token for token, in every kind of engine; and the test sees one
that does not."""

from __future__ import annotations

import pytest
from conftest import Reference
from setups import SETUPS
from table import engine, replies, rounds, wrong_receipts, wrong_replies

CI = {"eager", "compiled"}


def _cases() -> list[object]:
    return [pytest.param(name, marks=[pytest.mark.ci] if name in CI else [], id=name) for name in SETUPS]


@pytest.mark.parametrize("name", _cases())
def test_every_reply_and_receipt_is_the_reference(name: str, reference: Reference) -> None:
    """Plans of all kinds in one batch, in three orders: the later ones find a prefix cache that others filled."""
    with engine(reference.plans, **SETUPS[name]) as llm:
        cached = 0
        for rows in rounds(reference.rows, 3):
            outs = replies(llm, rows)
            assert wrong_replies(rows, outs) == []
            assert wrong_receipts(rows, outs) == []
            cached += sum(out.num_cached_tokens or 0 for out in outs)
        assert cached > 0, "nothing came from the prefix cache: this did not test it"


def test_gates_may_always_be_read_in_passes_of_their_own(reference: Reference) -> None:
    with engine(reference.plans, **SETUPS["eager"], settings={"one_pass": False}) as llm:
        for rows in rounds(reference.rows, 1):
            outs = replies(llm, rows)
            assert wrong_replies(rows, outs) == []
            assert wrong_receipts(rows, outs) == []
            assert not any(out.steering["one_pass"] for row, out in zip(rows, outs, strict=True) if row["plan"])


@pytest.mark.ci
def test_without_the_blocks_keys_replies_are_wrong(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a cache that crosses plans is seen."""
    from clampdown_vllm import blocks

    monkeypatch.setattr(blocks, "done_to", lambda *_: None)
    wrong = []
    with engine(reference.plans, **SETUPS["eager"]) as llm:
        for rows in rounds(reference.rows, 2):
            wrong += wrong_replies(rows, replies(llm, rows))
    assert wrong
