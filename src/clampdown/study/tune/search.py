"""The search of `clampdown tune`: feature sets x operators x scopes x strengths x gates, by Optuna, in batches.

1. A setting is a combination that screening left (features or directions, operator, scope), a multiple of the features'
   own largest activations, and a gate (a kind, its benign budget and how sure that is, or none); behind a gate also
   whether a second side steers down, what becomes of the error term, and whether strength grows with the score.
   The hand-made recipe is one of the combinations, and its own settings are the first trials.
2. Two objectives: refusal of harmful suites up, cost down (the mean share of the budgets that is used). Each budget is
   a constraint on its estimate: which plans may be chosen is decided later, by bounds, on prompts that no trial read.
3. A batch is asked for at once and measured as the arms of one run, then told at once. The sampler is seeded and its
   questions depend on the answers alone: a run that was killed replays what it knows and goes on as it would have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from clampdown.errors import NotEnoughDataError, StoreError
from clampdown.extras import extra
from clampdown.store import open_appending, recover, to_jsonable
from clampdown.study.budgets import Use

with extra("tune", "the search for a plan"):
    import optuna

NO_GATE = "none"
HAND_MADE = "hand-made"
"""The operator and the gate of what `study/methods/gated_set.py` makes."""
KEEP = "keep"
CONFIDENCE = 0.95
STEP = 0.05
ASKED_AGAIN = 50


@dataclass(frozen=True, slots=True, order=True)
class Combination:
    """Which features are steered together, or how many directions, by which operator, at which tokens."""

    features: tuple[int, ...]
    operator: str
    scope: str
    directions: int = 0

    @property
    def what(self) -> str:
        return "+".join(map(str, self.features)) or f"{self.directions} directions"

    def __str__(self) -> str:
        return f"{self.operator} {self.what} {self.scope}"


@dataclass(frozen=True, slots=True)
class Setting:
    """One point of the space. `multiple` is in units of each feature's largest activation, for the hand-made edits in
    units of what they are, for directions in gaps; `budget` is the gate's, `confidence` how sure it is; `down`: the
    second side is there; `least`: the share of the strength at the gate's threshold."""

    combination: Combination
    multiple: float
    gate: str = NO_GATE
    budget: float | None = None
    confidence: float = CONFIDENCE
    down: bool = False
    error_term: str = KEEP
    least: float = 1.0

    def __str__(self) -> str:
        sure = "" if self.confidence == CONFIDENCE else f" at {self.confidence:g}"
        behind = "" if self.gate == NO_GATE else f", {self.gate} gate {self.budget:g}{sure}"
        behind += ", two-sided" if self.down else ""
        behind += "" if self.error_term == KEEP else f", error term {self.error_term}"
        behind += "" if self.least == 1 else f", from {self.least:.0%} of it"
        return (
            f"{self.combination.operator} {self.combination.what} x{self.multiple:g} {self.combination.scope}{behind}"
        )


