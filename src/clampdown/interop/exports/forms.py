"""What a plan does, in the words that another tool's format has.

1. A format says which operators and scopes it has words for, and where it can act (`Words`). Nearly all add one
   constant vector at a place, to every token of every conversation.
2. `unsaid` lists what a plan does beyond that: each with the reason, and with what could be written instead.
3. What is left are numbers: the sum of the vectors at each site (`offsets`), and the directions that are projected out
   (`ablations`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from clampdown.activations.sinks import sinks_at
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import FeatureSource
from clampdown.steering.operators import OPERATORS
from clampdown.steering.plan import Edit, Plan
from clampdown.types import Point, Site

SCALED_BY_INPUT = frozenset({"constant_norm_rescale", "layer_norm", "centred", "centred_constant_norm_rescale"})
"""Input normalisations with which what a feature writes depends on the token: not one constant vector."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A plan with the model and the SAEs that it is about."""

    plan: Plan
    lm: LanguageModel
    saes: Mapping[str, FeatureSource]

    def saying(self, plan: Plan) -> Bound:
        return replace(self, plan=plan)


@dataclass(frozen=True, slots=True)
class Unsaid:
    """Something that a plan does and a format cannot say. `instead`: what a lossy export does; None: nothing is near
    enough to be written."""

    what: str
    why: str
    instead: str | None

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


Faults = Callable[[Bound], Iterator[Unsaid]]
Near = Callable[[Edit, Bound], tuple[Edit, ...] | None]


def _none(_bound: Bound) -> Iterator[Unsaid]:
    return iter(())


def _no_nearer(_edit: Edit, _bound: Bound) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Words:
    """What a format has words for. `place` says why nothing can be written at a site (None: it can); `more` finds what
    only this format cannot say, and `near` what it can say that is nearer to an edit than a constant."""

    operators: frozenset[str]
    scopes: frozenset[str] = frozenset({"all"})
    place: Callable[[Site, LanguageModel], str | None] = lambda _site, _lm: None
    more: Faults = _none
    near: Near = _no_nearer


def unsaid(bound: Bound, words: Words) -> list[Unsaid]:
    """Everything that the plan does and the format cannot say."""
    plan = bound.plan
    found = [*_conditions(plan), *_sinks(bound)]
    for edit in plan.edits:
        found += _of_edit(edit, bound, words)
    return [*found, *words.more(bound)]


def _conditions(plan: Plan) -> Iterator[Unsaid]:
    if plan.gate is not None:
        where = plan.gate.scorer or ", ".join(reader.site for reader in plan.gate.readers)
        yield Unsaid(
            f"the gate ({plan.gate.kind}, {where})",
            "the format has no condition: it would steer every conversation",
            "every conversation is steered",
        )
    if plan.otherwise is not None:
        yield Unsaid("the second branch", "the format has one branch", "it is left out")


def spared_sinks(bound: Bound) -> list[Site]:
    """Where the plan leaves attention sinks out that the model has."""
    if bound.plan.sinks == "include":
        return []
    sites = list(dict.fromkeys(Site.parse(edit.site) for edit in bound.plan.edits))
    return [site for site, sinks in sinks_at(bound.lm, sites).items() if sinks]


def _sinks(bound: Bound) -> Iterator[Unsaid]:
    for site in spared_sinks(bound):
        why = "the format steers every token, the first one too"
        yield Unsaid(f"attention sinks at {site} are left out", why, "sinks are steered too")


def _of_edit(edit: Edit, bound: Bound, words: Words) -> Iterator[Unsaid]:
    what = f"{edit.operator} at {edit.site}"
    reason = words.place(Site.parse(edit.site), bound.lm)
    if reason is not None:
        yield Unsaid(what, reason, None)
    if edit.operator not in words.operators:
        yield Unsaid(what, _why_not(edit, words), _INSTEAD)
    elif edit.features and bound.saes[edit.site].cfg.normalize_activations in SCALED_BY_INPUT:
        why = "the SAE normalises its input, so that what a feature adds differs from token to token"
        yield Unsaid(what, why, _INSTEAD)
    if edit.error_term != "keep":
        done = "dropped" if edit.error_term == "drop" else "corrected"
        yield Unsaid(f"the error term at {edit.site} is {done}", "the format has no SAE", "the error term is kept")
    if edit.scope not in words.scopes:
        has = ", ".join(sorted(words.scopes))
        yield Unsaid(f"scope '{edit.scope}' at {edit.site}", f"the format has: {has}", "every token is steered")


_INSTEAD = "its mean effect on prompts is added to every token"


def _why_not(edit: Edit, words: Words) -> str:
    if edit.operator == "ablate_direction":
        return "the format adds vectors and projects none out"
    if OPERATORS[edit.operator].dense:
        return f"the format has: {', '.join(sorted(words.operators))}"
    if edit.operator == "add":
        return "the format has no SAE features"
    return "what it adds depends on the feature's activation at the token, and the format has no SAE to read it with"


def output_of(site: Site) -> int | None:
    """The block whose output a site is; None for sites inside a block, and for the embeddings."""
    if site.point is Point.RESID_POST:
        return site.layer
    return site.layer - 1 if site.point is Point.RESID_PRE and site.layer else None


def offsets(bound: Bound) -> dict[Site, Float[Tensor, " d_model"]]:
    """At each site, the sum of the constant vectors that the plan adds there."""
    found: dict[Site, Tensor] = {}
    for edit in bound.plan.edits:
        site = Site.parse(edit.site)
        if edit.operator == "add":
            view = bound.saes[edit.site].select(edit.features)
            vector = torch.tensor(edit.strengths) @ view.directions.float().cpu()
        elif edit.operator == "add_direction":
            vector = edit.strengths[0] * torch.tensor(bound.plan.vectors[edit.vector or ""])
        else:
            continue
        found[site] = found[site] + vector if site in found else vector
    return found


def ablations(plan: Plan) -> dict[Site, list[tuple[Float[Tensor, " d_model"], float]]]:
    """At each site, the unit directions that are projected out, each with how much of it."""
    found: defaultdict[Site, list[tuple[Tensor, float]]] = defaultdict(list)
    for edit in plan.edits:
        if edit.operator == "ablate_direction":
            vector = torch.tensor(plan.vectors[edit.vector or ""])
            found[Site.parse(edit.site)].append((vector / vector.norm(), edit.strengths[0]))
    return dict(found)
