"""Several events of the page write the same list. What was asked for last is what is shown, whatever comes last.

An event's work may take a second or a minute, and a request may be held up before it begins. So the page says when it
asked (by its own clock, in `ASKED`), and an answer to an older question than the newest one keeps its list to itself.
"""

from __future__ import annotations

from typing import TypeVar

from clampdown.extras import extra

with extra("studio", "the studio's page"):
    import gradio as gr

ASKED = "(...given) => [...given.slice(0, -1), performance.now()]"
"""For an event whose last input is when it was asked: what the browser puts there."""

_T = TypeVar("_T")


class Newest:
    """When one page asked for its list, so far. Gradio gives every page a copy of its own."""

    def __init__(self) -> None:
        self._asked: list[float] = []

    def ask(self, at: float) -> None:
        self._asked.append(at)

    def passed(self, at: float) -> bool:
        """Whether a newer question than the one asked then has come."""
        return at < max(self._asked, default=at)

    def shows(self, at: float, found: _T) -> _T:
        """What was found for the question asked then; nothing to show when a newer one has come."""
        return gr.skip() if self.passed(at) else found  # type: ignore[return-value]
