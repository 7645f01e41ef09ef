"""What `clampdown tune` searches: features and their units, combinations that screening left, gates fitted up front.

Everything here is decided once, written down under `search/`, and read back by a run that goes on.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clampdown.activations.collect import collect_to
from clampdown.activations.stream import plan_pass
from clampdown.discovery.finders import DEFAULT, Effort, Material, run_finder
from clampdown.discovery.refusal_tokens import find_refusal_tokens
from clampdown.documents import read_json
from clampdown.errors import NotEnoughDataError, PlanError, ScopeError, StoreError
from clampdown.steering.gate_fitting import FITTERS, FittedGate, Pooled, fit_gate, fit_probe_of, gate_reading
from clampdown.steering.operators import OPERATORS
from clampdown.steering.plan import Edit, Gate, Plan
from clampdown.steering.scopes import SCOPES
from clampdown.steering.turn_promise import Turnwise, last_turns, longest_turn
from clampdown.steering.units import calibrate
from clampdown.store import content_hash, write_feature_set, write_json
from clampdown.study.progress import Stages
from clampdown.study.screening import Halving, Screened, prefills_of, screen
from clampdown.study.study import Study
from clampdown.study.sweep import read_features
from clampdown.study.tune.prompts import PromptSets, Scale, harmful
from clampdown.study.tune.search import NO_GATE, Combination, Setting, Space
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
    """What may be combined. `gates` are kinds, a probe's with the largest number of its features (`probe40`)."""

    features_file: Path | None = None
    operators: tuple[str, ...] = ("clamp", "floor", "add")
    scopes: tuple[str, ...] = ("all", "prompt", "assistant")
    gates: tuple[str, ...] = (NO_GATE, "probe40", "probe100", "dense")
    gate_budgets: tuple[float, ...] = (0.01, 0.02, 0.05)
    set_size: int = 2

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
            if name != NO_GATE and _kind(name)[0] not in FITTERS:
                raise PlanError(f"no gate of kind '{name}' can be fitted", hint=f"one of: {NO_GATE}, {_known_gates()}")
        for budget in self.gate_budgets:
            if not 0 < budget < 1:
                raise PlanError(f"a gate's budget is a share between 0 and 1, got {budget:g}", hint="for example 0.02")


def _known_gates() -> str:
    return ", ".join("probe or probeN (at most N features)" if kind == "probe" else kind for kind in FITTERS)