@dataclass(frozen=True, slots=True)
class Space:
    """What is searched: `combinations` are those that screening left. `gates` are kinds, `NO_GATE` among them if a plan
    may steer always. `sides` says whether plans with a second side are searched; `starts` are tried first."""

    combinations: tuple[Combination, ...]
    gates: tuple[str, ...]
    budgets: tuple[float, ...]
    low: float = 0.25
    high: float = 2.5
    confidences: tuple[float, ...] = (CONFIDENCE,)
    sides: tuple[bool, ...] = (False,)
    starts: tuple[Setting, ...] = ()
    promises: frozenset[tuple[str, float | None, float]] | None = None
    """(gate, budget, confidence) that there are; None: all."""
    error_terms: tuple[str, ...] = (KEEP,)
    leasts: tuple[float, ...] = (1.0,)
    growing: frozenset[tuple[str, float | None, float]] = frozenset()
    """Gates whose strength may grow with their score."""

    def begin(self, study: optuna.Study) -> None:
        """Put the settings that are tried first."""
        sets = self._sets()
        for setting in self.starts:
            chosen = setting.combination
            study.enqueue_trial({
                "features": sets.index((chosen.features, chosen.directions)),
                "operator": chosen.operator, "scope": chosen.scope,
                "gate": setting.gate, "gate budget": setting.budget, "gate confidence": setting.confidence,
                "down": setting.down, "multiple": setting.multiple,
                "error term": setting.error_term, "least": setting.least,
            })  # fmt: skip

    def _sets(self) -> list[tuple[tuple[int, ...], int]]:
        return list(dict.fromkeys((each.features, each.directions) for each in self.combinations))

    def ask(self, study: optuna.Study) -> tuple[optuna.Trial, Setting]:
        """The next question. Features, operator and scope are dimensions of their own, so that what is learnt of a
        scope serves all features; one that names a combination that screening dropped is put again."""
        for _ in range(ASKED_AGAIN):
            trial = study.ask()
            setting = self._suggest(trial)
            if setting.combination in self.combinations and self._promised(setting):
                return trial, setting
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        trial = study.ask()
        fallen = replace(self._suggest(trial), combination=self.combinations[0])
        return trial, fallen if self._promised(fallen) else Setting(fallen.combination, fallen.multiple)

    def _promised(self, setting: Setting) -> bool:
        key = (setting.gate, setting.budget, setting.confidence)
        return setting.gate == NO_GATE or self.promises is None or key in self.promises

    def _suggest(self, trial: optuna.Trial) -> Setting:
        sets = self._sets()
        features, directions = sets[int(trial.suggest_categorical("features", range(len(sets))))]
        operator = trial.suggest_categorical("operator", self._each("operator"))
        scope = trial.suggest_categorical("scope", self._each("scope"))
        gate = trial.suggest_categorical("gate", self.gates)
        budget = trial.suggest_categorical("gate budget", self.budgets) if self.budgets else None
        confidence = trial.suggest_categorical("gate confidence", self.confidences)
        down = trial.suggest_categorical("down", self.sides)
        error_term = trial.suggest_categorical("error term", self.error_terms)
        least = trial.suggest_categorical("least", self.leasts)
        multiple = round(trial.suggest_float("multiple", self.low, self.high, step=STEP), 4)
        chosen = Combination(features, operator, scope, directions)
        if gate == NO_GATE:
            return Setting(chosen, multiple)
        error_term = KEEP if directions else error_term
        least = least if (gate, budget, confidence) in self.growing else 1.0
        return Setting(chosen, multiple, gate, budget, confidence, down, error_term, least)

    def _each(self, name: str) -> list[str]:
        return sorted({getattr(combination, name) for combination in self.combinations})


@dataclass(frozen=True, slots=True)
class Score:
    """What a trial measured on its few prompts. `refusal` is None for a plan that could not be measured: `note` says
    why."""

    refusal: float | None
    by_suite: Mapping[str, float | None]
    uses: tuple[Use, ...]
    note: str = ""

    @property
    def cost(self) -> float:
        """Mean share of the budgets that the estimates use: 1.0 is all of each."""
        return sum(use.spent for use in self.uses) / len(self.uses) if self.uses else 0.0

    @property
    def over(self) -> tuple[str, ...]:
        """Budgets whose estimate is beyond the limit."""
        return tuple(use.budget for use in self.uses if use.spent > 1)


@dataclass(frozen=True, slots=True)
class Trial:
    """A setting and its score, by number."""

    number: int
    setting: Setting
    score: Score


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to search: `trials` in all, `batch` of them measured together."""

    trials: int
    batch: int
    seed: int = 0


Evaluate = Callable[[int, Sequence[Setting]], Sequence[Score]]
"""(number of the first trial, settings of a batch) -> their scores."""


def search(space: Space, evaluate: Evaluate, effort: Effort, log: TrialLog) -> tuple[Trial, ...]:
    """Every trial, in order; those that the log holds are not measured again.

    Raises `NotEnoughDataError` for an empty space, `StoreError` when the log is of another search.
    """
    if not space.combinations or not space.gates:
        raise NotEnoughDataError("nothing to search: screening left no combination")
    study = _study(effort)
    space.begin(study)
    found: list[Trial] = []
    while len(found) < effort.trials:
        asked = [space.ask(study) for _ in range(min(effort.batch, effort.trials - len(found)))]
        settings = [setting for _, setting in asked]
        batch = log.known(len(found), settings)
        if batch is None:
            scores = evaluate(len(found), settings)
            pairs = zip(settings, scores, strict=True)
            batch = [Trial(number, *pair) for number, pair in enumerate(pairs, len(found))]
            log.append(batch)
        for (one, _), trial in zip(asked, batch, strict=True):
            _tell(study, one, trial.score)
        found += batch
    return tuple(found)


def _study(effort: Effort) -> optuna.Study:
    """The first trials, a third at most, are random."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    startup = max(1, min(16, effort.trials // 3))
    sampler = optuna.samplers.TPESampler(n_startup_trials=startup, seed=effort.seed, constant_liar=True)
    return optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)


