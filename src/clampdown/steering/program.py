"""From plans to arithmetic: one program per site, for a batch in which every row has its own plan.

1. The features that any row uses at a site become the channels of one reader: each activation is read once.
2. Edits that share operator and scope become a group: strengths [rows, channels], and a 0/1 `member` mask that says
   which rows asked. A row without a plan has no membership anywhere, so its coefficients are exact zeros.
3. delta = sum over channels of coefficient * decoder row, every activation read from the unedited x (methods, 2).

Everything here is a function of values. Hooks, caches and counters are in `hooks.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from clampdown.activations.sinks import sinks_at
from clampdown.errors import PlanError, PlanMismatchError
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import FeatureSource, FeatureView, Sae, check_features, check_fits
from clampdown.steering.gate_kinds import check_scorer
from clampdown.steering.operators import OPERATORS
from clampdown.steering.plan import Edit, Plan
from clampdown.steering.scopes import overlap
from clampdown.types import Site

Residual = Float[Tensor, "rows pos d_model"]


class Reach(NamedTuple):
    """Where a group of edits acts: in the positions of a scope, on rows whose plan's branch `branch` fired."""

    scope: str
    branch: int


ReachWeights = Mapping[Reach, Float[Tensor, "rows pos"]]


@runtime_checkable
class View(Protocol):
    """Reads some channels off a residual, and says what writing amounts of them adds to it."""

    def read(self, x: Residual) -> Float[Tensor, "rows pos channels"]: ...

    def write(self, coefficients: Float[Tensor, "rows pos channels"], x: Residual) -> Residual: ...


@dataclass(frozen=True, slots=True)
class Directions:
    """Dense directions as channels: activation = x . v, written as amounts of v."""

    rows: Float[Tensor, "channels d_model"]

    def read(self, x: Residual) -> Float[Tensor, "rows pos channels"]:
        return x @ self.rows.T

    def write(self, coefficients: Float[Tensor, "rows pos channels"], x: Residual) -> Residual:
        return coefficients @ self.rows


@dataclass(frozen=True, slots=True)
class Group:
    """Edits of one operator and one reach: the channels they use, and each row's strengths."""

    operator: str
    reach: Reach
    channels: Int[Tensor, " n"]
    strengths: Float[Tensor, "rows 1 n"]
    member: Float[Tensor, "rows 1 n"]

    def at(self, rows: Int[Tensor, " kept"]) -> Group:
        return replace(self, strengths=self.strengths[rows], member=self.member[rows])


@dataclass(frozen=True, slots=True)
class Bank:
    """One view at a site and the groups that act through it."""

    view: View
    size: int
    groups: tuple[Group, ...]

    def delta(self, x: Residual, weights: ReachWeights) -> Residual:
        """What all groups together add to x."""
        activation = self.view.read(x).float()  # a top-k view reads in its SAE's own precision
        if len(self.groups) == 1 and len(self.groups[0].channels) == self.size:
            total = self._coefficients(self.groups[0], activation, weights)
        else:
            total = torch.zeros_like(activation)
            for group in self.groups:
                part = self._coefficients(group, activation[..., group.channels], weights)
                total.index_add_(-1, group.channels, part)
        return self.view.write(total, x)

    @staticmethod
    def _coefficients(group: Group, activation: Tensor, weights: ReachWeights) -> Tensor:
        raw = OPERATORS[group.operator].coefficient(activation, group.strengths)
        return raw * (group.member * weights[group.reach].unsqueeze(-1))


@dataclass(frozen=True, slots=True)
class PassedOn:
    """Rows that pass on the SAE's error within the span of orthonormal rows only; None: nothing of it."""

    basis: Float[Tensor, "rank d_model"] | None
    rows_by_reach: Mapping[Reach, Float[Tensor, " rows"]]

    def delta(self, error: Residual, weights: ReachWeights) -> Residual:
        reach = torch.stack([w[:, None] * weights[at] for at, w in self.rows_by_reach.items()]).amax(0)
        lost = error if self.basis is None else error - (error @ self.basis.T) @ self.basis
        return -lost * reach.unsqueeze(-1)

    def at(self, rows: Int[Tensor, " kept"]) -> PassedOn:
        return replace(self, rows_by_reach={reach: w[rows] for reach, w in self.rows_by_reach.items()})


@dataclass(frozen=True, slots=True)
class ErrorTerms:
    """Edits that do not keep the SAE's error term: x is replaced by its reconstruction before the deltas, and by what
    is passed on of the rest."""

    sae: Sae
    parts: tuple[PassedOn, ...]

    def delta(self, x: Residual, weights: ReachWeights) -> Residual:
        error = x - self.sae.reconstruct(x)
        found = [part.delta(error, weights) for part in self.parts]
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)


