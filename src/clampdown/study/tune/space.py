"""What `clampdown tune` searches: features and their units, combinations that screening left, gates fitted up front.

Everything here is decided once, written down under `search/`, and read back by a run that goes on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clampdown.discovery.finders import DEFAULT, Effort, Material, run_finder
from clampdown.discovery.refusal_tokens import find_refusal_tokens
from clampdown.documents import read_json
from clampdown.errors import NotEnoughDataError, PlanError, ScopeError, StoreError
from clampdown.steering.gate_fitting import FITTERS, FittedGate
from clampdown.steering.operators import OPERATORS
from clampdown.steering.plan import Edit, Plan
from clampdown.steering.scopes import SCOPES
from clampdown.steering.units import calibrate
from clampdown.store import write_feature_set, write_json
from clampdown.study.correcting import corrected
from clampdown.study.methods import gated_set
from clampdown.study.methods.gated_set import opened
from clampdown.study.progress import Stages
from clampdown.study.screening import Halving, Screened, prefills_of, screen
from clampdown.study.study import Study
from clampdown.study.sweep import read_features
from clampdown.study.tune.beyond import Beyond, cones, find_beyond, full_scores
from clampdown.study.tune.gates import GateKey, Promise, cached_gates, fit_gates, gate_row, kind_of, known_gates
from clampdown.study.tune.hand_made import hand_made, hand_made_gates, starts_of, stretched, with_second_side
from clampdown.study.tune.prompts import PromptSets, Scale, harmful
from clampdown.study.tune.search import CONFIDENCE, HAND_MADE, KEEP, NO_GATE, Combination, Setting, Space
from clampdown.types import Prompt, PromptRole, Suite

UNIT_PROMPTS = 40
TOKEN_PROMPTS = 24
PAIRED = 3
"""How many of the first features are combined with each other."""
SCREENED_MULTIPLES = (0.5, 1.0, 2.0)
HOPEFUL = 0.4
"""Share of the best gain in refusal log-odds that a combination must reach at some strength."""
HOPELESS_KL = 5.0
"""Nats at the first token of benign prompts from which on a plan that always steers is not worth a trial."""
EFFORT = Effort(attributed=16, finalists=12, clamped=12, benign=8)


@dataclass(frozen=True, slots=True)
class Choices:
    """What may be combined. `gates` are kinds, a probe's with the largest number of its features (`probe40`);
    `gate_confidences` how sure their promises may be. With `hand_made` the recipe of `gated_set.py` is where the search
    begins. `directions` are how many are raised together beside the feature sets; `error_terms` and `leasts` (the share
    of the strength at the threshold) are for plans behind gates."""

    features_file: Path | None = None
    operators: tuple[str, ...] = ("clamp", "floor", "add")
    scopes: tuple[str, ...] = ("all", "prompt", "assistant")
    gates: tuple[str, ...] = (NO_GATE, "probe40", "probe100", "dense")
    gate_budgets: tuple[float, ...] = (0.01, 0.02, 0.05)
    set_size: int = 2
    gate_confidences: tuple[float, ...] = (0.9, 0.95)
    hand_made: bool = True
    directions: tuple[int, ...] = (1, 3)
    error_terms: tuple[str, ...] = (KEEP,)
    leasts: tuple[float, ...] = (1.0, 0.5)

    @property
    def gated(self) -> bool:
        return set(self.gates) != {NO_GATE}

    @property
    def promises(self) -> tuple[Promise, ...]:
        return tuple(itertools.product(self.gate_budgets, self.gate_confidences))

    def check(self) -> None:
        """Raises `PlanError` and `ScopeError` for what there is not, or what a prefill cannot screen."""
        for name in self.operators:
            if name not in OPERATORS or OPERATORS[name].dense:
                allowed = [known for known, operator in OPERATORS.items() if not operator.dense]
                raise PlanError(f"'{name}' is not an operator on features", hint=f"one of: {', '.join(allowed)}")
        for name in self.scopes:
            if name not in SCOPES or name == "generated":
                allowed = [known for known in SCOPES if known != "generated"]
                raise ScopeError(f"cannot search scope '{name}': screening reads prefills", hint=", ".join(allowed))
        for name in self.gates:
            if name != NO_GATE and kind_of(name)[0] not in FITTERS:
                raise PlanError(f"no gate of kind '{name}' can be fitted", hint=f"one of: {NO_GATE}, {known_gates()}")
        for name in self.error_terms:
            if name not in (KEEP, "correct"):
                raise PlanError(f"error term '{name}' is not searched", hint="keep, correct")
        for least in self.leasts:
            if not 0 <= least <= 1:
                raise PlanError(f"the least strength is a share from 0 to 1, got {least:g}", hint="for example 1,0.5")
        if min(self.directions, default=1) < 1:
            raise PlanError("directions are counted from 1", hint="for example 1,3")
        for share in (*self.gate_budgets, *self.gate_confidences):
            if not 0 < share < 1:
                raise PlanError(
                    f"a gate's budget and confidence are shares between 0 and 1, got {share:g}",
                    hint="for example 0.02 and 0.95",
                )


@dataclass(frozen=True, slots=True)
class Candidates:
    """The space, each feature's unit, the gates by (kind, budget, confidence), what screening read of every candidate,
    and the hand-made plan, if it is searched."""

    space: Space
    units: Mapping[int, float]
    gates: Mapping[GateKey, FittedGate]
    screening: tuple[Mapping[str, Any], ...] = ()
    hand_made: Plan | None = None
    beyond: Beyond = field(default_factory=Beyond)

    def plan(self, study: Study, setting: Setting) -> Plan:
        """What a setting does."""
        if setting.combination.operator == HAND_MADE:
            assert self.hand_made is not None, "the space has hand-made edits only where there are some"
            plan = stretched(opened(self.hand_made), setting.multiple)
        elif setting.combination.directions:
            plan = self.beyond.plan(study, setting.combination, setting.multiple)
        else:
            plan = plan_at(study, setting.combination, setting.multiple, self.units)
        if setting.gate == NO_GATE or setting.budget is None:
            return plan.named(str(setting))
        if setting.error_term != KEEP and self.beyond.error is not None:
            plan = corrected(plan, study.sae, self.beyond.error)
        key = (setting.gate, setting.budget, setting.confidence)
        gate = self.gates[key]
        if setting.least < 1:
            gate = gate.changed(least=setting.least, full=self.beyond.full[key])
        plan = plan.behind(gate, str(setting))
        return with_second_side(plan, self.hand_made) if setting.down and self.hand_made else plan


def plan_at(study: Study, combination: Combination, multiple: float, units: Mapping[int, float]) -> Plan:
    """The combination at a multiple of each feature's unit; the strength of `scale` is the multiple itself."""
    sae, site = study.sae, study.sae.cfg.site.name
    own = [1.0 if combination.operator == "scale" else units[feature] for feature in combination.features]
    edit = Edit(
        site=site,
        operator=combination.operator,
        features=combination.features,
        strengths=tuple(multiple * unit for unit in own),
        scope=combination.scope,
    )
    return Plan.of(study.lm, [sae], [edit], f"{combination} x{multiple:g}")


