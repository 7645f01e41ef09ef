"""Log-likelihoods of given texts: bounded memory, and no way around a gate.

1. A pass over many tokens has as many rows of logits, each as wide as the vocabulary. `slices` cuts its columns so that
   no more than a given number exist at a time; the pass is made once per slice.
2. A likelihood request gives the reply itself, and a gate decides on the context before it. Taken alone that is an
   oracle: whoever forges a reply token by token reads the unsteered model's words about it. So under a gated plan
   (`Rereading`) every scored token's log-probability is what a request that generates would get with everything before
   that token as its prompt: where the gate, having read the reply so far, decides as it did on the context, the pass's
   own; elsewhere that of the prompt's pass of that very beginning. Tokens of the context have none at all: the gate
   decided on the whole of it, not on its beginnings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.errors import ScopeError
from clampdown.models.loading import LanguageModel
from clampdown.serving.prefill import Part, Prefilled, prefill
from clampdown.serving.prefix import NOTHING
from clampdown.serving.requests import Request, Token
from clampdown.serving.sampling import TokenText, describe
from clampdown.serving.ticket import Ticket
from clampdown.steering.decoding import SaesOf
from clampdown.steering.plan import Edit, Plan
from clampdown.steering.receipts import Seat


def first_scored(request: Request) -> int:
    """The first of the prompt's tokens that has a log-probability: the second, or of a gated plan the reply's first."""
    return max(1, len(request.prompt) - request.given) if request.reread and request.given else 1


def beginnings(request: Request) -> list[int]:
    """Lengths of the prompt's beginnings that the gate has yet to read: those before each scored token, but for the
    context, which the pass itself reads."""
    if not request.reread:
        return []
    first = first_scored(request)
    return list(range(first + 1 if request.given else first, len(request.prompt)))


def slices(n: int, rows: int, vocabulary: int, limit: int) -> Iterator[range]:
    """Columns 0 to n, in runs that hold at most `limit` logits, or one column."""
    width = max(1, limit // (rows * vocabulary))
    for start in range(0, n, width):
        yield range(start, min(start + width, n))


def echoed(
    lm: LanguageModel,
    saes_of: SaesOf,
    tickets: Sequence[Ticket],
    parts: Sequence[Part],
    limit: int,
    vocabulary: int,
    text_of: TokenText,
) -> Prefilled:
    """The pass of prompts that want their own tokens' log-probabilities, which are given to the tickets. The logits of
    what is returned end with the last column."""
    width = max(len(part.tokens) for part in parts)
    for ticket in tickets:
        if ticket.request.echo:
            ticket.prompt = tuple(Token(token, text_of(token)) for token in ticket.request.prompt)
    done: Prefilled | None = None
    for columns in slices(width, len(parts), vocabulary, limit):
        if columns.stop < width and not any(_wanted(ticket, width, columns) for ticket in tickets):
            continue
        done = prefill(lm, saes_of, parts, columns=torch.arange(columns.start, columns.stop, device=lm.device))
        for row, ticket in enumerate(tickets):
            _describe(ticket, _wanted(ticket, width, columns), width, done.logits[row], columns.start, text_of)
    assert done is not None, "a pass has columns"
    return done


def _wanted(ticket: Ticket, width: int, columns: range) -> range:
    """Which of the prompt's tokens are predicted by these columns and asked about."""
    request = ticket.request
    if not request.echo:
        return range(0)
    before = width - len(request.prompt)  # column of the first token
    first = max(columns.start + 1 - before, first_scored(request))
    return range(first, max(first, min(columns.stop + 1 - before, len(request.prompt))))


def _describe(
    ticket: Ticket, wanted: range, width: int, logits: Float[Tensor, "pos vocab"], start: int, text_of: TokenText
) -> None:
    """Give the wanted tokens their log-probabilities. `start` is the column of the first row of logits."""
    if not wanted:
        return
    ids, n_top = ticket.request.prompt, ticket.request.sampling.top_logprobs or 0
    at = width - len(ids) + wanted.start - 1 - start
    own = [ids[i] for i in wanted]
    found = describe(logits[at : at + len(wanted)], own, [n_top] * len(wanted), text_of)
    ticket.prompt = (*ticket.prompt[: wanted.start], *found, *ticket.prompt[wanted.stop :])


@dataclass(eq=False)
class Rereading:
    """A scored request whose gate still has beginnings to read. `seat` is what its own pass left."""

    ticket: Ticket
    seat: Seat
    left: list[int]

    def step(self, lm: LanguageModel, saes_of: SaesOf, budget: int, text_of: TokenText) -> bool:
        """Read some of them in one pass of at most `budget` columns times rows. Whether that was all.

        Raises `ScopeError` for a plan whose edits could not act as the gate decides.
        """
        request = self.ticket.request
        # Longest first: a pass is as wide as its longest row.
        longest = self.left[-1]
        now = self.left[-max(1, budget // longest) :]
        self.left = self.left[: -len(now)]
        plan = _readable(request.plan)
        parts = [Part(request.prompt[:n], plan, 0, NOTHING, 0) for n in now]
        done = prefill(lm, saes_of, parts)
        changed = [row for row, seat in enumerate(done.seats) if _acting(seat) != _acting(self.seat)]
        if changed and _needs_header(request.plan):
            raise ScopeError(
                "the gate decides otherwise when it has read this reply, and the plan's scope 'assistant' has no "
                "meaning in a reply's middle",
                hint="score it without a gate, or have the operator choose what gated scoring reads",
            )
        for row in changed:
            self._replace(now[row], done.logits[row, -1:], text_of)
        return not self.left

    def _replace(self, at: int, logits: Float[Tensor, "one vocab"], text_of: TokenText) -> None:
        ticket = self.ticket
        n_top = ticket.request.sampling.top_logprobs or 0
        (token,) = describe(logits, [ticket.request.prompt[at]], [n_top], text_of)
        ticket.prompt = (*ticket.prompt[:at], token, *ticket.prompt[at + 1 :])
        ticket.n_rescored += 1


def _acting(seat: Seat) -> tuple[float, ...]:
    return tuple(seat.acts)


def _needs_header(plan: Plan | None) -> bool:
    return plan is not None and any(edit.scope == "assistant" for edit in plan.all_edits)


def _readable(plan: Plan | None) -> Plan | None:
    """The plan with its gates, on prompts that do not end with the assistant's header: no such edit acts there."""
    if plan is None or not _needs_header(plan):
        return plan
    edits = tuple(_elsewhere(edit) for edit in plan.edits)
    other = plan.otherwise
    if other is not None:
        other = other.model_copy(update={"edits": tuple(_elsewhere(edit) for edit in other.edits)})
    return plan.model_copy(update={"edits": edits, "otherwise": other})


def _elsewhere(edit: Edit) -> Edit:
    return edit.model_copy(update={"scope": "generated"}) if edit.scope == "assistant" else edit
