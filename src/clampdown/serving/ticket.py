"""A request on its way through the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from clampdown.saes.sae import FeatureSource
from clampdown.serving.mailbox import Mailbox
from clampdown.serving.prefix import NOTHING, Prefix, reusable
from clampdown.serving.requests import Request, Token
from clampdown.serving.sampling import Drawing
from clampdown.serving.text import TextStream
from clampdown.steering.decoding import SaesOf


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
    n_rescored: int = 0

    @property
    def last(self) -> int:
        return self.ids[-1]

    @property
    def past(self) -> list[int]:
        """The prompt and what has been written, where the next token's penalties ask for it."""
        return [*self.request.prompt, *self.ids] if self.drawing.penalties else []

    @property
    def reusable(self) -> int:
        """How many of the prompt's first tokens may come from another's pass, or serve another's."""
        return 0 if self.request.echo else reusable(self.request)


def alike(group: Sequence[Ticket], saes_of: SaesOf) -> list[Ticket]:
    """The first ticket and all that can share its pass. Plans that read different SAEs at one site cannot, nor can
    prompts that end with replies of different lengths: a pass has one column where replies begin. A prompt of which
    much is cached would compute more beside one of which nothing is."""
    saes: dict[str, FeatureSource] = {}
    together: list[Ticket] = []
    for ticket in group:
        plan = ticket.request.plan
        own = {sae.cfg.site.name: sae for sae in (saes_of(plan) if plan else ())}
        same = all(saes.get(site, sae) is sae for site, sae in own.items())
        first = group[0]
        if same and ticket.request.given == first.request.given and bool(ticket.n_reused) == bool(first.n_reused):
            saes |= own
            together.append(ticket)
    return together
