"""Generic or specific damage: a plan's cost beside pushes of the same size that have nothing to do with it.

1. Controls are scaled until their mean ||x'-x|| / ||x|| on the same texts is the plan's: random and unrelated features
   of a similar firing rate, random directions of the residual stream, and the SAE's pass-through, which has no size.
2. Each is measured by KL on benign replies and by multiple choice answered by likelihood.
3. Parts of the plan are measured alone and in pairs: the pair's KL against the sum of its parts'.

If any push of that size costs as much, the damage is generic; if the plan costs more, it is the feature's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clampdown.errors import StrengthError
from clampdown.evaluation.control_arms import Matching, Material, control_arms
from clampdown.evaluation.controls import FeatureTable, direction_plan, matched_plan
from clampdown.evaluation.utility import (
    Cost,
    Forced,
    Progress,
    costs,
    mean_edit,
    option_accuracy,
    option_choices,
    steers_generated,
)
from clampdown.explanation import Damage, Joint
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.arms import BASELINE, Arm
from clampdown.steering.plan import Edit, Plan
from clampdown.study.explain import Codes, Inside
from clampdown.types import ArmKind, Interval, Prompt

THROUGH, NOT_ASKED = "pass-through", ("difference of means", "system prompt")
QUANTITY = "mean ||x'-x|| / ||x|| on benign text"
MATCHED_ON = 16
MOST_PARTS = 6
"""Pairs grow with the square: of a plan with more parts the first ones are paired, and a note says so."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What pushes are measured on: benign replies, and multiple-choice items (none: no accuracy)."""

    lm: LanguageModel
    saes: tuple[Sae, ...]
    texts: tuple[Forced, ...]
    items: tuple[Prompt, ...]

    @property
    def sample(self) -> tuple[Forced, ...]:
        """The texts that sizes are matched on, spread over all: a search measures them many times."""
        return self.texts[:: -(-len(self.texts) // MATCHED_ON)]


@dataclass(frozen=True, slots=True)
class Pushes:
    """The plan and its controls as arms, and what could not be had."""

    arms: tuple[Arm, ...]
    kinds: tuple[str, ...]
    notes: tuple[str, ...]


def norm_matched(bench: Bench, plan: Plan, found: Inside, *, n: int, seed: int) -> Pushes:
    """The open plan, `n` random features, an unrelated one, `n` random directions and the pass-through."""
    opened = plan.ungated()
    measure = mean_edit(bench.lm, bench.saes, bench.sample)
    material = Material(_table(bench.saes, opened, found), None)
    arms, kinds, notes = [Arm(plan.name, ArmKind.FEATURE, opened)], ["plan"], []
    goal = measure(opened)
    if not goal > 0:
        return Pushes(tuple(arms), tuple(kinds), ("controls: the plan changes nothing on these texts",))
    for row in control_arms(opened, material, Matching(QUANTITY, measure, n, seed)):
        if row.arm is None and row.name not in NOT_ASKED:
            notes.append(f"{row.name}: {row.note}")
        elif row.arm and row.plan and not any(_same_edits(row.plan, arm.plan) for arm in arms):
            arms.append(row.arm)
            kinds.append(row.name if row.name == THROUGH else "feature")
            notes += [f"{row.name}: {row.note}"] if row.note and row.name != THROUGH else []
    for i, vector in enumerate(random_directions(bench.lm.d_model, n, seed), 1):
        name = f"random direction {i}"
        try:
            match = matched_plan(direction_plan(opened, vector, name), measure, goal)
        except StrengthError as error:
            notes.append(f"{name}: {error.message}")
        else:
            arms.append(Arm(name, ArmKind.DIRECTION, match.plan))
            kinds.append("direction")
    return Pushes(tuple(arms), tuple(kinds), tuple(notes))


def _same_edits(a: Plan, b: Plan | None) -> bool:
    """The same operators on the same features: the unrelated control may be one of the random ones."""
    return b is not None and _targets(a) == _targets(b)


def _targets(plan: Plan) -> list[tuple[object, ...]]:
    return [(edit.operator, edit.error_term, edit.correction, edit.features) for edit in plan.edits]


def random_directions(d_model: int, n: int, seed: int) -> list[list[float]]:
    """`n` unit vectors, uniform on the sphere."""
    drawn = np.random.default_rng(seed).standard_normal((n, d_model))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).tolist()


def _table(saes: Sequence[Sae], plan: Plan, found: Inside) -> FeatureTable | None:
    """Firing rates on the texts' own tokens. A steered feature that never fires there counts as firing once, or no
    rate could be matched. None unless one SAE holds every steered feature."""
    sites = {edit.site for edit in plan.edits if edit.features}
    sae = next((sae for sae in saes if {sae.cfg.site.name} == sites), None)
    codes: Codes | None = found.codes.get(sae.cfg.site) if sae else None
    if sae is None or codes is None:
        return None
    rate = codes.means[2].numpy().copy()
    own = [feature for edit in plan.edits for feature in edit.features]
    rate[own] = np.maximum(rate[own], 1 / max(codes.n, 1))
    return FeatureTable(rate, np.zeros_like(rate), sae.W_dec.float().cpu().numpy())


def damage(
    bench: Bench, pushes: Pushes, *, progress: Progress | None = None
) -> tuple[tuple[Damage, ...], Mapping[str, Interval], tuple[str, ...]]:
    """Every push's cost, the unsteered model's accuracy, and what was not measured.

    Multiple choice generates no token, so it says nothing about a plan that steers generated tokens only.
    """
    found = costs(bench.lm, bench.saes, pushes.arms, bench.texts, progress=progress)
    accuracy: Mapping[str, Mapping[str, Interval]] = {}
    notes: tuple[str, ...] = ()
    if any(map(steers_generated, pushes.arms)):
        notes = ("capability: this plan steers generated tokens, and multiple choice by likelihood generates none",)
    elif any(prompt.options for prompt in bench.items):
        arms = [BASELINE, *pushes.arms]
        accuracy = option_accuracy(option_choices(bench.lm, bench.saes, arms, bench.items))
    else:
        notes = ("capability: none of the prompts is multiple choice",)
    rows = tuple(
        _row(arm.name, kind, found[arm.name], accuracy.get(arm.name, {}))
        for arm, kind in zip(pushes.arms, pushes.kinds, strict=True)
    )
    return rows, accuracy.get(BASELINE.name, {}), notes


def _row(name: str, kind: str, cost: Cost, accuracy: Mapping[str, Interval]) -> Damage:
    return Damage(name, kind, cost.kl, cost.top1_agreement, cost.mean_edit, accuracy)


def parts(plan: Plan) -> dict[str, Plan]:
    """The plan cut into single features and single dense edits, by name, without its gate."""
    found: dict[str, Plan] = {}
    for edit in plan.edits:
        if not edit.features:
            found[f"{edit.operator} {edit.vector}"] = _with_edits(plan, [edit])
        for feature, strength in zip(edit.features, edit.strengths, strict=False):
            one = edit.changed(features=(feature,), strengths=(strength,), p99=None)
            found[f"{feature} at {edit.site}"] = _with_edits(plan, [one])
    return found


def _with_edits(plan: Plan, edits: Sequence[Edit]) -> Plan:
    return plan.ungated().changed(edits=tuple(edits))


def joints(bench: Bench, plan: Plan) -> tuple[tuple[Joint, ...], tuple[str, ...]]:
    """Each pair of the plan's parts against the sum of the two. Nothing for a plan of one part."""
    every = parts(plan)
    if len(every) < 2:
        return (), ()
    single = dict(itertools.islice(every.items(), MOST_PARTS))
    pairs = list(itertools.combinations(single, 2))
    plans = {(name,): part for name, part in single.items()}
    plans |= {pair: _with_edits(plan, [e for name in pair for e in single[name].edits]) for pair in pairs}
    arms = [Arm(" & ".join(names), ArmKind.FEATURE, each) for names, each in plans.items()]
    kl = {name: cost.kl for name, cost in costs(bench.lm, bench.saes, arms, bench.texts).items()}
    rows = tuple(Joint(a, b, kl[f"{a} & {b}"], _sum(kl[a], kl[b])) for a, b in pairs)
    left = len(every) - len(single)
    return rows, (f"interactions: the first {MOST_PARTS} of {len(every)} parts were paired",) if left else ()


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b
