"""What of a reply is the answer: models that think write their thoughts first, and nobody asked for those.

A thinking model opens a reply with a block such as `<think> ... </think>`. The answer is what follows it. Blocks count
at the reply's beginning only, so that an answer may speak about such marks. Some templates open the block themselves;
then a reply has the closing mark alone, and the answer is what follows that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Marks(NamedTuple):
    """How a family of models opens and closes its thoughts."""

    opening: str
    closing: str


# A new family is one row. The longer of two openings that begin alike comes first.
THINKING = (
    Marks("<think>", "</think>"),
    Marks("<thinking>", "</thinking>"),
    Marks("<seed:think>", "</seed:think>"),
    Marks("[THINK]", "[/THINK]"),
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),
)


@dataclass(frozen=True, slots=True)
class Parts:
    """A reply in two. `finished` is False where the reply ends inside a thought: then there is no answer."""

    thinking: str
    answer: str
    finished: bool = True


def parts_of(reply: str) -> Parts:
    """A reply's thoughts and its answer. A reply without thoughts is returned as it is."""
    thoughts: list[str] = []
    rest = reply
    while opened := _opened(rest):
        inside, closed, after = rest.lstrip()[len(opened.opening) :].partition(opened.closing)
        thoughts.append(inside.strip())
        if not closed:
            return Parts(_joined(thoughts), "", finished=False)
        rest = after.lstrip()
    if not thoughts and (marks := next(_closed_alone(reply), None)):
        before, _, after = reply.partition(marks.closing)
        return Parts(before.strip(), after.lstrip())
    return Parts(_joined(thoughts), rest)


def answer_of(reply: str) -> str:
    """The answer in a reply: what follows its thoughts, all of it where there are none, "" where they never end."""
    return parts_of(reply).answer


def _opened(text: str) -> Marks | None:
    start = text.lstrip()
    return next((marks for marks in THINKING if start.startswith(marks.opening)), None)


def _closed_alone(reply: str) -> Iterator[Marks]:
    """Marks of which the reply has the closing one and no opening one before it: the template opened the block."""
    for marks in THINKING:
        before, closed, _ = reply.partition(marks.closing)
        if closed and marks.opening not in before:
            yield marks


def _joined(thoughts: list[str]) -> str:
    return "\n\n".join(thought for thought in thoughts if thought)
