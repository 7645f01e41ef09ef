"""Fitting a gate of each kind on labelled prompts, and scoring prompts from what one pass pooled of them.

| kind    | fit |
|---|---|
| feature | the (feature, pooling) pair with the best AUROC |
| probe   | L1 logistic regression chooses pairs, an L2 refit weighs them (`gates.py`) |
| dense   | logistic regression on the residual under both poolings, standardised (folded into the vectors) |
| cosine  | CAST (2409.05907): cosine with the difference of means, under the pooling with the better AUROC |

An ensemble is fitted member by member. Each member's score is put into units of its spread over harmless prompts, so
that none drowns the others.

A fit leaves the threshold at 0 and promises nothing: `calibrated` sets it on benign prompts that the fit never saw. An
external classifier needs no fit: `choose_threshold` takes its scores as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from scipy.sparse import csr_array
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression

from clampdown.activations.store import ActivationStore
from clampdown.activations.stream import Reading
from clampdown.errors import NotEnoughDataError, PlanError
from clampdown.saes.sae import Sae
from clampdown.steering.gate_kinds import COMBINATIONS, GATE_KINDS
from clampdown.steering.gates import choose_threshold, fit_probe
from clampdown.steering.plan import Gate
from clampdown.types import Site

FEATURE_POOLINGS = ("max", "assistant_start")
RESIDUAL_POOLINGS = ("mean", "assistant_start")
INVERSE_PENALTY = 0.01
"""C of the dense probe's logistic regression: features are standardised, and there are few prompts per dimension."""

Labels = Bool[np.ndarray, " prompts"]
Scores = Float[np.ndarray, " prompts"]


@dataclass(frozen=True, slots=True)
class Pooled:
    """What one pass pooled of prompts at a site: SAE features (empty without an SAE) and the residual."""

    site: str
    features: Mapping[str, csr_array]
    residual: Mapping[str, Float[np.ndarray, "prompts d_model"]]
    elsewhere: Mapping[str, Pooled] = field(default_factory=dict)
    """The same prompts at other sites, by site."""

    @classmethod
    def of(cls, store: ActivationStore) -> Pooled:
        """From a pass that `gate_reading` described, at one site or several: the first is the one that is meant when
        none is named."""
        first, *more = (cls._of_reading(store, name) for name in store.sites)
        return replace(first, elsewhere={pooled.site: pooled for pooled in more})

    @classmethod
    def _of_reading(cls, store: ActivationStore, name: str) -> Pooled:
        poolings = [series.pooling for series in store.features if series.reading == name]
        features = {pooling: store.matrix(pooling, reading=name) for pooling in poolings}
        residual = {pooling: store.dense(pooling, reading=name) for pooling in RESIDUAL_POOLINGS}
        return cls(store.site(name).name, features, residual)

    @property
    def n(self) -> int:
        """How many prompts."""
        first: Any = next(iter((*self.residual.values(), *self.features.values())))
        return first.shape[0]

    def at(self, rows: Bool[np.ndarray, " prompts"]) -> Pooled:
        """Some of the prompts."""
        return self.taken(np.flatnonzero(rows))

    def taken(self, index: Any) -> Pooled:
        """Prompts by their numbers, perhaps some of them twice. (scipy's stubs do not know indexing by an array.)"""
        features = {name: csr_array(values[index]) for name, values in self.features.items()}
        residual = {name: values[index] for name, values in self.residual.items()}
        return Pooled(self.site, features, residual, {s: other.taken(index) for s, other in self.elsewhere.items()})

    def of_site(self, site: str) -> Pooled:
        """At that site; without one, at the first. Raises `PlanError` where it was not read."""
        if site in ("", self.site):
            return self
        if site not in self.elsewhere:
            raise PlanError(f"nothing was read at {site}", hint=f"one of: {', '.join([self.site, *self.elsewhere])}")
        return self.elsewhere[site]


def gate_reading(site: Site, sae: Sae | None) -> Reading:
    """What a pass has to pool for every kind of gate."""
    return Reading(site, sae, FEATURE_POOLINGS if sae else (), RESIDUAL_POOLINGS)


