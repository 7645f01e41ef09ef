"""What gates pool of a prompt at one site, per row, over as many passes as the prompt takes.

Pooled values are kept between passes, so a score does not depend on how a prompt was cut. One gate per row can also
decide here, in the pass that holds its prompt's end (an armed row); all others are scored on the host from what was
pooled, by the readouts of `gate_kinds.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clampdown.saes.sae import FeatureSource
from clampdown.steering.gate_kinds import GATE_KINDS
from clampdown.steering.plan import Gate
from clampdown_vllm.worker.edits import Hidden, Read, reads_of

POOLINGS = ("max", "mean", "assistant_start")


class Channels:
    """Numbers that are read at every token, and per row their maximum, sum and last value."""

    def __init__(self, read: Read, width: int, rows: int, device: str) -> None:
        self.read = read
        self.peak, self.total, self.last = (torch.zeros(rows, width, device=device) for _ in range(3))

    def add(
        self, x: Hidden, rows: Int[Tensor, " tokens"], kept: Bool[Tensor, " tokens"], last: Bool[Tensor, " tokens"]
    ) -> None:
        values = self.read(x)
        index = rows.unsqueeze(1).expand_as(values)
        inside = torch.where(kept.unsqueeze(1), values, 0.0)
        self.peak.scatter_reduce_(0, index, inside, "amax")
        self.total.index_add_(0, rows, inside)
        self.last.index_add_(0, rows, torch.where(last.unsqueeze(1), values, 0.0))

    def start(self, row: int) -> None:
        for pooled in (self.peak, self.total, self.last):
            pooled[row] = 0

    def pooled(self, counted: Float[Tensor, "rows 1"]) -> tuple[Tensor, Tensor, Tensor]:
        return self.peak, self.total / counted, self.last


class SitePools:
    """All gates that read one site. Feature gates share the union of their features, others the residual itself."""

    def __init__(self, gates: Sequence[Gate], sae: FeatureSource | None, d_model: int, rows: int, device: str) -> None:
        features = sorted({feature for gate in gates for feature in gate.features})
        self.column = {feature: i for i, feature in enumerate(features)}
        self._parts: dict[str, Channels] = {}
        if features and sae is not None:
            view = sae.select(features).to(device, torch.float32)
            self._parts["features"] = Channels(reads_of(view), len(features), rows, device)
        if any(GATE_KINDS[gate.kind].reads == "residual" for gate in gates):
            self._parts["residual"] = Channels(lambda x: x, d_model, rows, device)
        self.limit = torch.full((rows,), math.inf, device=device)
        self.content, self.spared = torch.zeros(rows, device=device), torch.zeros(rows, device=device)
        self._weights = torch.zeros(len(POOLINGS), rows, len(features), device=device)
        self._bias, self._threshold, self.score = (torch.zeros(rows, device=device) for _ in range(3))

    def start(self, row: int, n_content: int, limit: float, armed: Gate | None) -> None:
        """A row begins to read its prompt. `armed`: the gate that decides here."""
        self.forget(row)
        self.content[row], self.limit[row] = n_content, limit
        self._weights[:, row] = 0
        if armed is not None:
            self._bias[row], self._threshold[row] = armed.bias, armed.threshold
            for feature, pooling, weight in zip(armed.features, armed.poolings, armed.weights, strict=True):
                self._weights[POOLINGS.index(pooling), row, self.column[feature]] += weight

    def forget(self, row: int) -> None:
        """What a row has read so far: it starts its prompt again."""
        for part in self._parts.values():
            part.start(row)
        self.spared[row] = 0

    def read(
        self,
        x: Hidden,
        length: Float[Tensor, " tokens"],
        rows: Int[Tensor, " tokens"],
        content: Bool[Tensor, " tokens"],
        last: Bool[Tensor, " tokens"],
    ) -> None:
        """Add a pass's tokens. Attention sinks are no content; the last token is read whatever its length."""
        outside = length <= self.limit.index_select(0, rows)
        self.spared.index_add_(0, rows, (content & ~outside).float())
        kept = content & outside
        for part in self._parts.values():
            part.add(x, rows, kept, last)

    def decide(self, fired: Bool[Tensor, " rows"], deciding: Bool[Tensor, " rows"]) -> None:
        """Open the edits of armed rows whose prompt has been read and whose score is above the threshold."""
        if "features" not in self._parts:
            return
        pooled = self._parts["features"].pooled(self._counted())
        parts = [(weight * value).sum(-1) for weight, value in zip(self._weights.unbind(0), pooled, strict=True)]
        scores = torch.stack(parts).sum(0) + self._bias
        self.score.copy_(torch.where(deciding, scores, self.score))
        fired.logical_or_(deciding & (scores > self._threshold))

    def _counted(self) -> Float[Tensor, "rows 1"]:
        return (self.content - self.spared).clamp(min=1).unsqueeze(1)

    def score_of(self, row: int, gate: Gate, vectors: Mapping[str, Sequence[float]]) -> float:
        """Any gate's score from what a row has pooled."""
        kind = GATE_KINDS[gate.kind]
        part = self._parts[kind.reads]
        names = dict(zip(POOLINGS, (p[row : row + 1] for p in part.pooled(self._counted())), strict=True))
        if kind.reads == "features":
            at = torch.tensor([self.column[f] for f in gate.features], device=self.score.device)
            values = {name: pooled[:, at] for name, pooled in names.items()}
        else:
            directions = torch.tensor([list(vectors[name]) for name in gate.vectors], device=self.score.device)
            values = {name: kind.readout(pooled, directions) for name, pooled in names.items()}
        total = gate.bias
        for channel, (pooling, weight) in enumerate(zip(gate.poolings, gate.weights, strict=True)):
            total += weight * float(values[pooling][0, channel])
        return total
