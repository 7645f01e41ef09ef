"""The answer of a reply is what follows its thoughts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clampdown.replies import THINKING, Marks, answer_of, parts_of

PLAIN = st.text().filter(lambda text: not any(mark in text for marks in THINKING for mark in marks))


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("I can't help with that.", "I can't help with that."),
        ("  spaces stay \n", "  spaces stay \n"),
        ("<think>\nShould I? No.\n</think>\n\nI can't.", "I can't."),
        ("<think>\n\n</think>\n\nMadrid.", "Madrid."),
        ("\n<think>a</think> <think>b</think> c", "c"),
        ("Should I? Yes.\n</think>\n\nSure.", "Sure."),
        ("<think>Sure, here is how", ""),
        ("<think>a</think>", ""),
        ("", ""),
        ("Models write <think>this</think> first.", "Models write <think>this</think> first."),
        ("<think>x</think>The mark </think> closes it.", "The mark </think> closes it."),
        ("[THINK]a[/THINK]b", "b"),
        ("<thinking>a</thinking>b", "b"),
        ("<think>the mark </thinking> is another's</think>b", "b"),
    ],
)
def test_the_answer_follows_the_thoughts(reply: str, answer: str) -> None:
    assert answer_of(reply) == answer


@pytest.mark.parametrize("marks", THINKING)
@given(thought=PLAIN, answer=PLAIN)
def test_every_family_is_cut_at_its_own_marks(marks: Marks, thought: str, answer: str) -> None:
    parts = parts_of(f"{marks.opening}{thought}{marks.closing}{answer}")
    assert (parts.thinking, parts.answer, parts.finished) == (thought.strip(), answer.lstrip(), True)
    unfinished = parts_of(marks.opening + thought)
    assert (unfinished.thinking, unfinished.answer, unfinished.finished) == (thought.strip(), "", False)


@given(PLAIN)
def test_a_reply_without_thoughts_is_its_own_answer(reply: str) -> None:
    assert answer_of(reply) == reply