@dataclass(frozen=True, slots=True)
class SiteProgram:
    """Everything that happens to the residual at one site, for every row of a batch."""

    site: Site
    banks: tuple[Bank, ...]
    errors: ErrorTerms | None
    limit: Float[Tensor, "rows 1"] | None = None
    """The length beyond which a token is an attention sink, which each row's plan leaves as it is; None: nowhere."""

    def delta(self, x: Residual, weights: ReachWeights) -> Residual:
        """x' - x, in x's dtype; computed in float32."""
        wide = x.float()
        parts = [part.delta(wide, weights) for part in (*self.banks, *([self.errors] if self.errors else []))]
        total = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        return self.spared(total, wide).to(x.dtype)

    def spared(self, delta: Residual, x: Residual) -> Residual:
        """A delta without what it does to sinks."""
        if self.limit is None:
            return delta
        return torch.where((torch.linalg.vector_norm(x, dim=-1) <= self.limit).unsqueeze(-1), delta, 0.0)

    def at(self, rows: Int[Tensor, " kept"]) -> SiteProgram:
        """The program of some of the rows, after the others left the batch."""
        banks = tuple(replace(bank, groups=tuple(g.at(rows) for g in bank.groups)) for bank in self.banks)
        errors = self.errors
        if errors:
            errors = replace(errors, parts=tuple(part.at(rows) for part in errors.parts))
        return replace(self, banks=banks, errors=errors, limit=None if self.limit is None else self.limit[rows])

    @property
    def reaches(self) -> set[Reach]:
        """Where the edits act, error terms among them."""
        passed = {reach for part in (self.errors.parts if self.errors else ()) for reach in part.rows_by_reach}
        return {group.reach for bank in self.banks for group in bank.groups} | passed


Rows = Sequence[Plan | None]


class _Asked(NamedTuple):
    """One edit that a row's plan asks for, and in which of its branches."""

    row: int
    plan: Plan
    edit: Edit
    branch: int

    @property
    def reach(self) -> Reach:
        return Reach(self.edit.scope, self.branch)


def _edits(rows: Rows, site: str, *, dense: bool) -> list[_Asked]:
    return [
        _Asked(row, plan, edit, branch)
        for row, plan in enumerate(rows)
        if plan is not None
        for branch, edits in enumerate(plan.branches)
        for edit in edits
        if edit.site == site and OPERATORS[edit.operator].dense is dense
    ]


def _groups(
    entries: Iterable[tuple[_Asked, Sequence[object]]], channel_of: Mapping[object, int], n_rows: int, like: Tensor
) -> tuple[Group, ...]:
    """Collect (edit, channel keys) into groups of equal operator and reach."""
    grouped: dict[tuple[str, Reach], list[tuple[int, int, float]]] = {}
    for asked, keys in entries:
        cells = grouped.setdefault((asked.edit.operator, asked.reach), [])
        cells.extend((asked.row, channel_of[key], s) for key, s in zip(keys, asked.edit.strengths, strict=True))
    return tuple(_group(operator, reach, cells, n_rows, like) for (operator, reach), cells in sorted(grouped.items()))


def _group(operator: str, reach: Reach, cells: list[tuple[int, int, float]], n_rows: int, like: Tensor) -> Group:
    channels = sorted({channel for _, channel, _ in cells})
    column = {channel: i for i, channel in enumerate(channels)}
    strengths = [[0.0] * len(channels) for _ in range(n_rows)]
    member = [[0.0] * len(channels) for _ in range(n_rows)]
    for row, channel, strength in cells:
        if member[row][column[channel]]:
            raise PlanError(f"two edits '{operator}' with scope '{reach.scope}' of one plan act on the same channel")
        strengths[row][column[channel]] = strength
        member[row][column[channel]] = 1.0
    to = like.device
    return Group(
        operator,
        reach,
        channels=torch.tensor(channels, device=to),
        strengths=torch.tensor(strengths, device=to).unsqueeze(1),
        member=torch.tensor(member, device=to).unsqueeze(1),
    )


def wide_view(sae: FeatureSource, features: Sequence[int], device: torch.device) -> FeatureView:
    """The features' view beside the model, in float32 whatever the SAE is stored in: activations are compared with
    thresholds, and sums in 16 bit land on the wrong side. A top-k view holds the whole encoder, whose precision is left
    as it is."""
    view = sae.select(features)
    return view.to(device, torch.float32 if view.architecture.pointwise else None)


def _feature_bank(rows: Rows, site: str, sae: FeatureSource, device: torch.device) -> Bank:
    found = _edits(rows, site, dense=False)
    features = sorted({f for asked in found for f in asked.edit.features})
    view = wide_view(sae, features, device)
    entries = [(asked, asked.edit.features) for asked in found]
    groups = _groups(entries, {f: i for i, f in enumerate(features)}, len(rows), view.directions)
    return Bank(view, len(features), groups)