def _tell(study: optuna.Study, trial: optuna.Trial, score: Score) -> None:
    if score.refusal is None:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return
    for use in score.uses:
        trial.set_constraint(use.budget, use.spent - 1.0)
    study.tell(trial, (score.refusal, score.cost))


def pareto(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The trials that no other beats on both objectives, cheapest first."""
    found: list[Trial] = []
    measured = [trial for trial in trials if trial.score.refusal is not None]
    for trial in sorted(measured, key=lambda t: (t.score.cost, -(t.score.refusal or 0.0), t.number)):
        if not found or (trial.score.refusal or 0.0) > (found[-1].score.refusal or 0.0):
            found.append(trial)
    return tuple(found)


def frontier(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The trials that no other beats, and those that no other of the plans that always steer beats: what gates buy is
    the distance between the two."""
    always = pareto([trial for trial in trials if trial.setting.gate == NO_GATE])
    return (*(best := pareto(trials)), *(trial for trial in always if trial not in best))


def finalists(trials: Sequence[Trial], n: int, *, alike: int = 2) -> tuple[Trial, ...]:
    """The `n` trials worth confirming: within the budgets by their estimates, most refusals first, then cheapest. When
    too few are, those least beyond them follow.

    Gate budgets take turns, because bounds on more prompts may turn a loose gate away. Of one combination and gate at
    most `alike` are taken; what was asked twice counts once.
    """
    measured = [trial for trial in trials if trial.score.refusal is not None]
    turns: dict[float | None, list[Trial]] = {}
    for trial in sorted((t for t in measured if not t.score.over), key=_rank):
        turns.setdefault(trial.setting.budget, []).append(trial)
    fair = [trial for row in zip_longest(*turns.values()) for trial in row if trial is not None]
    beyond = sorted((t for t in measured if t.score.over), key=lambda t: (max(u.spent for u in t.score.uses), _rank(t)))
    kept: list[Trial] = []
    for trial in [*fair, *beyond]:
        same = [k for k in kept if _family(k.setting) == _family(trial.setting)]
        if len(same) < alike and all(k.setting != trial.setting for k in same) and len(kept) < n:
            kept.append(trial)
    return tuple(kept)


def _rank(trial: Trial) -> tuple[float, ...]:
    """Most refusals, then cheapest, then weakest, then first."""
    return (-(trial.score.refusal or 0.0), trial.score.cost, trial.setting.multiple, trial.number)


def _family(setting: Setting) -> tuple[Any, ...]:
    return (setting.combination, setting.gate, setting.budget, setting.down, setting.error_term, setting.least)


class TrialLog:
    """`trials.jsonl`: every trial, one line each, in order. A kill costs at most the batch in flight."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._trials = self._read()

    def _read(self) -> list[Trial]:
        """Cuts a half-written last line off the file."""
        return recover(self.path, trial_from_json, "a trial")

    def known(self, start: int, settings: Sequence[Setting]) -> list[Trial] | None:
        """The trials from `start` on if the whole batch is there. Raises `StoreError` when they are others."""
        held = self._trials[start : start + len(settings)]
        for trial, setting in zip(held, settings, strict=False):
            if trial.setting != setting:
                raise StoreError(
                    f"{self.path} holds another search: trial {trial.number} is {trial.setting}, not {setting}",
                    hint="choose an empty --out directory, or use the optuna version that began it",
                )
        return held if len(held) == len(settings) else None

    def append(self, trials: Sequence[Trial]) -> None:
        """Those that are not there yet."""
        fresh = trials[len(self._trials) - trials[0].number :]
        lines = "".join(json.dumps(trial_facts(trial), ensure_ascii=False) + "\n" for trial in fresh)
        with open_appending(self.path) as handle:
            handle.write(lines.encode())
        self._trials += fresh


def trial_facts(trial: Trial) -> dict[str, Any]:
    """A trial as plain values; `trial_from_json` reads them back."""
    shown = {"name": str(trial.setting), "cost": trial.score.cost, "over": list(trial.score.over)}
    return {**to_jsonable(trial), **shown}


def trial_from_json(row: Mapping[str, Any]) -> Trial:
    setting, score = row["setting"], row["score"]
    combination = Combination(**{**setting["combination"], "features": tuple(setting["combination"]["features"])})
    uses = tuple(Use(**use) for use in score["uses"])
    return Trial(row["number"], Setting(**{**setting, "combination": combination}), Score(**{**score, "uses": uses}))