@dataclass(frozen=True, slots=True)
class FittedGate:
    """A gate and the vectors that it reads, which belong into the plan."""

    gate: Gate
    vectors: Mapping[str, tuple[float, ...]]

    def scores(self, pooled: Pooled) -> Scores:
        """Each prompt's score, as the steered model's own pass computes it."""
        gate = self.gate
        if gate.members:
            each = [replace(self, gate=member).scores(pooled) for member in gate.members]
            return np.array([COMBINATIONS[gate.combine](scores) for scores in zip(*each, strict=True)], dtype=float)
        pooled = pooled.of_site(gate.site)
        n = pooled.n
        total = np.full(n, gate.bias)
        for i, (weight, pooling) in enumerate(zip(gate.weights, gate.poolings, strict=True)):
            total += weight * self._channel(i, pooling, pooled)
        return total

    def _channel(self, i: int, pooling: str, pooled: Pooled) -> Scores:
        if GATE_KINDS[self.gate.kind].reads == "features":
            column: Any = pooled.features[pooling][:, [self.gate.features[i]]]
            return column.toarray().ravel()
        x, v = pooled.residual[pooling], np.array(self.vectors[self.gate.vectors[i]])
        projected = x @ v
        return projected if self.gate.kind == "dense" else projected / np.linalg.norm(x, axis=1) / np.linalg.norm(v)

    def renamed(self, prefix: str) -> FittedGate:
        """With other names for its vectors, for a second gate of the kind in one plan."""
        if self.gate.members:
            each = [replace(self, gate=member).renamed(prefix) for member in self.gate.members]
            return _joined(self.gate, each)
        names = tuple(f"{prefix} {name}" for name in self.gate.vectors)
        vectors = {new: self.vectors[old] for new, old in zip(names, self.gate.vectors, strict=True)}
        return FittedGate(self.gate.changed(vectors=names), vectors)

    def changed(self, **fields: object) -> FittedGate:
        """With other values for some of the gate's fields, checked as a plan's are."""
        return replace(self, gate=Gate.model_validate({**dict(self.gate), **fields}))

    def calibrated(
        self, scores: Scores, *, budget: float, confidence: float, on: Literal["benign", "harmful"] = "benign"
    ) -> FittedGate:
        """With the threshold that keeps triggers within the budget on prompts like those with these scores, which are
        benign or, for a gate that turns refusals down, harmful. Raises `NotEnoughDataError`."""
        threshold, guarantee = choose_threshold(scores, budget=budget, confidence=confidence, on=on)
        return self.changed(threshold=threshold, guarantee=guarantee)

    def growing(self, scores: Scores, least: float) -> FittedGate:
        """With edits at `least` of their strength at the threshold, and at all of it from the median score of those
        prompts like these on which the gate fires. Raises `NotEnoughDataError` without any."""
        above = scores[scores > self.gate.threshold]
        if not len(above):
            raise NotEnoughDataError(
                "the gate fires on none of the prompts that say where its edits reach their full strength",
                hint="a larger budget, or more harmful discovery prompts",
            )
        return self.changed(least=least, full=float(np.median(above)))


def auroc(scores: Scores, positive: Labels) -> float:
    """The chance that a positive prompt scores above a negative one, ties counting half."""
    ranks, n = rankdata(scores), int(positive.sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(scores) - n)))


def _fit_feature(pooled: Pooled, positive: Labels, seed: int) -> FittedGate:
    _needs_sae(pooled)
    found = []
    for pooling, values in pooled.features.items():
        live = np.unique(values.indices)
        columns: Any = values[:, live]
        found += [
            (auroc(column, positive), pooling, int(f)) for f, column in zip(live, columns.toarray().T, strict=True)
        ]
    if not found:
        raise NotEnoughDataError("no feature is active on these prompts")
    _, pooling, feature = max(found)
    return FittedGate(_gate("feature", pooled, features=(feature,), weights=(1.0,), poolings=(pooling,)), {})


def _fit_probe(pooled: Pooled, positive: Labels, seed: int) -> FittedGate:
    return fit_probe_of(pooled, positive, seed=seed)


def fit_probe_of(
    pooled: Pooled, positive: Labels, *, max_features: int = 80, inverse_penalty: float = 10.0, seed: int = 0
) -> FittedGate:
    """A sparse probe of a size and a penalty of its own. Raises as `fit_gate` does."""
    _needs_sae(pooled)
    probe = fit_probe(pooled.features, positive, max_features=max_features, inverse_penalty=inverse_penalty, seed=seed)
    gate = _gate("probe", pooled, features=probe.features, weights=probe.weights, poolings=probe.poolings)
    return FittedGate(gate.changed(bias=probe.bias), {})


def _fit_dense(pooled: Pooled, positive: Labels, seed: int) -> FittedGate:
    x = np.concatenate([pooled.residual[name] for name in RESIDUAL_POOLINGS], axis=1).astype(np.float64)
    mean, spread = x.mean(0), np.maximum(x.std(0), 1e-6)
    model: Any = LogisticRegression(C=INVERSE_PENALTY, class_weight="balanced", max_iter=2000, random_state=seed)
    model.fit((x - mean) / spread, positive)
    weights = (model.coef_[0] / spread).astype(np.float32)
    parts = np.split(weights, len(RESIDUAL_POOLINGS))
    names = tuple(_vector("dense", name) for name in RESIDUAL_POOLINGS)
    gate = _gate("dense", pooled, vectors=names, weights=(1.0,) * len(names), poolings=RESIDUAL_POOLINGS)
    bias = float(model.intercept_[0] - mean @ weights)
    vectors = {name: tuple(part.tolist()) for name, part in zip(names, parts, strict=True)}
    return FittedGate(gate.changed(bias=bias), vectors)


