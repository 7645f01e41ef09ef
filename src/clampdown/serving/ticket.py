"""A request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from clampdown.serving.mailbox import Mailbox
from clampdown.serving.prefix import NOTHING, Prefix, reusable
from clampdown.serving.requests import Request, Token
from clampdown.serving.sampling import Drawing
from clampdown.serving.text import TextStream


@dataclass(eq=False)
class Ticket:
    """A request, and what has become of it. Of its prompt the first `n_reused` tokens are in `prefix`, computed with
    the plan whose digest is `key`; `looked` says whether that has been looked for, `n_found` how many of them others
    had left there (a long prompt's own pieces are in `prefix` too)."""

    request: Request
    mailbox: Mailbox
    drawing: Drawing
    text: TextStream
    key: str = ""
    cancelled: bool = False
    prompt: tuple[Token, ...] = ()
    ids: list[int] = field(default_factory=list)
    prefix: Prefix = NOTHING
    looked: bool = False
    n_reused: int = 0
    n_found: int = 0

    @property
    def last(self) -> int:
        return self.ids[-1]

    @property
    def reusable(self) -> int:
        """How many of the prompt's first tokens may come from another's pass, or serve another's."""
        return 0 if self.request.echo else reusable(self.request)
