"""Steering of rows that only decode: they come from prompts' passes made elsewhere, and leave one by one.

1. A prompt's pass runs inside `steer`. `Steering.seats()` then says per row which branch acts and what was counted.
2. From there on nothing about a row changes from token to token: per edit a strength, times 1 if its scope covers
   generated tokens and its branch fired, else 0. Rows that join or leave only change which rows of a table are used.
3. The table has a row per distinct plan, and is made anew when a plan comes that it does not hold. Plans whose features
   index into different SAEs of one site lie in different tables: one row is exactly zero in all but its own.

The arithmetic is that of `program.py` and `fused.py`; this module only decides which rows it is done for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clampdown.errors import PlanError, SteeringNotAppliedError
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import FeatureSource
from clampdown.steering.fused import Step, decoding_step
from clampdown.steering.hook_order import attach_in_order
from clampdown.steering.ownership import owning, steers_here
from clampdown.steering.plan import Plan
from clampdown.steering.program import Reach, SiteProgram, site_programs
from clampdown.steering.receipts import Seat
from clampdown.steering.scopes import covers_generated
from clampdown.steering.tally import FLUSH_EVERY, Change, Tally
from clampdown.types import Receipt, Site

_REMEMBERED = 1024  # plans whose digests are kept
SaesOf = Callable[[Plan], Sequence[FeatureSource]]


@dataclass(frozen=True, slots=True)
class _Part:
    """One site's program for the rows that are seated now, and its fused form if it has one."""

    program: SiteProgram
    weights: Mapping[Reach, Float[Tensor, "rows 1"]]
    step: Step | None

    def apply(self, x: Float[Tensor, "rows 1 d_model"]) -> Tensor | None:
        if self.step is not None and x.dtype is torch.float32:
            return self.step(x)
        return x + self.program.delta(x, self.weights)