def _direction_bank(rows: Rows, site: str, lm: LanguageModel) -> Bank:
    """Equal vectors share a channel; ablation reads and writes the unit vector."""
    found = _edits(rows, site, dense=True)
    keyed = [(a, (a.plan.vectors[a.edit.vector or ""], OPERATORS[a.edit.operator].unit_row)) for a in found]
    keys = list(dict.fromkeys(key for _, key in keyed))
    vectors = [checked_vector(torch.tensor(vector, device=lm.device), lm.d_model) for vector, _ in keys]
    matrix = torch.stack([v / v.norm() if unit else v for v, (_, unit) in zip(vectors, keys, strict=True)])
    groups = _groups([(asked, [key]) for asked, key in keyed], {k: i for i, k in enumerate(keys)}, len(rows), matrix)
    return Bank(Directions(matrix), len(keys), groups)


def checked_vector(vector: Float[Tensor, " d"], d_model: int) -> Float[Tensor, " d"]:
    """The vector, if it can steer. Raises `PlanMismatchError` for another width, `PlanError` if zero or infinite."""
    if len(vector) != d_model:
        raise PlanMismatchError(f"a vector of {len(vector)} numbers cannot steer a residual of {d_model}")
    if not bool(vector.norm() > 0) or not bool(vector.isfinite().all()):
        raise PlanError("a steering vector must be finite and not zero")
    return vector


def _errors(rows: Rows, site: str, sae: FeatureSource | None, device: torch.device) -> ErrorTerms | None:
    """Plans that pass the same on share what is computed of it."""
    found: dict[tuple[tuple[float, ...], ...], dict[Reach, Tensor]] = {}
    for asked in _edits(rows, site, dense=False):
        if asked.edit.error_term != "keep":
            vectors = tuple(asked.plan.vectors[name] for name in asked.edit.correction)
            by_reach = found.setdefault(vectors, {})
            by_reach.setdefault(asked.reach, torch.zeros(len(rows), device=device))[asked.row] = 1.0
    parts = tuple(
        PassedOn(torch.tensor(vectors, device=device) if vectors else None, by_reach)
        for vectors, by_reach in found.items()
    )
    return ErrorTerms(sae.whole().to(device), parts) if parts and sae else None


def _site_program(rows: Rows, site: str, lm: LanguageModel, sae: FeatureSource | None) -> SiteProgram:
    banks: list[Bank] = []
    if _edits(rows, site, dense=False):
        assert sae is not None, "check_plan has made sure that every site with features has its SAE"
        banks.append(_feature_bank(rows, site, sae, lm.device))
    if _edits(rows, site, dense=True):
        banks.append(_direction_bank(rows, site, lm))
    return SiteProgram(Site.parse(site), tuple(banks), _errors(rows, site, sae, lm.device), _limit(rows, site, lm))


def _limit(rows: Rows, site: str, lm: LanguageModel) -> Float[Tensor, "rows 1"] | None:
    where = Site.parse(site)
    sinks = sinks_at(lm, [where])[where]
    if not sinks:
        return None
    limits = [sinks.limit if plan is not None and plan.sinks == "leave_out" else math.inf for plan in rows]
    return torch.tensor(limits, device=lm.device).unsqueeze(1)


def site_programs(rows: Rows, lm: LanguageModel, saes: Mapping[str, FeatureSource]) -> tuple[SiteProgram, ...]:
    """One program per edited site, lowest first. `saes` maps site names to SAEs."""
    names = {edit.site for plan in rows if plan is not None for edit in plan.all_edits}
    for name in names:
        lm.layout.hook_point(Site.parse(name))
    return tuple(_site_program(rows, name, lm, saes.get(name)) for name in sorted(names, key=Site.parse))


def check_plan(plan: Plan, lm: LanguageModel, saes: Mapping[str, FeatureSource]) -> None:
    """Refuse a plan made for another model or SAE, one whose features do not exist here, and one that does nothing or
    contradicts itself.

    Raises `PlanError`, or a `PlanMismatchError`, `FeatureIndexError`, `SiteError` or `WidthMismatchError`.
    """
    if not all(plan.branches):
        raise PlanError(f"plan '{plan.name}' has no edits: it would change nothing", hint="steer with None for that")
    for edits in plan.branches:
        _check_together(plan, edits)
    if plan.model.revision != lm.revision:
        raise PlanMismatchError(
            f"plan '{plan.name}' was made for {plan.model.name} at revision {plan.model.revision}, "
            f"this is {lm.name} at {lm.revision}",
            hint="make the plan again for this model, or load the model it names",
        )
    for ref in plan.saes:
        sae = saes.get(ref.site)
        if sae is None:
            raise PlanMismatchError(f"plan '{plan.name}' needs the SAE {ref.name} at {ref.site}")
        if sae.revision != ref.revision:
            raise PlanMismatchError(
                f"plan '{plan.name}' was made for the SAE {ref.name} at revision {ref.revision}, "
                f"this is {sae.name} at {sae.revision}",
                hint="feature indices mean nothing in another SAE; load the one the plan names",
            )
        check_fits(sae, lm.d_model, lm.layout.n_layers, layer_norm=lm.layout.layer_norm)
    _check_edits(plan, lm, saes)


