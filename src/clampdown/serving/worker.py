"""The thread that owns the model: admit, decode one token of every running row, hand out what has become certain.

1. Waiting requests are admitted in order, as many as rows are free and as one pass's budget of tokens holds, so that
   those who decode wait for at most one such pass. Their prompts run inside `steer`: every kind of plan works.
2. Rows then join the decoding batch (`pool.py`, `steering/decoding.py`), whatever plans the others have.
3. A request that ended, or was cancelled, leaves before the next pass.
4. What a gate has yet to read of scored texts comes in passes of a budget too, one between two stretches of decoding.

What goes wrong in a prompt's pass is one request's: the others of that pass are tried again alone. What goes wrong
while decoding ends the requests that were decoding, and no others. What goes wrong between the two, where rows join the
batch (memory), ends both: nobody gets a first token twice, and no row a wrong neighbour's.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache

from clampdown.errors import ClampdownError, ModelError, RequestError
from clampdown.models.loading import LanguageModel
from clampdown.serving.mailbox import Item, Mailbox
from clampdown.serving.pool import Pool
from clampdown.serving.prefill import Part, prefill
from clampdown.serving.prefix import PrefixCache
from clampdown.serving.requests import Done, Token
from clampdown.serving.sampling import choose, describe
from clampdown.serving.scoring import Rereading, beginnings, echoed
from clampdown.serving.ticket import Ticket, alike
from clampdown.steering.decoding import Decoding, SaesOf
from clampdown.steering.receipts import Seat
from clampdown.types import Receipt

Send = Callable[[list[tuple[Mailbox, Item]]], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """How much the engine does at once. `rows` decode together; `queue` wait, at most `gather_seconds` of that for
    company in a prompts' pass while others decode; such a pass has at most
    `prefill_tokens` columns times rows, or is one prompt's; `prefix_bytes` is how much is kept of prompts that are done
    (0: nothing). `echo_logits` is how many logits of echoed prompts exist at a time, `reread_tokens` how many tokens a
    gate reads again for one scored text."""

    rows: int = 32
    queue: int = 256
    prefill_tokens: int = 2048
    prefix_bytes: int = 256 * 2**20
    gather_seconds: float = 0.02
    echo_logits: int = 2**26
    reread_tokens: int = 2**18


class Worker:
    """Everything that touches the model. `offer` and `cancel` may be called from any thread."""

    def __init__(self, lm: LanguageModel, limits: Limits, saes_of: SaesOf, send: Send, context: int) -> None:
        self._lm = lm
        self._limits = limits
        self._saes_of = saes_of
        self._send = send
        self._context = context
        self._vocabulary = int(lm.model.get_output_embeddings().weight.shape[0])
        self._wake = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._rows: list[Ticket] = []
        self._admitting: list[Ticket] = []
        self._rereading: deque[Rereading] = deque()
        self._pool, self._decoding = Pool(lm), Decoding(lm, saes_of)
        self._letters: list[tuple[Mailbox, Item]] = []
        self._texts: dict[int, str] = {}
        self._prefixes = PrefixCache(limits.prefix_bytes)
        self._ended: deque[float] = deque(maxlen=64)
        self._closing = False
        self._gathering: float | None = None
        self._thread = threading.Thread(target=self._run, name="clampdown-engine", daemon=True)

    # ---- from any thread -------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def offer(self, ticket: Ticket) -> bool:
        """Put a request into the queue. False when it is full; who has gone away takes no place."""
        with self._wake:
            if len(self._waiting) >= self._limits.queue:
                self._waiting = deque(waits for waits in self._waiting if not waits.cancelled)
            if len(self._waiting) >= self._limits.queue:
                return False
            self._waiting.append(ticket)
            self._wake.notify()
        return True

    def counts(self) -> tuple[int, int]:
        """How many wait and how many run."""
        with self._wake:  # between queue and batch a request is in neither: a server that drains would leave it behind
            waiting = sum(not ticket.cancelled for ticket in self._waiting)
            return waiting, len(self._rows) + len(self._admitting) + len(self._rereading)

    def rate(self) -> float:
        """Requests that ended per second, of late."""
        ended = list(self._ended)
        return (len(ended) - 1) / max(ended[-1] - ended[0], 1e-3) if len(ended) > 1 else 0.0

    def cancel_all(self) -> None:
        with self._wake:
            rereading = [reading.ticket for reading in list(self._rereading)]
            for ticket in (*self._waiting, *self._admitting, *self._rows, *rereading):
                ticket.cancelled = True

    def close(self) -> None:
        """End the thread after its step; what still runs is cancelled."""
        self.cancel_all()
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    # ---- the thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with torch.no_grad():
            while self._wait_for_work():
                self._leave_cancelled()
                self._admit()
                self._reread()
                self._post()
                if self._rows:
                    self._guarded_stretch()

    def _wait_for_work(self) -> bool:
        with self._wake:
            self._wake.wait_for(lambda: self._waiting or self._rows or self._rereading or self._closing)
            return bool(self._waiting or self._rows or self._rereading)

    def _post(self) -> None:
        letters, self._letters = self._letters, []
        self._send(letters)

    def _tell(self, ticket: Ticket, item: Item | None) -> None:
        if isinstance(item, Done):
            self._ended.append(time.monotonic())
        if item is not None:
            self._letters.append((ticket.mailbox, item))

    def _due(self) -> bool:
        """Whether those who wait come in now. A pass for one prompt takes nearly as long as one for several, and
        everybody else waits for it: so while others decode, the first to come is given a moment for more to come."""
        waiting, room = len(self._waiting), self._limits.rows - len(self._rows)
        if not waiting or room < 1:
            return False
        if not self._rows or waiting >= min(room, max(1, len(self._rows) // 4)):
            return True
        now = time.monotonic()
        self._gathering = now if self._gathering is None else self._gathering
        return now - self._gathering >= self._limits.gather_seconds

    # ---- admission -------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Bring in those who come next. Those that cannot share a pass come in passes of their own."""
        group = self._next_group() if self._due() else []
        self._gathering = None if group else self._gathering
        while group:
            together = self._bounded(alike(group, self._saes_of))
            self._prefill_all(together)
            group = [ticket for ticket in group if ticket not in together]
        self._admitting = []

    def _next_group(self) -> list[Ticket]:
        """Who comes in now, in the order they came. A prompt that is too long for a pass comes alone."""
        group: list[Ticket] = []
        longest = 0
        with self._wake:
            while self._waiting and len(group) + len(self._rows) < self._limits.rows:
                ticket = self._waiting[0]
                if ticket.cancelled:
                    self._tell(self._waiting.popleft(), _done(ticket, "cancelled", None))
                    continue
                self._look_up(ticket)
                longest = max(longest, len(ticket.request.prompt) - ticket.n_reused)
                if group and longest * (len(group) + 1) > self._limits.prefill_tokens:
                    break
                group.append(self._waiting.popleft())
            self._admitting = group
        return group

    def _bounded(self, group: list[Ticket]) -> list[Ticket]:
        """Of requests that could share a pass, as many as echo no more logits than may exist."""
        if not any(ticket.request.echo for ticket in group):
            return group
        width = max(len(ticket.request.prompt) for ticket in group)
        return group[: max(1, self._limits.echo_logits // (width * self._vocabulary))]

    def _look_up(self, ticket: Ticket) -> None:
        """Find how much of a prompt's pass is done. The last token is always computed: its logits are wanted."""
        if not ticket.looked and ticket.reusable:
            known = ticket.request.prompt[: min(ticket.reusable, len(ticket.request.prompt) - 1)]
            ticket.prefix, ticket.n_reused = self._prefixes.find(ticket.key, known)
            ticket.n_found = ticket.n_reused
        ticket.looked = True

    def _prefill_all(self, group: Sequence[Ticket]) -> None:
        try:
            if self._too_long(group[0]):
                self._prefill_piece(group[0])
            else:
                self._prefill(group)
        except Exception as error:
            if len(group) > 1 and not any(ticket.ids for ticket in group):
                for ticket in group:
                    self._prefill_all([ticket])
                return
            for ticket in group:  # one alone, or they have their first tokens: nothing may be said twice
                self._tell(ticket, error)
            if not len(self._rows) == len(self._decoding) == len(self._pool):
                self._end_rows(error)

    def _too_long(self, ticket: Ticket) -> bool:
        """Whether one pass's budget of tokens ends inside the part of the prompt that can be computed in pieces."""
        return ticket.n_reused + self._limits.prefill_tokens < min(ticket.reusable, len(ticket.request.prompt))

    def _prefill_piece(self, ticket: Ticket) -> None:
        """Compute a piece of a long prompt. The request then waits again, at the head of the queue."""
        tokens = ticket.request.prompt[: ticket.n_reused + self._limits.prefill_tokens]
        part = Part(tokens, ticket.request.plan, 0, ticket.prefix, ticket.n_reused)
        done = prefill(self._lm, self._saes_of, [part])
        ticket.prefix, ticket.n_reused = done.prefix(0, len(tokens)), len(tokens)
        with self._wake:
            self._waiting.appendleft(ticket)

    def _prefill(self, group: Sequence[Ticket]) -> None:
        """The prompts' pass of some requests, and their first tokens."""
        parts = [Part(t.request.prompt, t.request.plan, t.request.given, t.prefix, t.n_reused) for t in group]
        if any(ticket.request.echo for ticket in group):
            limit = self._limits.echo_logits
            done = echoed(self._lm, self._saes_of, group, parts, limit, self._vocabulary, self._text_of)
        else:
            done = prefill(self._lm, self._saes_of, parts)
        for row, ticket in enumerate(group):
            ticket.n_reused = done.reused[row]
            known = ticket.request.prompt[: ticket.reusable]
            if known and not self._prefixes.holds(ticket.key, known):
                self._prefixes.keep(ticket.key, done.prefix(row, len(known)))
        self._seat(group, done.seats, done.cache, done.logits[:, -1])

    def _seat(
        self, group: Sequence[Ticket], seats: Sequence[Seat], cache: Cache, logits: Float[Tensor, "rows vocab"]
    ) -> None:
        """Give each request its first token; those that go on join the batch."""
        silent = [i for i, ticket in enumerate(group) if ticket.request.sampling.max_tokens < 1]
        for i in silent:
            self._end_scored(group[i], seats[i])
        speaking = [i for i in range(len(group)) if i not in silent]
        if not speaking:
            return
        going_on = self._advance([group[i] for i in speaking], logits[speaking], lambda i: seats[speaking[i]].receipt())
        joining = [speaking[i] for i in going_on]
        self._decoding.join([seats[i] for i in joining])
        self._pool.join(cache, joining, [len(group[i].request.prompt) for i in joining])
        self._rows += [group[i] for i in joining]

    def _end_scored(self, ticket: Ticket, seat: Seat) -> None:
        """A request that generates nothing ends here, if its gate has nothing more to read."""
        if left := beginnings(ticket.request):
            self._rereading.append(Rereading(ticket, seat, left))
        else:
            self._tell(ticket, _done(ticket, "length", seat.receipt()))

    def _reread(self) -> None:
        """One pass for the first of those whose gates read on; then it is the next one's turn."""
        if not self._rereading:
            return
        reading = self._rereading[0]  # it counts as running meanwhile
        ended = self._read_on(reading)
        self._rereading.popleft()
        if ended is None:
            self._rereading.append(reading)
        else:
            self._tell(reading.ticket, ended)

    def _read_on(self, reading: Rereading) -> Item | None:
        """How a scored request has ended, if it has."""
        ticket, receipt = reading.ticket, reading.seat.receipt()
        if ticket.cancelled:
            return _done(ticket, "cancelled", receipt)
        try:
            over = reading.step(self._lm, self._saes_of, self._limits.prefill_tokens, self._text_of)
        except Exception as error:
            return error
        return _done(ticket, "length", receipt) if over else None

    # ---- decoding --------------------------------------------------------------------------------------------

    def _guarded_stretch(self) -> None:
        try:
            self._stretch()
        except Exception as error:
            self._end_rows(error)
        self._post()

    def _end_rows(self, error: Exception) -> None:
        """End the requests that decode, and begin with an empty batch."""
        for ticket in self._rows:
            self._tell(ticket, error)
        self._rows, self._pool, self._decoding = [], Pool(self._lm), Decoding(self._lm, self._saes_of)

    def _stretch(self) -> None:
        """Steps until a row leaves or somebody could come in."""
        with self._decoding.running():
            while True:
                logits = self._pool.decode([ticket.last for ticket in self._rows])
                going_on = self._advance(self._rows, logits, self._decoding.receipt)
                if len(going_on) < len(self._rows) or self._somebody_waits():
                    break
                self._post()
        self._keep(going_on)

    def _somebody_waits(self) -> bool:
        """Somebody to let in or out, looked at without the lock: what is missed now is seen after the next step."""
        return self._due() or self._closing or bool(self._rereading) or any(ticket.cancelled for ticket in self._rows)

    def _leave_cancelled(self) -> None:
        gone = {i for i, ticket in enumerate(self._rows) if ticket.cancelled}
        if gone:
            for i in gone:
                self._tell(self._rows[i], _done(self._rows[i], "cancelled", self._decoding.receipt(i)))
            self._keep([i for i in range(len(self._rows)) if i not in gone])

    def _keep(self, kept: Sequence[int]) -> None:
        """Rows that are over leave; the last rows fill their places."""
        n = len(kept)
        if n == len(self._rows):
            return
        stay = set(kept)
        movers = [i for i in kept if i >= n]
        order = [i if i in stay else movers.pop() for i in range(n)]
        self._pool.keep(order)
        self._decoding.keep_rows(torch.tensor(order, dtype=torch.long, device=self._lm.device))
        self._rows = [self._rows[i] for i in order]

    def _advance(
        self,
        tickets: Sequence[Ticket],
        logits: Float[Tensor, "rows vocab"],
        receipt_of: Callable[[int], Receipt | None],
    ) -> list[int]:
        """Give every request its next token. Returns which of them go on."""
        chosen = choose(logits, [ticket.drawing for ticket in tickets], [ticket.past for ticket in tickets])
        ids = [0 if token is None else token for token in chosen]
        n_top = [ticket.request.sampling.top_logprobs for ticket in tickets]
        tokens = describe(logits, ids, n_top, self._text_of)
        going_on: list[int] = []
        for i, (ticket, token) in enumerate(zip(tickets, tokens, strict=True)):
            if chosen[i] is None:
                self._tell(ticket, _broken(ticket))
            elif (reason := self._take(ticket, token)) is None:
                going_on.append(i)
            else:
                self._tell(ticket, ticket.text.finish())
                self._tell(ticket, _done(ticket, "stop" if ticket.text.stopped else reason, receipt_of(i)))
        return going_on

    def _take(self, ticket: Ticket, token: Token) -> Literal["stop", "length"] | None:
        """Add a token to a reply. Returns why the reply is over, if it is."""
        if token.id in self._lm.eos_ids:
            return "stop"
        ticket.ids.append(token.id)
        self._tell(ticket, ticket.text.push(token))
        if ticket.text.stopped:
            return "stop"
        full = len(ticket.request.prompt) + len(ticket.ids) >= self._context
        return "length" if full or len(ticket.ids) >= ticket.request.sampling.max_tokens else None

    def _text_of(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._lm.tokenizer.decode([token])
        return self._texts[token]


def _broken(ticket: Ticket) -> ClampdownError:
    """Logits that are no numbers: who asked for the plan asked for too much; without one the model is at fault."""
    if ticket.request.plan is None:
        return ModelError("the model's logits are not finite")
    return RequestError(
        "the plan pushes the model until its logits are not finite",
        hint="use a smaller strength",
        code="cannot_steer",
        param="steering",
    )


def _done(ticket: Ticket, reason: Literal["stop", "length", "cancelled"], receipt: Receipt | None) -> Done:
    n_prompt = len(ticket.request.prompt)
    n_reused = min(ticket.n_found, ticket.n_reused)
    return Done(reason, n_prompt, len(ticket.ids), receipt, ticket.prompt, n_reused, ticket.n_rescored)
