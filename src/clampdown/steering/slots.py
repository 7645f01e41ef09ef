"""Steering as tensors of fixed shape, for graphs that are traced once and then replayed.

A compiled model runs what its tensors hold, so all that a plan says must be in tensors that can be changed in place:

1. A *slot* is a channel (an SAE feature or a dense direction) with an operator and a scope. A site has a fixed number
   of slots; one that nobody uses reads and writes zeros.
2. A row has, per slot, a strength and an interval [low, high) of its own positions: every scope is such an interval.
   A row that did not ask has the empty interval.
3. Tokens look up their row: amount[token, slot] = operator(activation, strength[row, slot]) where the token's position
   lies in the row's interval, else an exact zero. A left-padded batch and a packed one are the same thing.

Nothing here branches on a tensor's value, moves one to the host or has a shape that depends on a plan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clampdown.saes.sae import FeatureSource, FeatureView
from clampdown.steering.operators import OPERATORS

FOREVER = 1 << 40
OPERATOR_NAMES = tuple(OPERATORS)

TokenResidual = Float[Tensor, "tokens 1 d_model"]


class Tokens(NamedTuple):
    """Which row each token of a pass belongs to, and its position in that row: negative on padding."""

    rows: Int[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]


@dataclass(frozen=True, slots=True)
class Cell:
    """What one row asks of one slot."""

    row: int
    slot: int
    strength: float
    low: int
    high: int


class FeatureSlots(nn.Module):
    """`size` features of one SAE, exchangeable in place.

    A top-k SAE has to read its whole encoder, which never changes: then only the choice among its features does.
    """

    chosen: Tensor

    def __init__(self, sae: FeatureSource, size: int) -> None:
        super().__init__()
        self.sae = sae
        self.size = size
        self.view = _zeros(sae.select([0]), size)
        self.whole = None if self.view.architecture.pointwise else sae.whole()
        self.register_buffer("chosen", torch.zeros(size, dtype=torch.long, device=self.view.b_dec.device))

    def put(self, slot: int, feature: int) -> None:
        """Make the slot read and write this feature."""
        found = self.sae.select([feature])
        self.chosen[slot] = feature
        self.view.directions[slot] = found.directions[0]
        if self.whole is None:
            self.view.encoder[:, slot] = found.encoder[:, 0]
            for name, vector in self.view.vectors.items():
                vector[slot] = found.vectors[name][0]

    def read(self, x: TokenResidual) -> Float[Tensor, "tokens 1 size"]:
        if self.whole is not None:
            return self.whole.encode(x).index_select(-1, self.chosen).float()
        return self.view.read(x)

    def write(self, amounts: Float[Tensor, "tokens 1 size"], x: TokenResidual) -> TokenResidual:
        return self.view.write(amounts, x)


def _zeros(view: FeatureView, size: int) -> FeatureView:
    """A view of `size` features in float32 that read and write zeros; `b_dec` keeps its values."""
    wide = view.to(dtype=torch.float32)
    return replace(
        wide,
        features=(0,) * size,
        directions=wide.directions.new_zeros(size, view.cfg.d_in),
        encoder=wide.encoder.new_zeros(view.cfg.d_in, size),
        vectors={name: vector.new_zeros(size) for name, vector in wide.vectors.items()},
    )


class SiteSlots(nn.Module):
    """All slots of one site: those of features first, then those of dense directions.

    `kinds[k, s]` says whether slot s has operator k; `strengths`, `low` and `high` are [rows, slots].
    """

    kinds: Tensor
    strengths: Tensor
    low: Tensor
    high: Tensor
    directions: Tensor
    limit: Tensor

    def __init__(
        self, sae: FeatureSource | None, *, d_model: int, rows: int, features: int, directions: int, device: str
    ) -> None:
        super().__init__()
        self.features = FeatureSlots(sae, features) if sae is not None and features else None
        self.n_features = features if self.features is not None else 0
        slots = self.n_features + directions
        for name, tensor in {
            "directions": torch.zeros(directions, d_model),
            "kinds": torch.zeros(len(OPERATOR_NAMES), slots, dtype=torch.bool),
            "strengths": torch.zeros(rows, slots),
            "low": torch.zeros(rows, slots, dtype=torch.long),
            "high": torch.zeros(rows, slots, dtype=torch.long),
            "limit": torch.full((rows,), torch.inf),
        }.items():
            self.register_buffer(name, tensor.to(device))

    def clear(self) -> None:
        """No row asks for anything: the identity."""
        for tensor in (self.strengths, self.low, self.high):
            tensor.zero_()

    def set_operator(self, slot: int, operator: str) -> None:
        self.kinds[:, slot] = False
        self.kinds[OPERATOR_NAMES.index(operator), slot] = True

    def set_cells(self, cells: list[Cell]) -> None:
        """Replace what all rows ask for."""
        strengths, low, high = (torch.zeros_like(t, device="cpu") for t in (self.strengths, self.low, self.high))
        for cell in cells:
            strengths[cell.row, cell.slot] = cell.strength
            low[cell.row, cell.slot], high[cell.row, cell.slot] = cell.low, cell.high
        self.strengths.copy_(strengths)
        self.low.copy_(low)
        self.high.copy_(high)

    def keep_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Row i becomes what row rows[i] was; the others ask for nothing."""
        for tensor in (self.strengths, self.low, self.high, self.limit):
            move_rows(tensor, rows)

    def delta(self, x: TokenResidual, tokens: Tokens, fired: Bool[Tensor, " rows"]) -> TokenResidual:
        """x' - x for tokens as rows, in float32."""
        parts = [x @ self.directions.T]
        if self.features is not None:
            parts.insert(0, self.features.read(x))
        activation = torch.cat(parts, dim=-1)
        amounts = self._amounts(activation, tokens, fired)
        total = amounts[..., self.n_features :] @ self.directions
        if self.features is not None:
            total = total + self.features.write(amounts[..., : self.n_features], x)
        return torch.where(_outside(x, tokens, self.limit).view(-1, 1, 1), total, 0.0)

    def _amounts(
        self, activation: Float[Tensor, "tokens 1 slots"], tokens: Tokens, fired: Bool[Tensor, " rows"]
    ) -> Float[Tensor, "tokens 1 slots"]:
        strength = self.strengths[tokens.rows].unsqueeze(1)
        position = tokens.positions.unsqueeze(1)
        inside = (position >= self.low[tokens.rows]) & (position < self.high[tokens.rows])
        inside = (inside & fired[tokens.rows].unsqueeze(1)).unsqueeze(1)
        amounts = torch.zeros_like(activation)
        for kind, name in zip(self.kinds.unbind(0), OPERATOR_NAMES, strict=True):
            amounts = torch.where(kind & inside, OPERATORS[name].coefficient(activation, strength), amounts)
        return amounts


