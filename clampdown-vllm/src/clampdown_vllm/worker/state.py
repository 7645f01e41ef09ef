"""The worker's side of steering: who is seated where, whose each token of a pass is, and what becomes of receipts.

A request keeps its seat from its first pass until it is finished, through preemption too: a gate that has decided keeps
its verdict, one that had not reads again from the prompt's beginning. Everything about a pass is said before it, in
buffers of fixed address; on a CPU the op also skips sites at which nobody in the pass is edited or read.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clampdown.steering.plan import Plan
from clampdown_vllm.book import Book
from clampdown_vllm.order import Order, within
from clampdown_vllm.worker.edits import SiteEdits, Where
from clampdown_vllm.worker.pools import SitePools
from clampdown_vllm.worker.tally import Sizes, Tally, mean_size

KEPT = 8192
"""Receipts of finished requests that nobody has asked for."""


def captured(device: str) -> bool:
    """Whether passes may be recorded once and played again, so that nothing may depend on who is in one."""
    return device != "cpu"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a runner knows of one request in a pass."""

    id: str
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Request:
    """What a runner knows of a request when it is seen first: its `extra_args`, and the ids of its prompt."""

    extra: Mapping[str, Any] | None
    prompt: Sequence[int]


@dataclass
class Seat:
    """One request's place. `next`: the first position that no pass has computed. `cached`: how many tokens came from
    the prefix cache. `late`: an armed gate decided when tokens it would have edited had gone by."""

    row: int
    order: Order
    plan: Plan | None
    cached: int
    prompt: Sequence[int]
    next: int = 0
    decided: bool = False
    late: bool = False
    fetched: bool = False
    recalled: bool = False
    remembered: int = 0
    keys: list[Hashable] | None = None
    reach: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def reading(self) -> bool:
        return self.order.mode in ("armed", "read") and not self.decided


@dataclass(frozen=True, slots=True)
class Capacity:
    """Rows, tokens of a pass, the longest request, and the size of a block of the prefix cache."""

    rows: int
    tokens: int
    longest: int
    block: int


