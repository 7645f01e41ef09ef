"""The plans of a server by name, and their SAEs: read from files, in every process that needs them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clampdown.errors import PlanError, PlanMismatchError
from clampdown.models.loading import LanguageModel
from clampdown.saes.checkpoints import open_sae
from clampdown.saes.sae import FeatureSource
from clampdown.serving.plans import PlanTable
from clampdown.steering.gate_kinds import register_scorer
from clampdown.steering.plan import Plan, read_plan
from clampdown.steering.program import check_plan
from clampdown.types import Site
from clampdown_vllm.settings import Settings


@dataclass(frozen=True)
class Book:
    """`plans` by their name in a model's id; `saes` by site."""

    plans: Mapping[str, Plan]
    saes: Mapping[str, FeatureSource]

    @property
    def digests(self) -> dict[str, str]:
        return {name: plan.digest for name, plan in self.plans.items()}

    @property
    def sites(self) -> tuple[str, ...]:
        """Where anything is read or edited, lowest first."""
        return tuple(sorted({site for plan in self.plans.values() for site in plan.sites}, key=Site.parse))


def open_book(settings: Settings, device: str = "cpu") -> Book:
    """Read every plan and open the SAEs. Raises `PlanError` and `CheckpointError`, and `PlanMismatchError` when what is
    read is not what the front end checked."""
    table = PlanTable("model")
    for path in settings.plan_paths:
        for file in _files(path):
            table.add(read_plan(file))
    plans = dict(table)
    book = Book(plans, _saes(settings, plans, device))
    if settings.resolved and book.digests != settings.digests:
        raise PlanMismatchError("the plans' files changed since the server was started", hint="start it again")
    for name, where in settings.scorers.items():
        module, _, function = where.partition(":")
        register_scorer(name, getattr(importlib.import_module(module), function))
    return book


def _files(path: Path) -> list[Path]:
    found = sorted(path.glob("*.toml")) if path.is_dir() else [path]
    if not found:
        raise PlanError(f"{path} holds no plan", hint="plans are files that end in .toml")
    return found


def _saes(settings: Settings, plans: Mapping[str, Plan], device: str) -> dict[str, FeatureSource]:
    found: dict[str, FeatureSource] = {}
    for name in settings.saes:
        opened = open_sae(name, device=device)
        found[opened.cfg.site.name] = opened
    for ref in (ref for plan in plans.values() for ref in plan.saes):
        if ref.site not in found:
            found[ref.site] = open_sae(ref.name, device=device, site=Site.parse(ref.site))
        if found[ref.site].revision != ref.revision:
            raise PlanMismatchError(
                f"a plan needs the SAE {ref.name} at revision {ref.revision} at {ref.site}, where this server has "
                f"{found[ref.site].name} at {found[ref.site].revision}",
                hint="one server has one SAE per site: serve such plans apart",
            )
    return found


def check_book(book: Book, lm: LanguageModel) -> None:
    """Every plan against the served model's files. Raises `PlanError` and its kin."""
    for plan in book.plans.values():
        check_plan(plan, lm, book.saes)
        if any(gate.members for gate in plan.gates):
            raise PlanError(
                f"plan '{plan.name}' has a gate of kind 'ensemble', which the plugin for vLLM cannot read",
                hint="`clampdown serve` can; or calibrate a gate of one kind",
            )
        if any(gate.full is not None for gate in plan.gates):
            raise PlanError(
                f"the strength of plan '{plan.name}' grows with its gate's score, which the plugin for vLLM cannot do",
                hint="`clampdown serve` can; or calibrate the gate without --least",
            )
        if any(edit.correction for edit in plan.all_edits):
            raise PlanError(
                f"plan '{plan.name}' corrects the SAE's error term, which the plugin for vLLM can only keep or drop",
                hint="`clampdown serve` can; or make the plan with --error-term drop",
            )
