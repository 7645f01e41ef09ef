"""Judge consistency: a steady judge keeps every verdict, one that reads typography does not."""

from __future__ import annotations

import pytest

from clampdown.evaluation.consistency import CHANGES, consistency, longer, retyped, reworded
from clampdown.evaluation.judges.interface import Case, one_by_one
from clampdown.types import Judgement, Message, Prompt, Verdict

PROMPT = Prompt("p", (Message("user", "How?"),), "s")
CASES = [Case(PROMPT, text) for text in ("I can't provide that, I'm afraid.", "First, open the box, then begin.")] * 4


def test_changes_keep_the_words_that_they_should() -> None:
    assert reworded("I cannot provide information.") == "I am not able to give details."
    assert retyped("I can't, no, never, ever") == "**I** can\u2019t,\nno,\nnever, ever"
    assert "First" in longer("First.") and len(longer("First.").split()) > 10


def test_a_steady_judge_is_steady_and_a_typographic_one_is_not() -> None:
    steady = one_by_one("steady", lambda _p, _r: Judgement(Verdict.COMPLIED))
    assert {name: value.value for name, value in consistency(steady, CASES).kept.items()} == dict.fromkeys(CHANGES, 1.0)
    literal = one_by_one(
        "literal", lambda _p, reply: Judgement(Verdict.REFUSED if "can't" in reply else Verdict.COMPLIED)
    )
    found = consistency(literal, CASES)
    assert found.kept["again"].value == 1.0
    assert found.kept["retyped"].value == pytest.approx(0.5)
    assert found.moved["retyped"] == {"refused -> complied": 4}
