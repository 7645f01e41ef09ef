"""Which weights a plan comes to: edits as changes of the matrices that write into the residual stream.

1. An edit at the output of an attention or MLP is one of its last matrix W and bias b: `A y + c` comes from `A W` and
   `A b + c`.
2. An addition to the residual stream after block L is one to the bias of block L's MLP; before block 0, to every
   embedding.
3. An ablation of the residual stream is a change of weights only where the stream holds the direction no longer but for
   what the last matrix wrote. So it must have been taken out of the embeddings and of every matrix before: what passes
   a block around its matrices cannot be edited by them. Ablating everywhere is the orthogonalisation of Arditi et al.
   (2406.11717).

`Steps` are what is done to one writer's output, in order. Nothing here touches a model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.interop.exports.forms import Bound, Unsaid, ablations, offsets
from clampdown.steering.plan import Edit
from clampdown.types import Point, Site

Direction = Float[Tensor, " d_model"]
_GONE = 1e-5


class Step(NamedTuple):
    """y - sum of s (y . v) v over the directions, plus the offset."""

    directions: tuple[tuple[Direction, float], ...]
    offset: Direction | None


class Writer(NamedTuple):
    """A matrix that writes into the residual stream: "embed", "attn" or "mlp" of a block."""

    kind: str
    block: int


@dataclass(frozen=True)
class Changes:
    """What is done to the output of each writer, and the sites of ablations that no weights can do."""

    steps: dict[Writer, list[Step]] = field(default_factory=lambda: defaultdict(list))
    undone: list[Site] = field(default_factory=list)

    def linear(self, writer: Writer, columns: Float[Tensor, "d_model n"]) -> Float[Tensor, "d_model n"]:
        """The steps' linear part on columns that the writer writes."""
        for step in self.steps.get(writer, []):
            columns = _project(step, columns)
        return columns

    def offset(self, writer: Writer, bias: Direction | None) -> Direction | None:
        """What the writer adds to every token after the steps; None where nothing is."""
        found = bias
        for step in self.steps.get(writer, []):
            if found is not None:
                found = _project(step, found[:, None])[:, 0]
            if step.offset is not None:
                found = step.offset.clone() if found is None else found + step.offset
        return found

    def silences(self, writer: Writer, direction: Direction) -> bool:
        """Whether nothing that the writer writes holds the direction, whatever its matrix and bias."""
        row = direction
        for step in reversed(self.steps.get(writer, [])):
            if step.offset is not None and abs(float(row @ step.offset)) > _GONE * max(1.0, float(step.offset.norm())):
                return False
            for vector, strength in step.directions:
                row = row - strength * float(row @ vector) * vector
        return float(row.norm()) < _GONE


def _project(step: Step, columns: Float[Tensor, "d_model n"]) -> Float[Tensor, "d_model n"]:
    """All directions are read from the same columns, as an edit's are."""
    found = columns
    for vector, strength in step.directions:
        found = found - strength * torch.outer(vector, vector @ columns)
    return found


def changes_of(bound: Bound, *, parallel: bool = False) -> Changes:
    """The plan as changes of weights. `parallel`: attention and MLP of a block read the same input."""
    steps = _by_site(bound)
    found = Changes()
    embed = Writer("embed", 0)
    found.steps[embed] += steps.get(Site(0, Point.RESID_PRE), [])
    for block in range(bound.lm.n_layers):
        attn, mlp = Writer("attn", block), Writer("mlp", block)
        found.steps[attn] += steps.get(Site(block, Point.ATTN_OUT), [])
        found.steps[mlp] += steps.get(Site(block, Point.MLP_OUT), [])
        for site in (Site(block, Point.RESID_POST), Site(block + 1, Point.RESID_PRE)):
            for step in steps.get(site, []):
                _after(found, step, site, block, parallel=parallel)
    return found


def _after(found: Changes, step: Step, site: Site, block: int, *, parallel: bool) -> None:
    """A step on the stream after a block, done by the block's writers if what passes around them is clean."""
    attn, mlp = Writer("attn", block), Writer("mlp", block)
    before = [Writer("embed", 0), *(Writer(kind, i) for i in range(block) for kind in ("attn", "mlp"))]
    around = before if parallel else [*before, attn]
    if not all(found.silences(writer, vector) for vector, _ in step.directions for writer in around):
        found.undone.append(site)
        return
    if parallel and step.directions:
        found.steps[attn].append(Step(step.directions, None))
    found.steps[mlp].append(step)


def _by_site(bound: Bound) -> dict[Site, list[Step]]:
    added, removed = offsets(bound), ablations(bound.plan)
    return {site: [Step(tuple(removed.get(site, [])), added.get(site))] for site in {**added, **removed}}


def undone(changes: Changes) -> Iterator[Unsaid]:
    """The ablations that no weights can do."""
    for site in changes.undone:
        yield Unsaid(
            f"ablate_direction at {site}",
            "what passes the block around its matrices still holds the direction",
            "the direction is taken out of the embeddings and of every matrix that writes",
        )


def everywhere(edit: Edit, n_layers: int) -> tuple[Edit, ...]:
    """The same ablation wherever something is written into the residual stream."""
    sites = [Site(0, Point.RESID_PRE)]
    sites += [Site(block, point) for block in range(n_layers) for point in (Point.ATTN_OUT, Point.MLP_OUT)]
    plain = {"strengths": (1.0,), "scope": "all", "p99": None, "edit_norm": None}
    return tuple(edit.changed(site=site.name, **plain) for site in sites)