class Decoding:
    """The rows of a batch that decodes for as long as its owner lives. `running()` puts its hooks on the model.

    `saes_of` gives the SAEs of a plan, which must be the same objects for plans that name the same SAEs.
    """

    def __init__(self, lm: LanguageModel, saes_of: SaesOf) -> None:
        self._lm = lm
        self._saes_of = saes_of
        self._key = id(lm.layout.decoder)
        self._seats: list[Seat] = []
        self._digests: dict[int, tuple[Plan, str]] = {}
        self._row_of: dict[str, int] = {}
        self._table: list[SiteProgram] = []
        self._parts: dict[str, list[_Part]] = {}
        self._tally = Tally.empty(0, lm.device)
        self._step = 0
        self._touched, self._norm = torch.zeros(2, 0, device=lm.device)
        self._visited: set[str] = set()

    def __len__(self) -> int:
        return len(self._seats)

    # ---- rows that come and go -------------------------------------------------------------------------------

    def join(self, seats: Sequence[Seat]) -> None:
        """These rows follow the ones that are there. Raises `PlanError` for a gate that reads replies: here none is."""
        counted = self._counted()
        self._seats += seats
        self._count_on(*(torch.nn.functional.pad(column, (0, len(seats))) for column in counted))
        plans = {self._digest(seat.plan): seat.plan for seat in self._seats if seat.plan is not None}
        if set(plans) - set(self._row_of):
            self._make_table(plans)
        self._place()

    def keep_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """The batch goes on with these of its rows: row i now is what row rows[i] was."""
        touched, norm = self._counted()
        self._seats = [self._seats[row] for row in rows.tolist()]
        self._count_on(touched[rows], norm[rows])
        self._place()

    def receipt(self, row: int) -> Receipt | None:
        """Of a row's prompt and all that it has generated; None for a row without a plan."""
        if self._seats[row].plan is None:
            return None
        touched, norm = self._counted()
        return self._seats[row].receipt(float(touched[row]), float(norm[row]))

    def _counted(self) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
        self._tally.flush(torch.arange(len(self._seats), device=self._lm.device))
        touched, norm = self._tally.totals()
        self._count_on(self._touched + touched, self._norm + norm)
        return self._touched, self._norm

    def _count_on(self, touched: Float[Tensor, " rows"], norm: Float[Tensor, " rows"]) -> None:
        """From what was counted so far. A step is a column: what several sites do to its tokens is one change."""
        self._touched, self._norm, self._step = touched, norm, 0
        self._tally = Tally.empty(len(self._seats), self._lm.device)

    def _digest(self, plan: Plan) -> str:
        """The plan's digest, computed once per plan: it hashes the whole plan."""
        if id(plan) not in self._digests:
            if len(self._digests) >= _REMEMBERED:
                self._digests.clear()
            self._digests[id(plan)] = (plan, plan.digest)
        return self._digests[id(plan)][1]

    def _make_table(self, plans: Mapping[str, Plan]) -> None:
        """Programs with one row per distinct plan in use, and one last row of zeros for rows without a plan."""
        self._row_of = {digest: row for row, digest in enumerate(plans)}
        self._table = []
        for members, saes in self._families(plans):
            rows = [plan if digest in members else None for digest, plan in plans.items()]
            self._table += site_programs([*rows, None], self._lm, saes)

    def _families(self, plans: Mapping[str, Plan]) -> list[tuple[set[str], dict[str, FeatureSource]]]:
        """Plans that agree on the SAE of every site that they share."""
        families: list[tuple[set[str], dict[str, FeatureSource]]] = []
        for digest, plan in plans.items():
            saes = {sae.cfg.site.name: sae for sae in self._saes_of(plan)}
            for members, known in families:
                if all(known.get(site, sae) is sae for site, sae in saes.items()):
                    members.add(digest)
                    known |= saes
                    break
            else:
                families.append(({digest}, saes))
        return families

    def _place(self) -> None:
        """What each site does to the rows as they are now."""
        none = len(self._row_of)
        at = [none if seat.plan is None else self._row_of[self._digest(seat.plan)] for seat in self._seats]
        rows = torch.tensor(at, dtype=torch.long, device=self._lm.device)
        acts = torch.tensor([seat.acts for seat in self._seats], dtype=torch.float32, device=self._lm.device)
        self._parts = {program.site.name: [] for program in self._table}
        for whole in self._table if self._seats else ():
            program = whole.at(rows)
            weights = {r: acts[:, r.branch, None] * covers_generated(r.scope) for r in program.reaches}
            self._parts[program.site.name].append(_Part(program, weights, decoding_step(program, weights)))

    # ---- hooks -----------------------------------------------------------------------------------------------

    @contextmanager
    def running(self) -> Iterator[None]:
        """Forward passes of this context inside the block compute one token of every row. No rows may join or leave."""
        with owning(self._key, self, self._attach):
            yield

    def _attach(self) -> list[Any]:
        decoder: nn.Module = self._lm.layout.decoder
        handles: list[Any] = [
            decoder.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            decoder.register_forward_hook(self._after_pass),
        ]
        hooks = [(Site.parse(site), partial(self._edit, site)) for site in self._parts]
        return handles + attach_in_order(self._lm, hooks)

    def _before_pass(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not steers_here(self._key, self):
            return
        ids: Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if tuple(ids.shape) != (len(self._seats), 1):
            raise PlanError(f"a pass of shape {tuple(ids.shape)}, but {len(self._seats)} rows decode one token each")
        self._visited.clear()
        if len(self._tally.pending) >= FLUSH_EVERY:
            self._counted()
        self._step += 1

    def _edit(self, site: str, x: Float[Tensor, "rows 1 d_model"]) -> Tensor | None:
        if not steers_here(self._key, self):
            return None
        self._visited.add(site)
        changed = x
        for part in self._parts[site]:
            step = part.apply(changed)
            changed = changed if step is None else step
        if changed is x:
            return None
        self._tally.pending.append(Change(self._step, changed, x))
        return changed

    def _after_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        if len(self._visited) < len(self._parts) and steers_here(self._key, self):
            missed = ", ".join(sorted(set(self._parts) - self._visited))
            raise SteeringNotAppliedError(f"the model ran, but nothing happened at {missed}")
