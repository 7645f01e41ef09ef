"""From the plans of a batch to the contents of fixed-shape buffers (`slots.py`), on the host.

1. Each row's scopes become intervals of its own positions, found from its prompt's token ids by the functions of
   `scopes.py`: one owner per scope, whatever executes it.
2. Each different (feature or vector, operator, scope) of the batch gets a slot. A slot stays where it is while any row
   uses it, so rows that come and go do not move those that stay.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from clampdown.activations.sinks import Sinks
from clampdown.errors import PlanError, ScopeError
from clampdown.models.chat import Batch
from clampdown.models.loading import LanguageModel
from clampdown.steering.operators import OPERATORS
from clampdown.steering.passes import trailing_padding
from clampdown.steering.plan import Gate, Plan
from clampdown.steering.program import checked_vector
from clampdown.steering.scopes import SCOPES, Window, last_run
from clampdown.steering.slots import FOREVER, POOLINGS, Cell, GateSlots, PromptMarks, SiteSlots
from clampdown.steering.windows import require_one_window

Rows = Sequence[Plan | None]
Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Interval:
    """Positions [low, high) of a row."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class _Wish:
    """What one row asks of one channel, before it has a slot. `channel` is a feature's index or a vector's values."""

    row: int
    channel: Hashable
    operator: str
    scope: str
    strength: float

    @property
    def key(self) -> tuple[Hashable, str, str]:
        return self.channel, self.operator, self.scope


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """One row's prompt: its padding, its tokens, its content positions, and the interval of each scope it uses."""

    pad: int
    ids: tuple[int, ...]
    content: tuple[bool, ...]
    scopes: Mapping[str, Interval]

    @property
    def length(self) -> int:
        return len(self.ids)


def prompt_spans(lm: LanguageModel, rows: Rows, prompts: Batch, *, one_window: bool = True) -> list[PromptSpan]:
    """Each row's intervals, for the edits of every branch. Raises `ScopeError` when a prompt lacks what a scope needs,
    or a scope is no interval; with `one_window` `PlanError` for a prompt that a gate would read in several."""
    ids, real = prompts.input_ids, prompts.attention_mask.bool()
    width = ids.shape[1]
    if trailing_padding(real, "a prompt") is not None:
        raise PlanError("a prompt ends in padding", hint="a prepared model takes prompts that are padded on the left")
    scopes = {edit.scope for plan in rows if plan is not None for edit in plan.all_edits}
    content = torch.zeros_like(real)
    if "last_user" in scopes or any(plan is not None and plan.gate for plan in rows):
        content = lm.chat.content_mask(ids, prompts.attention_mask)
    window = Window(
        columns=torch.arange(width + 1, device=ids.device)[None],
        real=torch.cat([real, torch.ones_like(real[:, :1])], dim=1),
        prompt_width=width,
        assistant_start=lm.chat.assistant_start(ids) if "assistant" in scopes else None,
        last_user=last_run(content) if "last_user" in scopes else None,
    )
    masks = {scope: SCOPES[scope](window).cpu() for scope in scopes}
    pads = (width - real.sum(1)).tolist()
    for plan, row, inside, pad in zip(rows, ids.tolist(), content.tolist(), pads, strict=True) if one_window else ():
        require_one_window(lm, plan, row[pad:], inside[pad:])
    return [
        PromptSpan(
            pad=pad,
            ids=tuple(ids[row, pad:].tolist()),
            content=tuple(content[row, pad:].tolist()),
            scopes={scope: _interval(mask[row, pad:], scope) for scope, mask in masks.items()},
        )
        for row, pad in enumerate(pads)
    ]


def _interval(mask: Bool[Tensor, " positions"], scope: str) -> Interval:
    """The run of True as [low, high); what holds for the first generated position holds for all of them."""
    inside = mask.nonzero().flatten().tolist()
    if not inside:
        return Interval(0, 0)
    low, high = inside[0], inside[-1] + 1
    if high - low != len(inside):
        raise ScopeError(f"scope '{scope}' is not one run of positions: a prepared model cannot follow it")
    return Interval(low, FOREVER if high == len(mask) else high)