def find_candidates(
    study: Study, sets: PromptSets, scale: Scale, choices: Choices, out: Path, stages: Stages
) -> Candidates:
    """Find or read features, screen, fit gates. What is under `out` already is read instead."""
    kinds = [kind for kind in choices.gates if kind != NO_GATE]
    gates = cached_gates(out / "gates.json")
    if gates is None:
        gates = fit_gates(study, sets, kinds, choices.promises, out, stages) if kinds else {}
        write_json(out / "gates.json", [gate_row(key, fitted) for key, fitted in gates.items()])
    found = out / "space.json"
    beyond = _beyond(study, sets, choices, out, stages)
    if not found.exists():
        units = _units(study, sets, _features(study, sets, scale, choices, out, stages), stages)
        screened = _screen(study, sets, scale, choices, units, beyond, stages)
        combinations = kept_combinations(screened, scale.feature_sets)
        rows = [each.facts() | {"operator": each.plan.edits[0].operator} for each in screened]
        write_json(found, {"units": units, "combinations": combinations, "screening": rows})
    raw = read_json(found)
    try:
        units = {int(feature): float(unit) for feature, unit in raw["units"].items()}
        combinations = tuple(Combination(**{**c, "features": tuple(c["features"])}) for c in raw["combinations"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{found} is not a search space: {error!r}", hint="delete it to screen again") from error
    made = hand_made(study, sets, scale, units, out, stages) if choices.hand_made and choices.gated else None
    if made is not None:
        combinations = (*combinations, Combination(opened(made).edits[0].features, HAND_MADE, gated_set.SCOPE))
        gates = {**gates, **hand_made_gates(study, sets, made, choices.promises)}
    fitted = dict.fromkeys(kind for kind, _, _ in gates)
    open_gate = (NO_GATE,) if NO_GATE in choices.gates else ()
    budgets = tuple(sorted({budget for _, budget, _ in gates}))
    sure = tuple(sorted({confidence for _, _, confidence in gates}))
    space = Space(
        combinations, (*open_gate, *fitted), budgets, confidences=sure or (CONFIDENCE,), promises=frozenset(gates)
    )
    if made is not None:
        starts = starts_of(combinations[-1], made)
        space = replace(space, sides=tuple(start.down for start in starts), starts=starts)
    if choices.gated and set(choices.leasts) != {1.0}:
        beyond = replace(beyond, full=full_scores(study, sets, gates))
    terms = choices.error_terms if beyond.error is not None else (KEEP,)
    space = replace(space, error_terms=terms, leasts=choices.leasts, growing=frozenset(beyond.full))
    return Candidates(space, units, gates, tuple(raw["screening"]), made, beyond)


def _beyond(study: Study, sets: PromptSets, choices: Choices, out: Path, stages: Stages) -> Beyond:
    error = choices.gated and set(choices.error_terms) != {KEEP}
    if not error and not choices.directions:
        return Beyond()
    return find_beyond(study, sets, _tempting(study, sets), choices.directions, error, out / "beyond.json", stages)


def _features(
    study: Study, sets: PromptSets, scale: Scale, choices: Choices, out: Path, stages: Stages
) -> tuple[int, ...]:
    """The first features of the given file, or of the default finder."""
    if choices.features_file:
        return read_features(study, choices.features_file)[: scale.features]
    with stages.stage("Finding features") as tick:
        given = finder_material(study, sets, scale)
        found = run_finder(DEFAULT, given)
        tick(1, 1)
    write_feature_set(out.parent / "features" / f"{found.finder}.json", found)
    return tuple(found.ranking)[: scale.features]


def finder_material(study: Study, sets: PromptSets, scale: Scale) -> Material:
    """Discovery prompts: harmful, benign, and those inside a wrapper beside their plain twins, where they are known."""
    return Material(
        study.lm,
        study.sae,
        _tempting(study, sets),
        sets.benign_of(sets.discovery) or sets.calibration.prompts,
        study.data.pairs(scale.discovery),
        study.judge,
        effort=EFFORT,
        seed=study.seed,
    )


def _tempting(study: Study, sets: PromptSets) -> tuple[Prompt, ...]:
    """Plain harmful discovery prompts, or others where there are none."""
    plain = [p for s in sets.discovery if study.data.roles[s.name] is PromptRole.HARMFUL for p in s.prompts]
    return tuple(plain or _in_turn(harmful(sets.discovery)))


def _in_turn(suites: Sequence[Suite]) -> list[Prompt]:
    """One of each suite after the other, so that the first and the last few stand for all."""
    rows = itertools.zip_longest(*(suite.prompts for suite in suites))
    return [prompt for row in rows for prompt in row if prompt is not None]


def _units(study: Study, sets: PromptSets, features: Sequence[int], stages: Stages) -> dict[int, float]:
    """Each feature's largest activation on discovery prompts, without those that never fired."""
    shown = [p for suite in sets.discovery if suite in harmful(sets.discovery) or suite.name == sets.benign
             for p in suite.prompts[:UNIT_PROMPTS]]  # fmt: skip
    with stages.stage("Measuring units"):
        largest = calibrate(study.lm, study.sae.cfg.site, study.sae.select(features), shown).largest
    units = {feature: unit for feature, unit in zip(features, largest, strict=True) if unit > 0}
    if not units:
        raise NotEnoughDataError("none of the features ever fired on the discovery prompts: none has a strength")
    return units


def combinations_of(features: Sequence[int], choices: Choices) -> list[Combination]:
    """Every feature alone, the first few together, with every operator and scope."""
    sets: list[tuple[int, ...]] = [(feature,) for feature in features]
    for size in range(2, choices.set_size + 1):
        sets += itertools.combinations(features[:PAIRED], size)
    return [Combination(*row) for row in itertools.product(sets, choices.operators, choices.scopes)]


def _screen(
    study: Study,
    sets: PromptSets,
    scale: Scale,
    choices: Choices,
    units: Mapping[int, float],
    beyond: Beyond,
    stages: Stages,
) -> list[Screened]:
    """Successive halving over all combinations at a few multiples, on the trials' own prompts. A gate may make any KL
    affordable, so that plans are dropped for theirs only when all must always steer."""
    tempting = [p for suite in harmful(sets.trial) for p in suite.prompts[: scale.screened]]
    benign = sets.benign_of(sets.trial)[: len(tempting)]
    every = combinations_of(tuple(units), choices)
    plans = [plan_at(study, c, multiple, units) for c in every for multiple in SCREENED_MULTIPLES]
    more = cones(beyond, choices.directions, choices.scopes)
    plans += [beyond.plan(study, c, multiple) for c in more for multiple in SCREENED_MULTIPLES]
    halving = Halving(
        keep=max(1, len(plans) // 2),
        kl_limit=None if choices.gated else HOPELESS_KL,
    )
    with stages.stage(f"Screening {len(plans)} candidates") as tick:
        asked = [*_in_turn(harmful(sets.discovery))[:TOKEN_PROMPTS], *sets.benign_of(sets.discovery)[:TOKEN_PROMPTS]]
        tokens = find_refusal_tokens(study.lm, asked, study.judge)
        measure = prefills_of(study.lm, study.sae, tempting, benign, tokens, seed=study.seed)
        return screen(plans, measure, measure.n_prompts, halving, tick)


def kept_combinations(screened: Sequence[Screened], n: int) -> list[Combination]:
    """The combinations that screening left: kept plans whose best gain is at least `HOPEFUL` of the best of all, of the
    `n` feature sets that gain most, and directions. First tokens tell features apart, operators and scopes hardly.

    Raises `NotEnoughDataError` when none gains anything.
    """
    best: dict[Combination, tuple[float, float]] = {}
    for each in screened:
        if each.dropped or not each.reading.gain > 0:
            continue
        edit = each.plan.edits[0]
        key = (-each.reading.gain, each.reading.kl if math.isfinite(each.reading.kl) else math.inf)
        directions = 0 if edit.features else len(each.plan.edits)
        combination = Combination(edit.features, edit.operator, edit.scope, directions)
        best[combination] = min(best.get(combination, key), key)
    if not best:
        raise NotEnoughDataError(
            "no combination of features, operators and scopes raised the log-odds of refusing harmful prompts",
            hint="other --features, more --operators, or a larger --top",
        )
    ranked = sorted(best, key=lambda combination: (*best[combination], combination))
    hopeful = [c for c in ranked if best[c][0] <= HOPEFUL * best[ranked[0]][0]]
    sets = list(dict.fromkeys(combination.features for combination in hopeful if combination.features))[:n]
    return [combination for combination in hopeful if combination.directions or combination.features in sets]