def _fit_cosine(pooled: Pooled, positive: Labels, seed: int) -> FittedGate:
    found = []
    for pooling in RESIDUAL_POOLINGS:
        x, name = pooled.residual[pooling], _vector("cosine", pooling)
        difference = (x[positive].mean(0) - x[~positive].mean(0)).astype(np.float32)
        gate = _gate("cosine", pooled, vectors=(name,), weights=(1.0,), poolings=(pooling,))
        fitted = FittedGate(gate, {name: tuple(difference.tolist())})
        found.append((auroc(fitted.scores(pooled), positive), pooling, fitted))
    return max(found, key=lambda row: row[:2])[2]


def _vector(kind: str, pooling: str) -> str:
    return f"gate {kind} {pooling}"


def _gate(kind: str, pooled: Pooled, **channels: object) -> Gate:
    return Gate(kind=kind, site=pooled.site, threshold=0.0, **channels)  # type: ignore[arg-type]  (checked by the model)


def _needs_sae(pooled: Pooled) -> None:
    if not pooled.features:
        raise PlanError("a gate on features needs an SAE at its site", hint="name one, or fit a dense or cosine gate")


FITTERS: dict[str, Callable[[Pooled, Labels, int], FittedGate]] = {
    "feature": _fit_feature,
    "probe": _fit_probe,
    "dense": _fit_dense,
    "cosine": _fit_cosine,
}


def fit_gate(kind: str, pooled: Pooled, positive: Labels, *, seed: int = 0) -> FittedGate:
    """A gate that tells the positive prompts from the others. Raises `NotEnoughDataError` without prompts of both
    sorts, `PlanError` for a kind that is not fitted or that lacks an SAE."""
    if kind not in FITTERS:
        raise PlanError(f"a gate of kind '{kind}' cannot be fitted", hint=f"one of: {', '.join(FITTERS)}")
    if positive.all() or not positive.any():
        raise NotEnoughDataError("a gate needs both prompts that should trigger it and prompts that should not")
    return FITTERS[kind](pooled, positive, seed)


# ---- ensembles -----------------------------------------------------------------------------------------------------

FitMember = Callable[[str, Pooled, Labels], FittedGate]
"""(kind, what was pooled at its site, which prompts it is for) -> a member."""


def member_of(text: str) -> tuple[str, str]:
    """KIND or KIND@SITE. Raises `PlanError` for a kind that cannot be fitted, `SiteError` for no site."""
    kind, _, site = text.partition("@")
    if kind not in FITTERS:
        raise PlanError(f"no member of kind '{kind}' can be fitted", hint=f"one of: {', '.join(FITTERS)}; KIND@SITE")
    return kind, Site.parse(site).name if site else ""


def fit_ensemble(
    members: Sequence[str],
    pooled: Pooled,
    positive: Labels,
    *,
    combine: str = "mean",
    seed: int = 0,
    fit: FitMember | None = None,
) -> FittedGate:
    """One gate of several. A member that is named again is fitted on prompts that are drawn anew with replacement.

    Raises `PlanError` for fewer than two members, and as `fit_gate` does.
    """
    if len(members) < 2:
        raise PlanError("an ensemble has two members or more", hint="--members probe,dense")
    fit = fit or (lambda kind, here, wanted: fit_gate(kind, here, wanted, seed=seed))
    rng, named, found = np.random.default_rng(seed), Counter[str](), []
    for number, text in enumerate(members):
        kind, site = member_of(text)
        rows = np.arange(len(positive)) if not named[text] else rng.integers(0, len(positive), len(positive))
        named[text] += 1
        here = pooled.of_site(site)
        fitted = fit(kind, here.taken(rows), positive[rows])
        found.append(_in_spreads(fitted, here.at(~positive)).renamed(f"member {number}"))
    empty = Gate(kind="ensemble", members=tuple(each.gate for each in found), combine=combine, threshold=0.0, window=1)
    return _joined(empty, found)


def _in_spreads(fitted: FittedGate, harmless: Pooled) -> FittedGate:
    """The same gate with harmless prompts' mean score at 0, in units of their standard deviation."""
    scores, gate = fitted.scores(harmless), fitted.gate
    mean, spread = float(scores.mean()), max(float(scores.std()), 1e-6)
    return fitted.changed(weights=tuple(w / spread for w in gate.weights), bias=(gate.bias - mean) / spread)


def _joined(gate: Gate, members: Sequence[FittedGate]) -> FittedGate:
    vectors = {name: vector for member in members for name, vector in member.vectors.items()}
    return FittedGate(gate.changed(members=tuple(member.gate for member in members)), vectors)
