"""The edits of one site as tables of fixed address: a row per request, a slot per channel, operator and scope.

1. Plans are registered when the server starts, so every channel has a place for good and nothing is allotted while
   serving. To seat a request is to write one row.
2. Most operators are lines in the activation, so a cell holds slope, offset and the interval [low, high) of the row's
   positions; a row that asks for nothing has the empty interval. The others are computed only if a plan uses them.
3. x' = x + amounts @ directions, every activation read from the unedited x. Tokens without a cell get exact zeros.

Nothing here looks at a tensor's value: the same kernels run whoever is seated, as a captured graph needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clampdown.saes.sae import FeatureSource, FeatureView, Sae
from clampdown.steering.fused import Reader, reader_of
from clampdown.steering.operators import OPERATORS, Coefficient
from clampdown.steering.plan import Edit, Plan
from clampdown.steering.program import Directions, View, checked_vector
from clampdown_vllm.worker.kernel import MOST_SLOTS, Kernel, possible

Read = Callable[[Tensor], Tensor]
"""Residuals [tokens, d_model] to the activations of channels [tokens, channels]."""

Key = tuple[Any, str, str]
"""Channel (a feature, or a vector's values), operator, scope."""

Hidden = Float[Tensor, "tokens d_model"]
Rows = Int[Tensor, " tokens"]
SLOPE, OFFSET, LOW, HIGH = range(4)


class Where(NamedTuple):
    """Whose each token of a pass is, and its position there. `open_`: per row, whether its edits may act."""

    rows: Rows
    positions: Int[Tensor, " tokens"]
    open_: Bool[Tensor, " rows"] | None


@dataclass(frozen=True, slots=True)
class _Bent:
    """The slots of an operator that is no line, with the strengths of each row."""

    coefficient: Coefficient
    at: tuple[int, ...]
    slots: Int[Tensor, " bent"]
    strengths: Float[Tensor, "rows bent"]


class Bank:
    """All channels that are read in one way (an SAE's features, or directions), and what rows ask of them.

    `at`: the channel of each key's slot."""

    def __init__(self, view: View, keys: Sequence[Key], at: Sequence[int], rows: int, device: str) -> None:
        self.view, self.keys, self._at = view, {key: slot for slot, key in enumerate(keys)}, tuple(at)
        self._read = reads_of(view)
        self._channel_of = None if list(at) == list(range(len(keys))) else torch.tensor(at, device=device)
        self._n_channels = max(at) + 1
        self.table = torch.zeros(rows, 4, len(keys), device=device)
        bent = {name: tuple(i for i, key in enumerate(keys) if key[1] == name) for name in OPERATORS}
        self._bent = [
            _Bent(
                OPERATORS[name].coefficient,
                at,
                torch.tensor(at, device=device),
                torch.zeros(rows, len(at), device=device),
            )
            for name, at in bent.items()
            if at and OPERATORS[name].line is None
        ]

    def write_row(self, row: int, cells: Sequence[tuple[Key, float, tuple[int, int]]]) -> None:
        """What one row asks: (key, strength, interval). It asks for nothing else."""
        new = torch.zeros(self.table.shape[1:])
        strengths = torch.zeros(self.table.shape[2])
        for key, strength, (low, high) in cells:
            slot, line = self.keys[key], OPERATORS[key[1]].line
            if line is not None:
                new[SLOPE, slot], new[OFFSET, slot] = line(torch.tensor(strength))
            new[LOW, slot], new[HIGH, slot] = low, high
            strengths[slot] = strength
        self.table[row] = new.to(self.table.device)
        for bent in self._bent:
            bent.strengths[row] = strengths[list(bent.at)].to(self.table.device)

    def kernel(self) -> Kernel | None:
        """All of this in one kernel; None where some operator is no line, or the view has no reader."""
        reader = reader_of(self.view)
        if reader is None or self._bent or len(self._at) > MOST_SLOTS:
            return None
        return _kernel(reader, self.view, list(self._at), self.table)

    def delta(self, x: Hidden, where: Where) -> Hidden:
        """What the rows' edits add to each token."""
        activation = self._read(x)
        if self._channel_of is not None:
            activation = activation.index_select(1, self._channel_of)
        slope, offset, low, high = self.table.index_select(0, where.rows).unbind(1)
        position = where.positions.unsqueeze(1)
        inside = (position >= low) & (position < high)
        if where.open_ is not None:
            inside &= where.open_.index_select(0, where.rows).unsqueeze(1)
        amounts = torch.addcmul(offset, slope, activation)
        for bent in self._bent:
            strength = bent.strengths.index_select(0, where.rows)
            amounts[:, bent.slots] = bent.coefficient(
                activation[:, bent.slots].unsqueeze(1), strength.unsqueeze(1)
            ).squeeze(1)
        amounts = torch.where(inside, amounts, 0.0)
        if self._channel_of is not None:
            total = amounts.new_zeros(x.shape[0], self._n_channels)
            amounts = total.index_add_(1, self._channel_of, amounts)
        return self.view.write(amounts.unsqueeze(1), x.unsqueeze(1)).squeeze(1)


def reads_of(view: View) -> Read:
    """The fused way to read where there is one: the decoder's bias folded into the encoder's."""
    fused = reader_of(view)
    if fused is not None:
        return fused.read
    return lambda x: view.read(x.unsqueeze(1)).squeeze(1).float()


def _kernel(reader: Reader, view: View, at: list[int], table: Float[Tensor, "rows 4 slots"]) -> Kernel:
    assert isinstance(view, Directions | FeatureView), "every view with a reader is one of the two kinds"
    directions = view.rows if isinstance(view, Directions) else view.directions
    encoder = reader.encoder[:, at].contiguous()
    bias = torch.zeros_like(encoder[0]) if reader.bias is None else reader.bias[at].contiguous()
    threshold = None if reader.threshold is None else reader.threshold[at].contiguous()
    return Kernel(encoder, bias, threshold, directions[at].contiguous(), table)


class Drop:
    """Edits that drop the SAE's error term: where one reaches, x becomes its reconstruction before the deltas."""

    def __init__(self, sae: Sae, most: int, rows: int, device: str) -> None:
        self._sae = sae.to(device, torch.float32)
        self.reach = torch.zeros(rows, 2, most, device=device)

    def write_row(self, row: int, intervals: Sequence[tuple[int, int]]) -> None:
        new = torch.zeros(self.reach.shape[1:])
        for i, interval in enumerate(intervals):
            new[:, i] = torch.tensor(interval)
        self.reach[row] = new.to(self.reach.device)

    def delta(self, x: Hidden, where: Where) -> Hidden:
        low, high = self.reach.index_select(0, where.rows).unbind(1)
        position = where.positions.unsqueeze(1)
        inside = ((position >= low) & (position < high)).any(1)
        if where.open_ is not None:
            inside &= where.open_.index_select(0, where.rows)
        return torch.where(inside.unsqueeze(1), self._sae.reconstruct(x) - x, 0.0)


class SiteEdits:
    """Everything that plans do at one site. `limit`: per row, how long a token may be that is no attention sink."""

    def __init__(
        self, site: str, plans: Sequence[Plan], sae: FeatureSource | None, d_model: int, rows: int, device: str
    ) -> None:
        self.site = site
        edits = [(plan, edit) for plan in plans for edit in plan.all_edits if edit.site == site]
        self._features = _feature_bank([e for _, e in edits if e.features], sae, rows, device)
        self._directions = _direction_bank([pair for pair in edits if pair[1].vector], d_model, rows, device)
        dropping = max((_dropping(edits) for plan in plans for edits in plan.branches), default=0)
        self._drop = Drop(sae.whole(), dropping, rows, device) if dropping and sae is not None else None
        self.limit = torch.full((rows,), math.inf, device=device)
        self.any_limit = False

    @property
    def _parts(self) -> list[Bank | Drop]:
        return [part for part in (self._features, self._directions, self._drop) if part is not None]

    def kernel(self) -> Kernel | None:
        """Everything here in one kernel, where it is one bank of lines and Triton is there."""
        (first, *others) = self._parts
        return first.kernel() if possible() and isinstance(first, Bank) and not others else None

    def write_row(self, row: int, plan: Plan, edits: Sequence[tuple[Edit, tuple[int, int]]], limit: float) -> None:
        """One row's edits at this site, each with its interval."""
        if self._features is not None:
            self._features.write_row(
                row,
                [
                    ((feature, edit.operator, edit.scope), strength, reach)
                    for edit, reach in edits
                    for feature, strength in zip(edit.features, edit.strengths, strict=False)
                    if edit.features
                ],
            )
        if self._directions is not None:
            self._directions.write_row(
                row,
                [
                    ((plan.vectors[edit.vector], edit.operator, edit.scope), edit.strengths[0], reach)
                    for edit, reach in edits
                    if edit.vector
                ],
            )
        if self._drop is not None:
            self._drop.write_row(row, [reach for edit, reach in edits if edit.error_term == "drop"])
        self.limit[row] = limit
        self.any_limit |= limit < math.inf

    def delta(self, x: Hidden, length: Float[Tensor, " tokens"], where: Where, *, always: bool) -> Hidden:
        """x' - x. `always`: also ask about sinks where no row ever did, for graphs that are captured once."""
        parts = self._parts
        total = parts[0].delta(x, where)
        for part in parts[1:]:
            total = total + part.delta(x, where)
        if always or self.any_limit:
            total = torch.where((length <= self.limit.index_select(0, where.rows)).unsqueeze(1), total, 0.0)
        return total


def _dropping(edits: Sequence[Edit]) -> int:
    return sum(edit.error_term == "drop" for edit in edits)


def _feature_bank(edits: Sequence[Edit], sae: FeatureSource | None, rows: int, device: str) -> Bank | None:
    if not edits or sae is None:
        return None
    keys = dict.fromkeys((f, edit.operator, edit.scope) for edit in edits for f in edit.features)
    channels = tuple(dict.fromkeys(key[0] for key in keys))
    view: FeatureView = sae.select(channels).to(device, torch.float32)
    return Bank(view, tuple(keys), [channels.index(key[0]) for key in keys], rows, device)


def _direction_bank(edits: Sequence[tuple[Plan, Edit]], d_model: int, rows: int, device: str) -> Bank | None:
    """Vectors that an operator scales to length one are channels of their own."""
    if not edits:
        return None
    keys = dict.fromkeys((p.vectors[e.vector or ""], e.operator, e.scope) for p, e in edits)
    vectors = []
    for values, operator, _ in keys:
        vector = checked_vector(torch.tensor(values), d_model)
        vectors.append(vector / vector.norm() if OPERATORS[operator].unit_row else vector)
    view = Directions(torch.stack(vectors).to(device))
    return Bank(view, tuple(keys), range(len(keys)), rows, device)