class State:
    """Buffers, seats and receipts of one worker."""

    def __init__(
        self, book: Book, d_model: int, capacity: Capacity, positions: Tensor, device: str, always: bool | None = None
    ) -> None:
        self.book, self._capacity = book, capacity
        self.always = captured(device) if always is None else always
        n, plans = capacity.rows + 1, list(book.plans.values())  # the last row is nobody's
        edited = [s for s in book.sites if any(e.site == s for p in plans for e in p.all_edits)]
        self.edits = {s: SiteEdits(s, plans, book.saes.get(s), d_model, n, device) for s in edited}
        self.kernels = {s: slots.kernel() for s, slots in self.edits.items()} if self.always else {}
        gates = {s: [g for p in plans for g in p.gates if g.site == s] for s in book.sites}
        self.pools = {s: SitePools(g, book.saes.get(s), d_model, n, device) for s, g in gates.items() if g}
        self.gated = any(p.gates for p in plans)
        self.nobody = capacity.rows
        self.rows = torch.full((capacity.tokens,), self.nobody, device=device)
        self.content, self.last = (torch.zeros(capacity.tokens, dtype=torch.bool, device=device) for _ in range(2))
        self.positions = positions
        self.open_, self.deciding = (torch.zeros(n, dtype=torch.bool, device=device) for _ in range(2))
        self.sizes = Sizes(book.sites, capacity.tokens, device)
        self.tally = Tally(self.sizes, positions, n, capacity.longest)
        self.limits = dict.fromkeys(book.sites, math.inf)
        self.editing, self.reading, self.measuring = set[str](), False, False
        self._seats: dict[str, Seat] = {}
        self._unsteered: set[str] = set()
        self._free = list(range(capacity.rows))
        self._done: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._pass: np.ndarray | None = None
        self._dirty = True

    # ---- between passes --------------------------------------------------------------------------------------

    def leave(self, ids: Iterable[str]) -> None:
        """These requests are finished, or gone."""
        self._made()
        for id_ in ids:
            self._unsteered.discard(id_)
            if (seat := self._seats.get(id_)) is not None:
                self._remember(seat)
                if not seat.fetched:
                    self._done[seat.order.id] = self._keep(seat)
                del self._seats[id_]
                self._free.append(seat.row)
        while len(self._done) > KEPT:
            self._done.popitem(last=False)

    def step(self, asked: Sequence[Asked], look: Callable[[str], Request | None]) -> None:
        """Say whose each token of the coming pass is. `look` finds a request that has no seat yet."""
        self._made()
        seats = [self._seat(each, look) for each in asked]
        if not any(seats):
            self.rest()
            return
        counts = [each.count for each in asked]
        rows = np.repeat([-1 if seat is None else seat.row for seat in seats], counts).astype(np.int64)
        self._begin(rows, asked, seats)
        for each, seat in zip(asked, seats, strict=True):
            if seat is not None:
                seat.next = each.start + each.count
                seat.decided |= seat.next >= seat.order.length
        self._pass = rows

    def rest(self) -> None:
        """The coming pass is nobody's."""
        self._made()
        self.editing, self.reading, self.measuring = set(), False, False
        if self._dirty:
            self.rows.fill_(self.nobody)
            self.content.zero_()
            self.last.zero_()
            self.deciding.zero_()
            self._dirty = False

    def _made(self) -> None:
        if self._pass is not None:
            self.tally.made(self._pass)
            self._pass = None

    def _seat(self, each: Asked, look: Callable[[str], Request | None]) -> Seat | None:
        if each.id in self._unsteered:
            return None
        seat = self._seats.get(each.id)
        if seat is None:
            found = look(each.id)
            order = Order.of(found.extra) if found is not None else None
            if order is None or found is None:
                self._unsteered.add(each.id)
                return None
            return self._sit(each, order, found.prompt)
        if each.start < seat.next and seat.reading:
            for pool in self.pools.values():
                pool.forget(seat.row)  # preempted before its gates had read all: they begin again
        return seat

    def _sit(self, each: Asked, order: Order, prompt: Sequence[int]) -> Seat:
        row = self._free.pop()
        plan = self.book.plans.get(order.plan)
        acts = order.mode in ("act", "armed")
        edits = list(zip(plan.branches[order.branch], order.reach, strict=True)) if plan is not None and acts else []
        reach = {}
        for site, slots in self.edits.items():
            own = [pair for pair in edits if pair[0].site == site]
            if plan is not None:
                slots.write_row(row, plan, own, self._limit(plan, site))
            reach[site] = (min((r[0] for _, r in own), default=0), max((r[1] for _, r in own), default=0))
        seat = Seat(row, order, plan, each.start, prompt, reach=reach)
        n_content = sum(stop - start for start, stop in order.content)
        for site, pool in self.pools.items():
            gate = plan.gate if plan is not None and order.mode == "armed" else None
            armed = gate if gate is not None and gate.site == site else None
            pool.start(row, n_content, self._limit(plan, site) if plan else math.inf, armed)
        self.open_[row] = order.mode == "act"
        self.tally.start(row, order.mode == "measure")
        self._seats[each.id] = seat
        return seat

    def _limit(self, plan: Plan, site: str) -> float:
        return self.limits[site] if plan.sinks == "leave_out" else math.inf

    def _begin(self, rows: np.ndarray, asked: Sequence[Asked], seats: Sequence[Seat | None]) -> None:
        n = len(rows)
        self.rows.fill_(self.nobody)
        self.rows[:n].copy_(torch.from_numpy(np.where(rows < 0, self.nobody, rows)))
        self._dirty = True
        pairs = [(each, seat) for each, seat in zip(asked, seats, strict=True) if seat is not None]
        self.editing = {s for s in self.edits if any(_touches(each, seat.reach[s]) for each, seat in pairs)}
        self.measuring = any(seat.order.mode == "measure" for _, seat in pairs)
        self._mark(asked, seats)
        self.sizes.begin(n, [self.always or self.measuring or site in self.editing for site in self.sizes.at])

    def _mark(self, asked: Sequence[Asked], seats: Sequence[Seat | None]) -> None:
        """Which tokens gates read in this pass, and which rows decide in it."""
        self.reading = any(seat is not None and seat.reading for seat in seats)
        if not self.gated:
            return
        content = np.zeros(sum(each.count for each in asked), dtype=bool)
        last, deciding, at = content.copy(), [], 0
        for each, seat in zip(asked, seats, strict=True):
            if seat is not None and seat.reading:
                for low, high in seat.order.content:
                    content[at + max(low - each.start, 0) : at + max(min(high - each.start, each.count), 0)] = True
                end = seat.order.length - 1 - each.start
                if 0 <= end < each.count:
                    last[at + end] = True
                    if seat.order.mode == "armed":
                        seat.late = any(low < min(each.start, high) for low, high in seat.order.reach)
                        deciding += [] if seat.late else [seat.row]
            at += each.count
        self.content.zero_()
        self.last.zero_()
        self.content[: len(content)].copy_(torch.from_numpy(content))
        self.last[: len(last)].copy_(torch.from_numpy(last))
        self.deciding.zero_()
        if deciding:
            self.deciding[deciding] = True

    # ---- in the pass -----------------------------------------------------------------------------------------

    def act(self, site: str, hidden: Tensor, residual: Tensor | None) -> None:
        """In place: hidden += x'-x at every token that somebody edits here, where x is hidden + residual."""
        edits = site in self.edits and (self.always or site in self.editing)
        reads = site in self.pools and (self.always or self.reading)
        if not (edits or reads or self.measuring):
            return
        n = hidden.shape[0]
        where = Where(self.rows[:n], self.positions[:n], self.open_ if self.gated else None)
        kernel = self.kernels.get(site)
        if kernel is not None and not reads:
            kernel.edit(hidden, residual, *where, self.edits[site].limit, *self.sizes.of(site, n))
            return
        x = (hidden if residual is None else hidden + residual).float()
        length = torch.linalg.vector_norm(x, dim=-1)
        if reads:
            pool = self.pools[site]
            pool.read(x, length, where.rows, self.content[:n], self.last[:n])
            pool.decide(self.open_, self.deciding)
        if kernel is not None:
            kernel.edit(hidden, residual, *where, self.edits[site].limit, *self.sizes.of(site, n))
        elif edits:
            delta = self.edits[site].delta(x, length, where, always=self.always).to(hidden.dtype)
            self.sizes.write(site, delta, length)
            hidden.add_(delta)
        elif self.measuring or self.always:
            self.sizes.write(site, torch.zeros_like(hidden), length)

    # ---- what was done ---------------------------------------------------------------------------------------

    def receipts(self, ends: Mapping[str, int | None]) -> dict[str, dict[str, Any] | None]:
        """By id, what was done before position `end` (None: so far). None for an id that is not known."""
        self._made()
        live = {seat.order.id: seat for seat in self._seats.values()}
        found: dict[str, dict[str, Any] | None] = {}
        for id_, end in ends.items():
            kept = self._keep(live[id_]) if id_ in live else self._done.get(id_)
            found[id_] = kept and _cut(kept, end)
        return found

    def forget(self, ids: Iterable[str]) -> None:
        """These receipts have been fetched."""
        over = set(ids)
        for id_ in over:
            self._done.pop(id_, None)
        for seat in self._seats.values():
            seat.fetched |= seat.order.id in over

    def _keep(self, seat: Seat) -> dict[str, Any]:
        """Everything about a seat that its row will not hold for long."""
        self.tally.settle()
        if seat.cached and seat.order.mode == "act" and not seat.recalled:
            self._recall(seat)
        order, row = seat.order, seat.row
        found: dict[str, Any] = {
            "mode": order.mode,
            "fired": bool(self.open_[row]),
            "decided": seat.decided,
            "late": seat.late,
            "cached": seat.cached,
            "missed": row in self.tally.missed,
            "next": seat.next,
            "length": order.length,
            "reach": order.reach,
        }
        if order.mode == "measure":
            found["lengths"] = {s: self.tally.lengths[row][i, : seat.next].tolist() for s, i in self.sizes.at.items()}
        if order.mode in ("read", "armed") and seat.decided and seat.plan is not None:
            found["scores"] = {b: self._score(seat, b) for b in order.branches}
        changed = self.tally.changed[row, : seat.next].copy()
        return {**found, "_changed": changed, "_norm": self.tally.norm[row, : seat.next].copy()}

    def _score(self, seat: Seat, branch: int) -> float:
        """Of a gate that decided here the very number that it decided by."""
        assert seat.plan is not None, "only plans have gates"
        gate = seat.plan.gates[branch]
        pool = self.pools[gate.site]
        if seat.order.mode == "armed" and not seat.late:
            return float(pool.score[seat.row])
        return pool.score_of(seat.row, gate, seat.plan.vectors)

    def _keys(self, seat: Seat) -> list[Hashable]:
        """What makes the prompt's full blocks what they are: all ids so far, and what is done to them."""
        if seat.keys is None:
            size, order, before = self._capacity.block, seat.order, 0
            seat.keys = []
            for start in range(0, len(seat.prompt) - size + 1, size):
                cut = within(order.reach, start, start + size)
                before = hash((before, tuple(seat.prompt[start : start + size]), cut))
                seat.keys.append((order.digest, order.branch, before))
        return seat.keys

    def _remember(self, seat: Seat) -> None:
        """Of the prompt's blocks that have been computed, for those who found them in the cache."""
        size = self._capacity.block
        end = min(seat.next, seat.order.length) // size
        first = max(seat.remembered, 0 if seat.recalled else seat.cached // size)
        if seat.order.mode == "act" and first < end:
            self.tally.remember(seat.row, self._keys(seat)[:end], size, first)
            seat.remembered = end

    def _recall(self, seat: Seat) -> None:
        """What was done to tokens that came from the cache: by requests that are gone, or still here, some in the very
        pass that this one began with. Of blocks that are not known, edits count as made, their size as unknown."""
        for other in self._seats.values():
            if other is not seat:
                self._remember(other)
        size = self._capacity.block
        keys = self._keys(seat)[: seat.cached // size]
        unknown = [(block * size, (block + 1) * size) for block in self.tally.recall(seat.row, keys, size)]
        for start, end in [*unknown, (len(keys) * size, seat.cached)]:
            for _, low, high in within(seat.order.reach, start, end):
                self.tally.unmeasured(seat.row, start + low, start + high)
        seat.recalled = True


def _touches(each: Asked, reach: tuple[int, int]) -> bool:
    return each.start < reach[1] and each.start + each.count > reach[0]


def _cut(kept: Mapping[str, Any], end: int | None) -> dict[str, Any]:
    changed, norm = kept["_changed"][:end], kept["_norm"][:end]
    covered = {p for low, high in kept["reach"] for p in range(low, min(high, kept["cached"]))}
    return {
        **{key: value for key, value in kept.items() if not key.startswith("_")},
        "touched": int(changed.sum()),
        "norm": mean_size(changed, norm) * int(changed.sum()),
        "reused": len(covered) if kept["mode"] == "act" else 0,
    }