def _outside(x: TokenResidual, tokens: Tokens, limit: Float[Tensor, " rows"]) -> Bool[Tensor, " tokens"]:
    """Which tokens are no attention sinks of rows that leave those out."""
    return torch.linalg.vector_norm(x, dim=-1).squeeze(1) <= limit[tokens.rows]


POOLINGS = ("max", "mean", "assistant_start")


class GateSlots(nn.Module):
    """Gates that read one site. `weights` is [poolings, rows, features]; a gate of another site leaves a row alone.

    Pooled values are kept per row between passes, so a prompt may come in pieces; a row starts over at its position 0.
    """

    weights: Tensor
    peak: Tensor
    total: Tensor
    start: Tensor
    gated: Tensor
    bias: Tensor
    threshold: Tensor
    limit: Tensor
    spared: Tensor

    def __init__(self, sae: FeatureSource, *, rows: int, features: int, device: str) -> None:
        super().__init__()
        self.features = FeatureSlots(sae, features)
        for name, tensor in {
            "weights": torch.zeros(len(POOLINGS), rows, features),
            **{pooled: torch.zeros(rows, features) for pooled in ("peak", "total", "start")},
            "gated": torch.zeros(rows, dtype=torch.bool),
            "bias": torch.zeros(rows),
            "threshold": torch.zeros(rows),
            "limit": torch.full((rows,), torch.inf),
            "spared": torch.zeros(rows),
        }.items():
            self.register_buffer(name, tensor.to(device))

    def clear(self) -> None:
        for tensor in (self.weights, self.peak, self.total, self.start, self.gated, self.bias, self.threshold):
            tensor.zero_()

    def keep_rows(self, rows: Int[Tensor, " kept"]) -> None:
        for tensor in (
            self.peak,
            self.total,
            self.start,
            self.gated,
            self.bias,
            self.threshold,
            self.limit,
            self.spared,
        ):
            move_rows(tensor, rows)
        for pooling in self.weights.unbind(0):
            move_rows(pooling, rows)

    def scores(
        self, x: TokenResidual, tokens: Tokens, prompt: PromptMarks, fresh: Bool[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """Each row's score from what has been read of its prompt so far."""
        activation = self.features.read(x).squeeze(1)
        content, outside = prompt.content(tokens), _outside(x, tokens, self.limit)
        self.spared.masked_fill_(fresh, 0.0)
        self.spared.index_add_(0, tokens.rows, (content & ~outside).float())
        content = (content & outside).unsqueeze(1)
        index = tokens.rows.unsqueeze(1).expand_as(activation)
        for pooled in (self.peak, self.total, self.start):
            pooled.masked_fill_(fresh.unsqueeze(1), 0.0)
        inside = torch.where(content, activation, 0.0)
        self.peak.scatter_reduce_(0, index, inside, "amax")
        self.total.index_add_(0, tokens.rows, inside)
        last = (tokens.positions == prompt.length[tokens.rows] - 1).unsqueeze(1)
        self.start.index_add_(0, tokens.rows, torch.where(last, activation, 0.0))
        counted = (prompt.n_content - self.spared).clamp(min=1).unsqueeze(1)
        pooled = (self.peak, self.total / counted, self.start)
        parts = [(weight * value).sum(-1) for weight, value in zip(self.weights.unbind(0), pooled, strict=True)]
        return torch.stack(parts).sum(0) + self.bias


class PromptMarks(nn.Module):
    """Where each row's prompt lies: its padding, its length, and which of its positions are message content."""

    pad: Tensor
    length: Tensor
    is_content: Tensor
    n_content: Tensor

    def __init__(self, rows: int, width: int, device: str) -> None:
        super().__init__()
        self.register_buffer("pad", torch.zeros(rows, dtype=torch.long, device=device))
        self.register_buffer("length", torch.zeros(rows, dtype=torch.long, device=device))
        self.register_buffer("is_content", torch.zeros(rows, width, dtype=torch.bool, device=device))
        self.register_buffer("n_content", torch.zeros(rows, dtype=torch.long, device=device))

    def content(self, tokens: Tokens) -> Bool[Tensor, " tokens"]:
        inside = (tokens.positions >= 0) & (tokens.positions < self.length[tokens.rows])
        position = tokens.positions.clamp(0, self.is_content.shape[1] - 1)
        return inside & self.is_content[tokens.rows, position]

    def keep_rows(self, rows: Int[Tensor, " kept"]) -> None:
        for tensor in (self.pad, self.length, self.is_content, self.n_content):
            move_rows(tensor, rows)


def move_rows(tensor: Tensor, rows: Int[Tensor, " kept"]) -> None:
    """In place: row i becomes what row rows[i] was, rows beyond become zero."""
    kept = tensor[rows]
    tensor.zero_()
    tensor[: len(rows)] = kept
