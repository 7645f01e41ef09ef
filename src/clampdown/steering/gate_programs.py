"""Gates as arithmetic, for a batch in which every row has its own plan: one reader per branch, site and way of reading.

Everything here is a function of values. When gates are read, and what follows, is in `verdicts.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clampdown.activations.sinks import sinks_at
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import FeatureSource
from clampdown.steering.gate_kinds import GATE_KINDS, GATE_POOLINGS, Directions, Readout
from clampdown.steering.plan import Gate
from clampdown.steering.program import Residual, Rows, wide_view
from clampdown.types import Site


@runtime_checkable
class Reader(Protocol):
    """What a gate pools: numbers at every position of a residual."""

    def read(self, x: Residual) -> Float[Tensor, "rows pos width"]: ...


@dataclass(frozen=True, slots=True)
class Whole:
    """Gates on the residual pool the residual itself."""

    def read(self, x: Residual) -> Residual:
        return x


@dataclass(frozen=True, slots=True)
class GateProgram:
    """Gates of one branch that read one site in one way: per pooling, weights [rows, channels] over shared channels."""

    site: Site
    branch: int
    reader: Reader
    readout: Readout
    directions: Directions
    gated: Bool[Tensor, " rows"]
    weights: Mapping[str, Float[Tensor, "rows channels"]]
    bias: Float[Tensor, " rows"]
    threshold: Float[Tensor, " rows"]
    least: Float[Tensor, " rows"]
    full: Float[Tensor, " rows"]
    limit: float = math.inf
    """The length beyond which a token is an attention sink, which is not read."""

    def scores(
        self,
        x: Float[Tensor, "prompts prompt d_model"],
        content: Bool[Tensor, "prompts prompt"],
        prompt_of: Int[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, " rows"]:
        """Each row's score from the residual at its own prompt's tokens. Without `prompt_of` prompts are rows."""
        values = self.reader.read(x.float())
        if self.limit < math.inf:
            content = content & (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32) <= self.limit)
        channels = {name: self.readout(GATE_POOLINGS[name](values, content), self.directions) for name in self.weights}
        if prompt_of is not None:
            channels = {name: found[prompt_of] for name, found in channels.items()}
        return torch.stack([(channels[name] * w).sum(-1) for name, w in self.weights.items()]).sum(0) + self.bias

    def factors(self, scores: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """`Gate.factor` of each row's gate; 1 where strength does not grow with the score."""
        share = (scores - self.threshold) / (self.full - self.threshold)
        grown = torch.minimum(torch.maximum(self.least + (1 - self.least) * share, self.least), torch.ones_like(share))
        return torch.where(self.full.isfinite(), grown, 1.0)

    def at(self, rows: Int[Tensor, " kept"]) -> GateProgram:
        """The gates of some of the rows."""
        weights = {name: w[rows] for name, w in self.weights.items()}
        return replace(
            self,
            gated=self.gated[rows],
            weights=weights,
            bias=self.bias[rows],
            threshold=self.threshold[rows],
            least=self.least[rows],
            full=self.full[rows],
        )


def gate_programs(rows: Rows, lm: LanguageModel, saes: Mapping[str, FeatureSource]) -> tuple[GateProgram, ...]:
    """One gate reader per branch, site and way of reading that any row's gates use. External gates and ensembles
    read no site of their own."""
    found: dict[tuple[int, str, Readout, float], dict[int, Gate]] = {}
    for row, plan in enumerate(rows):
        for branch, gate in enumerate(plan.gates if plan is not None else ()):
            if plan is not None and gate.site:
                limit = sink_limit(lm, gate, plan.sinks)
                found.setdefault((branch, gate.site, GATE_KINDS[gate.kind].readout, limit), {})[row] = gate
    return tuple(
        _gate_program(
            {row: _gate_channels(gate, rows[row].vectors) for row, gate in gates.items()},  # type: ignore[union-attr]
            len(rows),
            branch,
            readout,
            gates,
            saes.get(site),
            lm.device,
            limit,
        )
        for (branch, site, readout, limit), gates in found.items()
    )


def sink_limit(lm: LanguageModel, gate: Gate, sinks: str) -> float:
    """The length beyond which a token at the gate's site is a sink that it does not read."""
    site = Site.parse(gate.site)
    return sinks_at(lm, [site])[site].limit if sinks == "leave_out" else math.inf


def gate_program(
    gate: Gate, vectors: Mapping[str, tuple[float, ...]], sae: FeatureSource | None, device: torch.device, limit: float
) -> GateProgram:
    """The reader of one gate, for prompts of which each is scored by it."""
    channels = {0: _gate_channels(gate, vectors)}
    return _gate_program(channels, 1, 0, GATE_KINDS[gate.kind].readout, {0: gate}, sae, device, limit)


def _gate_channels(gate: Gate, vectors: Mapping[str, tuple[float, ...]]) -> Sequence[Any]:
    """What a gate's channels are: features by index, or vectors by value."""
    return gate.features or tuple(vectors[name] for name in gate.vectors)


def _gate_program(
    channels: Mapping[int, Sequence[Any]],
    n_rows: int,
    branch: int,
    readout: Readout,
    gates: Mapping[int, Gate],
    sae: FeatureSource | None,
    device: torch.device,
    limit: float,
) -> GateProgram:
    keys = sorted({key for own in channels.values() for key in own})
    column = {key: i for i, key in enumerate(keys)}
    used = sorted({name for gate in gates.values() for name in gate.poolings})
    weights = {name: torch.zeros(n_rows, len(keys)) for name in used}
    bias, threshold, least = torch.zeros(n_rows), torch.zeros(n_rows), torch.ones(n_rows)
    full = torch.full((n_rows,), math.inf)
    gated = torch.zeros(n_rows, dtype=torch.bool)
    for row, gate in gates.items():
        for key, name, weight in zip(channels[row], gate.poolings, gate.weights, strict=True):
            weights[name][row, column[key]] += weight
        bias[row], threshold[row], gated[row] = gate.bias, gate.threshold, True
        least[row], full[row] = gate.least, math.inf if gate.full is None else gate.full
    first = next(iter(gates.values()))
    on_features = GATE_KINDS[first.kind].reads == "features"
    assert sae is not None or not on_features, "check_plan has made sure that every site with features has its SAE"
    return GateProgram(
        site=Site.parse(first.site),
        branch=branch,
        reader=wide_view(sae, keys, device) if sae is not None and on_features else Whole(),
        readout=readout,
        directions=None if on_features else torch.tensor(keys, device=device),
        gated=gated.to(device),
        weights={name: w.to(device) for name, w in weights.items()},
        bias=bias.to(device),
        threshold=threshold.to(device),
        least=least.to(device),
        full=full.to(device),
        limit=limit,
    )
