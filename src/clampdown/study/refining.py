"""From found features to a `plan.toml`: refinement and the measures that it decides by, on held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from clampdown.discovery.finders import Material
from clampdown.discovery.refine import Clamps, Limits, Measure, Refined, Rescore, refine
from clampdown.discovery.screening import BenignKl, PrefillRefusal
from clampdown.errors import NotEnoughDataError
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.plan import Edit, Plan, write_plan
from clampdown.store import write_json
from clampdown.study.progress import Stages
from clampdown.types import FeatureSet, Prompt

POOL = 8
MIN_GAIN = 0.1


@dataclass(frozen=True, slots=True)
class Refinement:
    """The refined set, the plan that steers it, and where that was written."""

    refined: Refined
    plan: Plan
    path: Path


def refine_found(
    given: Material,
    found: FeatureSet,
    held_out: tuple[Sequence[Prompt], Sequence[Prompt]],
    set_size: int,
    out: Path,
    stages: Stages,
) -> Refinement:
    """Refine a finder's first features on held-out harmful and harmless prompts; write `plan.toml`, `refined.json`."""
    lm, sae, effort = given.lm, given.sae, given.effort
    with stages.stage("Refining"):
        units = _units(given, found)
        measure = make_measure(given, *held_out)
        pool = [Clamps((f,), (units[f],)) for f in found.ranking[:POOL] if f in units]
        limits = Limits(budget=1.1 * effort.kl, min_gain=MIN_GAIN, max_size=set_size)
        refined = refine(pool, measure, _around(sae, found, units), limits)
    plan = plan_of(lm, sae, refined.best.clamps, effort.scope)
    write_plan(out / "plan.toml", plan)
    write_json(
        out / "refined.json", {"schema": 1, "finder": found.finder, "kl_budget": limits.budget, "refined": refined}
    )
    return Refinement(refined, plan, out / "plan.toml")


def plan_of(lm: LanguageModel, sae: Sae, clamps: Clamps, scope: str) -> Plan:
    """One edit that clamps all features together."""
    site, features = sae.cfg.site.name, clamps.features
    edit = Edit(site=site, operator="clamp", features=features, strengths=clamps.strengths, scope=scope)
    return Plan.of(lm, [sae], [edit], "clamp " + " + ".join(map(str, features)))


def make_measure(given: Material, tempting: Sequence[Prompt], benign: Sequence[Prompt]) -> Measure:
    """Gain: change of the refusal log-odds on prompts that tempt the model. Cost: benign KL, nats per token."""
    refusal = PrefillRefusal(given.lm, given.sae, tempting, given.tokens)
    kl = BenignKl(given.lm, given.sae, benign)

    def plans(sets: Sequence[Clamps]) -> list[Plan]:
        return [plan_of(given.lm, given.sae, clamps, given.effort.scope) for clamps in sets]

    return Measure(lambda sets: refusal(plans(sets)), lambda sets: kl(plans(sets)))


def _units(given: Material, found: FeatureSet) -> dict[int, float]:
    """A strength to start from: the one that a causal check used, else the largest activation that was seen."""
    peaks = np.maximum.reduce(
        [given.contrast.activations.moments(name).max for name in given.contrast.activations.poolings]
    )
    units = {f: float(peak) for f, peak in enumerate(peaks) if peak > 0}
    units |= {s.feature: s.scores["clamp_strength"] for s in found.features if "clamp_strength" in s.scores}
    if not any(feature in units for feature in found.ranking[:POOL]):
        raise NotEnoughDataError("none of the found features ever fired, so none has a strength to start from")
    return units


def _around(sae: Sae, found: FeatureSet, units: dict[int, float]) -> Rescore:
    """A new pool: the features whose decoder rows are most like those of the set, and the finder's next ones."""
    rows = sae.W_dec.float().cpu().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)

    def rescore(clamps: Clamps) -> list[Clamps]:
        alike = np.argsort(-(rows @ rows[list(clamps.features)].T).max(1)).tolist()
        order = [
            *clamps.features,
            *[f for f in alike if f in units][: POOL + len(clamps.features)],
            *found.ranking[:POOL],
        ]
        return [Clamps((f,), (units[f],)) for f in dict.fromkeys(order) if f in units]

    return rescore


def refinement_table(found: Refinement) -> Table:
    """Rounds and pairs for a terminal."""
    best = found.refined.best
    title = f"{found.plan.name}: {best.outcome.gain:+.2f} nats of refusal log-odds at {best.outcome.cost:.3f} benign KL"
    table = Table("round", "added", "dropped", "set", "gain", "KL", title=title)
    for number, one in enumerate(found.refined.rounds, 1):
        columns = (one.added, one.dropped, one.best.clamps.features)
        outcome = one.best.outcome
        table.add_row(
            str(number), *(" ".join(map(str, c)) for c in columns), f"{outcome.gain:+.2f}", f"{outcome.cost:.3f}"
        )
    for pair in found.refined.interactions:
        of_pair = f"{pair.first} with {pair.second}: {pair.pair:+.2f}, parts {pair.sum_of_parts:+.2f}"
        table.add_row("pair", of_pair, "", "", f"{pair.excess:+.2f}", "")
    return table