class Seating:
    """Writes what the rows of a batch ask for into the buffers of a prepared model."""

    def __init__(
        self,
        lm: LanguageModel,
        sites: Mapping[str, SiteSlots],
        gates: Mapping[str, GateSlots],
        prompt: PromptMarks,
        sinks: Mapping[str, Sinks],
    ) -> None:
        self._lm = lm
        self._sites = sites
        self._gates = gates
        self._prompt = prompt
        self._sinks = sinks
        self._taken: dict[str, dict[Key, int]] = {}

    def clear(self) -> None:
        """Nobody asks for anything."""
        for part in (*self._sites.values(), *self._gates.values()):
            part.clear()

    def place(self, rows: Rows, prompts: Sequence[PromptSpan]) -> None:
        """Replace what all rows ask for. Raises `PlanError` when it does not fit the capacity."""
        self._refuse(rows)
        self._mark(prompts)
        for part in (self._sites, self._gates):
            for name, slots in part.items():
                self._limit(slots.limit, self._sinks[name], rows)
        for name, slots in self._sites.items():
            features, directions = _wishes(rows, name)
            cells = self._features(name, slots, features, prompts) + self._directions(name, slots, directions, prompts)
            slots.set_cells(cells)
        for name, gate in self._gates.items():
            gates = {r: p.gate for r, p in enumerate(rows) if p is not None and p.gate and p.gate.site == name}
            self._gate(name, gate, gates)

    @staticmethod
    def _limit(limit: Tensor, sinks: Sinks, rows: Rows) -> None:
        """How long a token may be that each row's plan reads and edits."""
        limit.fill_(math.inf)
        for row, plan in enumerate(rows):
            if plan is not None and plan.sinks == "leave_out":
                limit[row] = sinks.limit

    def _refuse(self, rows: Rows) -> None:
        for plan in (plan for plan in rows if plan is not None):
            kinds = {gate.kind for gate in plan.gates if gate.kind not in ("feature", "probe")}
            if kinds or plan.otherwise:
                raise PlanError(
                    "a prepared model reads gates on features at prefill only; this plan has "
                    + (f"a gate of kind '{kinds.pop()}'" if kinds else "a second branch"),
                    hint="use steer(...) on a model that is not compiled",
                )
        for gate in (plan.gate for plan in rows if plan is not None and plan.gate):
            if gate.full is not None:
                raise PlanError(
                    "a prepared model's gates open or stay shut; this plan's strength grows with its gate's score",
                    hint="use steer(...) on a model that is not compiled",
                )
            if gate.site not in self._gates:
                raise PlanError(
                    f"the plan's gate reads {gate.site}, where nothing was prepared to read",
                    hint="prepare(lm, saes, capacity=Capacity(...)) with gate_features > 0 and that site's SAE",
                )
        for edit in (edit for plan in rows if plan is not None for edit in plan.edits):
            if edit.site not in self._sites:
                raise PlanError(f"{edit.site} was not prepared", hint="name it in prepare(lm, saes, sites=[...])")
            if edit.error_term != "keep":
                raise PlanError(
                    f"a prepared model keeps the SAE's error term, this plan {edit.error_term}s it",
                    hint="use steer(...) on a model that is not compiled",
                )

    def _mark(self, prompts: Sequence[PromptSpan]) -> None:
        marks = self._prompt
        room = marks.is_content.shape[1]
        for row, found in enumerate(prompts):
            if any(found.content) and len(found.content) > room:
                raise PlanError(f"a gate has to read {found.length} tokens, the model was prepared for {room}")
            marks.pad[row], marks.length[row] = found.pad, found.length
            marks.is_content[row] = False
            known = torch.tensor(found.content[:room], dtype=torch.bool, device=marks.is_content.device)
            marks.is_content[row, : len(known)] = known
            marks.n_content[row] = sum(found.content)

    def _features(
        self, name: str, slots: SiteSlots, wishes: Sequence[_Wish], prompts: Sequence[PromptSpan]
    ) -> list[Cell]:
        slot_of, new = self._allot(f"features at {name}", [wish.key for wish in wishes], slots.n_features)
        for key in new:
            assert slots.features is not None, "without an SAE there is no room for features"
            slots.features.put(slot_of[key], key[0])
            slots.set_operator(slot_of[key], key[1])
        return _cells(wishes, slot_of, prompts, offset=0)

    def _directions(
        self, name: str, slots: SiteSlots, wishes: Sequence[_Wish], prompts: Sequence[PromptSpan]
    ) -> list[Cell]:
        room = slots.directions.shape[0]
        slot_of, new = self._allot(f"directions at {name}", [wish.key for wish in wishes], room)
        for key in new:
            vector = checked_vector(torch.tensor(key[0], device=slots.directions.device), self._lm.d_model)
            slots.directions[slot_of[key]] = vector / vector.norm() if OPERATORS[key[1]].unit_row else vector
            slots.set_operator(slots.n_features + slot_of[key], key[1])
        return _cells(wishes, slot_of, prompts, offset=slots.n_features)

    def _gate(self, name: str, slots: GateSlots, gates: Mapping[int, Gate]) -> None:
        wanted = [(feature,) for gate in gates.values() for feature in gate.features]
        slot_of, new = self._allot(f"gate features at {name}", wanted, slots.features.size)
        for key in new:
            slots.features.put(slot_of[key], key[0])
        for tensor in (slots.weights, slots.gated, slots.bias, slots.threshold):
            tensor.zero_()
        for row, gate in gates.items():
            slots.gated[row], slots.bias[row], slots.threshold[row] = True, gate.bias, gate.threshold
            for feature, pooling, weight in zip(gate.features, gate.poolings, gate.weights, strict=True):
                slots.weights[POOLINGS.index(pooling), row, slot_of[(feature,)]] += weight

    def _allot(self, what: str, keys: Sequence[Key], room: int) -> tuple[dict[Key, int], list[Key]]:
        """A slot for each key, and which keys are new there. Keys that nobody uses any more lose theirs."""
        before = self._taken.get(what, {})
        wanted = list(dict.fromkeys(keys))
        kept = {key: before[key] for key in wanted if key in before}
        free = [slot for slot in range(room) if slot not in kept.values()]
        new = [key for key in wanted if key not in kept]
        if len(new) > len(free):
            raise PlanError(
                f"{len(wanted)} {what} in one batch, the model was prepared for {room}",
                hint="prepare(lm, ..., capacity=Capacity(...)) with more room, or fewer different plans at once",
            )
        self._taken[what] = kept | dict(zip(new, free, strict=False))
        return self._taken[what], new


def _wishes(rows: Rows, site: str) -> tuple[list[_Wish], list[_Wish]]:
    """What all rows ask of a site's features, and of dense directions there."""
    features, directions = [], []
    for row, plan in enumerate(rows):
        for edit in plan.edits if plan is not None else ():
            if plan is None or edit.site != site:
                continue
            if OPERATORS[edit.operator].dense:
                channels: Sequence[Any] = [plan.vectors[edit.vector or ""]]
            else:
                channels = edit.features
            target = directions if OPERATORS[edit.operator].dense else features
            for channel, strength in zip(channels, edit.strengths, strict=True):
                target.append(_Wish(row, channel, edit.operator, edit.scope, strength))
    return features, directions


def _cells(
    wishes: Sequence[_Wish], slot_of: Mapping[Key, int], prompts: Sequence[PromptSpan], *, offset: int
) -> list[Cell]:
    if len({(wish.row, wish.key) for wish in wishes}) < len(wishes):
        raise PlanError("two edits of one plan have the same operator and scope and act on the same channel")
    found = []
    for wish in wishes:
        interval = prompts[wish.row].scopes[wish.scope]
        found.append(Cell(wish.row, offset + slot_of[wish.key], wish.strength, interval.low, interval.high))
    return found