def _kind(name: str) -> tuple[str, int]:
    """`probe10` as ("probe", 10); other kinds have no number."""
    match = re.fullmatch(r"probe(\d+)", name)
    return ("probe", int(match[1])) if match and int(match[1]) else (name, 40)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The space, each feature's unit, the gates by (kind, budget), and what screening read of every candidate."""

    space: Space
    units: Mapping[int, float]
    gates: Mapping[tuple[str, float], FittedGate]
    screening: tuple[Mapping[str, Any], ...] = ()

    def plan(self, study: Study, setting: Setting) -> Plan:
        """What a setting does."""
        plan = plan_at(study, setting.combination, setting.multiple, self.units)
        if setting.gate == NO_GATE or setting.budget is None:
            return plan.named(str(setting))
        return plan.behind(self.gates[setting.gate, setting.budget], str(setting))


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
    gates = _cached_gates(out / "gates.json")
    if gates is None:
        gates = fit_gates(study, sets, kinds, choices.gate_budgets, out, stages) if kinds else {}
        write_json(out / "gates.json", [_gate_row(key, fitted) for key, fitted in gates.items()])
    found = out / "space.json"
    if not found.exists():
        units = _units(study, sets, _features(study, sets, scale, choices, out, stages), stages)
        screened = _screen(study, sets, scale, choices, units, stages)
        combinations = kept_combinations(screened, scale.feature_sets)
        rows = [each.facts() | {"operator": each.plan.edits[0].operator} for each in screened]
        write_json(found, {"units": units, "combinations": combinations, "screening": rows})
    raw = read_json(found)
    try:
        units = {int(feature): float(unit) for feature, unit in raw["units"].items()}
        combinations = tuple(Combination(**{**c, "features": tuple(c["features"])}) for c in raw["combinations"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{found} is not a search space: {error!r}", hint="delete it to screen again") from error
    fitted = dict.fromkeys(kind for kind, _ in gates)
    open_gate = (NO_GATE,) if NO_GATE in choices.gates else ()
    budgets = tuple(sorted({budget for _, budget in gates}))
    return Candidates(Space(combinations, (*open_gate, *fitted), budgets), units, gates, tuple(raw["screening"]))


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
    plain = [p for s in sets.discovery if study.data.roles[s.name] is PromptRole.HARMFUL for p in s.prompts]
    return Material(
        study.lm,
        study.sae,
        tuple(plain or _in_turn(harmful(sets.discovery))),
        sets.benign_of(sets.discovery) or sets.calibration.prompts,
        study.data.pairs(scale.discovery),
        study.judge,
        effort=EFFORT,
        seed=study.seed,
    )


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
    study: Study, sets: PromptSets, scale: Scale, choices: Choices, units: Mapping[int, float], stages: Stages
) -> list[Screened]:
    """Successive halving over all combinations at a few multiples, on the trials' own prompts. A gate may make any KL
    affordable, so that plans are dropped for theirs only when all must always steer."""
    tempting = [p for suite in harmful(sets.trial) for p in suite.prompts[: scale.screened]]
    benign = sets.benign_of(sets.trial)[: len(tempting)]
    every = combinations_of(tuple(units), choices)
    plans = [plan_at(study, c, multiple, units) for c in every for multiple in SCREENED_MULTIPLES]
    halving = Halving(
        keep=max(1, len(plans) // 2),
        kl_limit=HOPELESS_KL if set(choices.gates) == {NO_GATE} else None,
    )
    with stages.stage(f"Screening {len(plans)} candidates") as tick:
        asked = [*_in_turn(harmful(sets.discovery))[:TOKEN_PROMPTS], *sets.benign_of(sets.discovery)[:TOKEN_PROMPTS]]
        tokens = find_refusal_tokens(study.lm, asked, study.judge)
        measure = prefills_of(study.lm, study.sae, tempting, benign, tokens, seed=study.seed)
        return screen(plans, measure, measure.n_prompts, halving, tick)


def kept_combinations(screened: Sequence[Screened], n: int) -> list[Combination]:
    """The combinations that screening left: kept plans whose best gain is at least `HOPEFUL` of the best of all, of the
    `n` feature sets that gain most. First tokens tell features apart, operators and scopes hardly.

    Raises `NotEnoughDataError` when none gains anything.
    """
    best: dict[Combination, tuple[float, float]] = {}
    for each in screened:
        if each.dropped or not each.reading.gain > 0:
            continue
        edit = each.plan.edits[0]
        key = (-each.reading.gain, each.reading.kl if math.isfinite(each.reading.kl) else math.inf)
        combination = Combination(edit.features, edit.operator, edit.scope)
        best[combination] = min(best.get(combination, key), key)
    if not best:
        raise NotEnoughDataError(
            "no combination of features, operators and scopes raised the log-odds of refusing harmful prompts",
            hint="other --features, more --operators, or a larger --top",
        )
    ranked = sorted(best, key=lambda combination: (*best[combination], combination))
    hopeful = [c for c in ranked if best[c][0] <= HOPEFUL * best[ranked[0]][0]]
    sets = list(dict.fromkeys(combination.features for combination in hopeful))[:n]
    return [combination for combination in hopeful if combination.features in sets]


def fit_gates(
    study: Study, sets: PromptSets, kinds: Sequence[str], budgets: Sequence[float], out: Path, stages: Stages
) -> dict[tuple[str, float], FittedGate]:
    """Each kind fitted once on discovery prompts, then calibrated for each budget that the calibration prompts can
    prove. Raises `NotEnoughDataError` when they can prove none, or no kind can be fitted."""
    labelled = [(prompt, suite.harmful) for suite in sets.discovery for prompt in suite.prompts]
    prompts, benign = [prompt for prompt, _ in labelled], sets.calibration.prompts
    pooled = read_pooled(study, last_turns(prompts), out, stages, "Reading prompts for gates")
    turnwise = Turnwise(study.lm, study.sae, longest_turn(study.lm, [*prompts, *benign]))
    positive = np.array([is_harmful for _, is_harmful in labelled])
    found: dict[tuple[str, float], FittedGate] = {}
    last: NotEnoughDataError | None = None
    with stages.stage("Fitting gates") as tick:
        for done, kind in enumerate(kinds, 1):
            try:
                fitted = _fit(kind, pooled, positive, study.seed)
            except NotEnoughDataError as error:
                last = error
                continue
            for budget in budgets:
                try:
                    found[kind, budget] = turnwise.within(fitted, benign, budget)
                except NotEnoughDataError as error:
                    last = error
            tick(done, len(kinds))
    if not found:
        raise last or NotEnoughDataError("no gate was asked for")
    return found


def _fit(kind: str, pooled: Pooled, positive: np.ndarray, seed: int) -> FittedGate:
    name, most = _kind(kind)
    if name != "probe":
        return fit_gate(name, pooled, positive, seed=seed)
    return fit_probe_of(pooled, positive, max_features=most, seed=seed)


def read_pooled(study: Study, prompts: Sequence[Prompt], out: Path, stages: Stages, name: str) -> Pooled:
    """One pass over the prompts at the SAE's site, in a directory of its own: a repeated command reads it back."""
    job = plan_pass(study.lm, [gate_reading(study.sae.cfg.site, study.sae)], prompts)
    with stages.stage(name) as tick:
        store = collect_to(job, out / "activations" / content_hash(job.key), tick)
    assert store is not None, "all batches were asked for"
    return Pooled.of(store)


def _gate_row(key: tuple[str, float], fitted: FittedGate) -> dict[str, Any]:
    return {"kind": key[0], "budget": key[1], "gate": fitted.gate.model_dump(mode="json"), "vectors": fitted.vectors}


def _cached_gates(path: Path) -> dict[tuple[str, float], FittedGate] | None:
    if not path.exists():
        return None
    try:
        return {
            (row["kind"], row["budget"]): FittedGate(
                Gate.model_validate(row["gate"]), {name: tuple(v) for name, v in row["vectors"].items()}
            )
            for row in read_json(path)
        }
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} does not hold gates: {error!r}", hint="delete it to fit them again") from error
