"""What the page works with. Values and functions: what needs other packages (cards, finders, runs) is handed in.

Everything that the page reads of the model goes through `lm` here, a second set of modules over the same weights
(`reader`): steering hooks sit on modules, so that reading activations never meets a request that is being steered.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from torch import nn

from clampdown.models.layout import find_layout
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.serving.requests import Serves
from clampdown.serving.studio.frontier import PastRun
from clampdown.serving.studio.gates import GateScores
from clampdown.steering.plan import Plan

Tick = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class FeatureRow:
    """One feature in a list: the score that the list is sorted by (None: it has none) and what it promotes."""

    feature: int
    score: float | None
    promoted: tuple[str, ...]


@runtime_checkable
class Explores(Protocol):
    """Features to search, sort and look at. `card` is a whole HTML page; `find` runs a finder."""

    @property
    def scores(self) -> tuple[str, ...]: ...

    def listed(self, query: str, sort: str) -> tuple[FeatureRow, ...]: ...

    def on_text(self, words: str) -> tuple[FeatureRow, ...]: ...

    def card(self, feature: int, tick: Tick) -> str: ...

    def find(self, tick: Tick) -> None: ...

    def steer(self, feature: int, tick: Tick) -> Plan: ...


@runtime_checkable
class KeepsPlans(Protocol):
    """Plans by name. `save` raises `PlanError` for a name that cannot be, or that another plan has."""

    def names(self) -> tuple[str, ...]: ...

    def plan(self, name: str) -> Plan: ...

    def offered(self, plan: Plan) -> str | None:
        """Under which name the server answers with this plan, if it does."""
        ...

    def save(self, name: str, plan: Plan) -> str: ...


@runtime_checkable
class ReadsRuns(Protocol):
    """Past runs, newest first, and the plans of their points."""

    def runs(self) -> tuple[PastRun, ...]: ...

    def plan(self, run: str, arm: str) -> Plan: ...


@dataclass(frozen=True)
class Workbench:
    """All of it. `lm` is for reading only; answers come from `engine`. `model` is its name for clients."""

    lm: LanguageModel
    model: str
    sae: Sae | None
    engine: Serves
    plans: KeepsPlans
    runs: ReadsRuns
    explorer: Explores | None
    gate_scores: Callable[[Plan, Tick], GateScores]
    first: Plan
    url: str
    starters: tuple[str, ...] = ()
    max_tokens: int = 64


def reader(lm: LanguageModel) -> LanguageModel:
    """The same weights in modules of their own. To be made before anything hooks the model."""
    model: nn.Module = lm.model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    return replace(lm, model=twin, layout=find_layout(twin))