RIGHT_ANGLE = 1e-3
"""The largest cosine of two vectors that count as at right angles."""


Angles = Callable[[str, str], float]
"""Of two of a plan's vectors, the cosine without its sign."""


def angles(plan: Plan, edits: Iterable[Edit]) -> Angles:
    """Between the vectors of edits. Vectors of no length, or of different ones, are refused elsewhere: here they are
    taken for equal."""
    names = [*dict.fromkeys(edit.vector for edit in edits if edit.vector is not None)]
    row = {name: i for i, name in enumerate(names)}
    widths = {len(plan.vectors[name]) for name in names}
    if len(widths) != 1:
        return lambda _one, _other: 1.0
    rows = np.array([plan.vectors[name] for name in names], dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, lengths, out=np.ones_like(rows), where=lengths > 0)
    cosines = np.abs(unit @ unit.T)
    return lambda one, other: float(cosines[row[one], row[other]])


def pass_on_otherwise(one: Edit, other: Edit) -> bool:
    """Whether both change the SAE's error term at one site, in different ways."""
    said = [(edit.error_term, edit.correction) for edit in (one, other) if edit.error_term != "keep"]
    return one.site == other.site and len(set(said)) == 2


def contradict(one: Edit, other: Edit, cosine: Angles) -> bool:
    """Whether both touch what one of them sets, a feature's activation or the coordinate along a vector: changes add
    up, and the sum of two would be neither. Vectors at right angles do not touch each other's coordinate."""
    if one.site != other.site or not (OPERATORS[one.operator].sets or OPERATORS[other.operator].sets):
        return False
    if one.vector is not None and other.vector is not None:
        return cosine(one.vector, other.vector) > RIGHT_ANGLE
    return bool(set(one.features) & set(other.features))


def _check_together(plan: Plan, edits: Sequence[Edit]) -> None:
    cosine = angles(plan, edits)
    for one, other in combinations(edits, 2):
        if pass_on_otherwise(one, other) and overlap(one.scope, other.scope):
            raise PlanError(
                f"plan '{plan.name}' passes on the SAE's error at {one.site} in two ways, on {one.scope} and "
                f"{other.scope}",
                hint="give both edits the same error_term and correction, or scopes that do not overlap",
            )
        if contradict(one, other, cosine) and overlap(one.scope, other.scope):
            raise PlanError(
                f"plan '{plan.name}' edits {_shared(one, other)} at {one.site} twice, by '{one.operator}' on "
                f"{one.scope} and '{other.operator}' on {other.scope}: the changes would add up to neither",
                hint="give the two edits scopes that do not overlap, or leave one out"
                + ("; vectors at right angles may be edited together" if one.vector else ""),
            )


def _shared(one: Edit, other: Edit) -> str:
    if one.vector is None:
        return f"feature {min(set(one.features) & set(other.features))}"
    return f"the coordinates along '{one.vector}' and '{other.vector}', which are not at right angles,"


def _check_edits(plan: Plan, lm: LanguageModel, saes: Mapping[str, FeatureSource]) -> None:
    """Every site exists in the model, every feature in its SAE, every vector is as wide as the residual stream."""
    readers = [(edit.site, edit.features) for edit in plan.all_edits]
    readers += [(reader.site, reader.features) for gate in plan.gates for reader in gate.readers if reader.site]
    for site, features in readers:
        lm.layout.hook_point(Site.parse(site))
        if features:
            check_features(features, saes[site].cfg.d_sae)
    for gate in plan.gates:
        if gate.scorer:
            check_scorer(gate.scorer)
    for vector in plan.vectors.values():
        checked_vector(torch.tensor(vector), lm.d_model)
    for edit in plan.all_edits:
        if edit.correction:
            _check_orthonormal(plan, edit)


def _check_orthonormal(plan: Plan, edit: Edit) -> None:
    rows = np.array([plan.vectors[name] for name in edit.correction], dtype=np.float64)
    off = float(np.abs(rows @ rows.T - np.eye(len(rows))).max())
    if off > RIGHT_ANGLE:
        raise PlanError(
            f"the vectors of a correction at {edit.site} are not orthonormal (off by {off:.2g}): they would pass on "
            "something else than the error within them",
            hint="make the plan anew with --error-term correct",
        )
