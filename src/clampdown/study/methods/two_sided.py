"""Two-sided steering for a model that refuses too little and too much: more right refusals, fewer wrong ones, one plan.

1. The direction of refusing: where the reply is decided, the mean of discovery prompts that the unsteered model refuses
   minus that of those which it answers, taken within the harmful and within the over-refused prompts, and averaged. The
   difference of harmful and harmless means is another direction: what is asked, not what is done about it.
2. The feature set is read off that direction: the features whose activations differ most along it.
3. Edits, on validation prompts and with no gate: the direction added, and the features clamped (turned round to steer
   down), at several sizes, at every token. Up, the weakest within `SLACK` of the most refusals of attacks. Down, the
   one that leaves the fewest refusals of over-refused prompts. Neither may break more than `DEGENERATE_LIMIT` of
   replies.
4. Gates, fitted on discovery prompts (as every gate of a study: `gating.Lessons`), each of `KINDS`. Up: attacks against
   everything harmless; its threshold promises the study's budget (2 %) on benign calibration requests, and lets at most
   `SPARED` of over-refused ones through. Down: over-refused prompts against all others; its threshold promises
   `DOWN_BUDGET` on harmful calibration prompts, and lets at most `DOWN_SPARED` of the benign ones through. The kind
   with the better AUROC on validation prompts is taken.
5. Arms: up alone behind its gate, and both. Validation prompts choose: refusals of attacks minus wrong refusals.

Nothing here searches with many forward passes: on a model of 0.5 B parameters it takes minutes of one core.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from clampdown.activations.collect import collect
from clampdown.activations.stream import plan_pass
from clampdown.errors import NotEnoughDataError
from clampdown.steering.arms import BASELINE, Arm, generate_arms
from clampdown.steering.gate_fitting import FittedGate, Pooled, auroc, fit_gate, gate_reading
from clampdown.steering.plan import Branch, Edit, Plan
from clampdown.steering.turn_promise import Turnwise, last_turns, longest_turn
from clampdown.steering.turn_reading import read_prompts
from clampdown.study.gating import HARMLESS, Lessons, benign_once, check_provable
from clampdown.study.groundwork import Groundwork
from clampdown.study.methods.method import Method
from clampdown.study.strengths import Candidate
from clampdown.types import ATTACKS, ArmKind, Prompt, PromptRole, Split, Verdict

NAME = "two-sided"
UP_ONLY, BOTH, FEATURES_ONLY = "gated, up only", "gated, up and down", "gated set of features, up only"
SCOPE = "all"
SIZES_UP, SIZES_DOWN = (1.0, 2.0, 3.0, 4.0), (1.0, 2.0)
"""Multiples of the direction's own length, and (the first two) of each feature's largest activation."""
SET_SIZES = (1, 5)
KINDS = ("dense", "probe")
DOWN_BUDGET, SPARED, DOWN_SPARED, CONFIDENCE = 0.02, 0.05, 0.1, 0.95
SLACK = 0.05
DEGENERATE_LIMIT = 0.02
LEAST = 5
"""Prompts that must be refused, and answered, for the difference of their means to count."""
FIRST_TOKENS = 24
"""Of a reply, in which it shows whether it refuses."""
PROMPTS_AT_ONCE = 8
VECTOR = "direction of refusing"
ASKED = (PromptRole.HARMFUL, PromptRole.JAILBROKEN)
"""Attacks that gates are fitted and calibrated on: what they read of a conversation is its last turn, a plain one."""


def two_sided(ground: Groundwork) -> Method:
    """The method's arms. Raises `NotEnoughDataError` without over-refused prompts, or where the model refuses none of
    the discovery prompts or all of them."""
    if not _over_refused(ground, Split.DISCOVERY) or not _over_refused(ground, Split.VALIDATION):
        raise NotEnoughDataError("no borderline prompts", hint="without wrong refusals there is no second side")
    read, learnt = read_discovery(ground)
    tried = Tried(ground, refusing_direction(ground, read))
    with ground.stages.stage("Choosing edits up and down") as tick:
        up, down = tried.best_up(tick), tried.best_down(tick)
    with ground.stages.stage("Fitting gates"):
        gates = Gates(ground, read, learnt, read_validation(ground))
        raised, lowered = gates.up(), gates.down()
    plans = [up.behind(raised, UP_ONLY), _both(ground, up, raised, down, lowered)]
    if (features := tried.best_features) is not None and features.digest != up.digest:
        plans.append(features.behind(raised, FEATURES_ONLY))
    arms = tuple(Arm(plan.name, ArmKind.TUNED, plan, group=NAME) for plan in plans)
    return Method(NAME, ArmKind.TUNED, arms, choose, facts={**tried.facts, **gates.facts})


def _both(ground: Groundwork, up: Plan, raised: FittedGate, down: Plan, lowered: FittedGate) -> Plan:
    """Asked first whether to steer down; where not, whether up."""
    lowered = lowered.renamed("down") if lowered.vectors else lowered
    return Plan.of(
        ground.study.lm,
        [ground.study.sae],
        down.edits,
        BOTH,
        gate=lowered.gate,
        otherwise=Branch(gate=raised.gate, edits=up.edits),
        vectors={**up.vectors, **down.vectors, **raised.vectors, **lowered.vectors},
    )


def choose(found: Sequence[Candidate], unsteered: Candidate) -> Arm | None:
    """The arm with the most refusals of attacks less refusals of harmless prompts, if that is more than unsteered."""

    def net(candidate: Candidate) -> float:
        return (candidate.axes.refusal or 0.0) - (candidate.axes.over_refusal or 0.0)

    limit = (unsteered.axes.degenerate or 0.0) + DEGENERATE_LIMIT
    able = [one for one in found if (one.axes.degenerate or 0.0) <= limit]
    best = max(able, key=net, default=None)
    return best.arm if best is not None and net(best) > net(unsteered) else None


def _over_refused(ground: Groundwork, split: Split, n: int | None = None) -> list[Prompt]:
    found = ground.study.prompts(split, n, PromptRole.BORDERLINE)
    return [prompt for prompt in found if prompt.suite in ground.study.data.over_refused]


# ---- what is read --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """Prompts, and what one pass pooled of the last turn of each."""

    prompts: tuple[Prompt, ...]
    pooled: Pooled

    def are(self, fires: Callable[[Prompt], bool]) -> Bool[np.ndarray, " prompts"]:
        return np.array([fires(prompt) for prompt in self.prompts], dtype=bool)


def read_discovery(ground: Groundwork) -> tuple[Reading, Reading]:
    """Discovery prompts as they are, and all that gates learn from: those first, and what `Lessons` adds to them."""
    study, n = ground.study, ground.sizes.discovery
    asked, harmless = (study.prompts(Split.DISCOVERY, n, *roles) for roles in (ASKED, HARMLESS))
    learnt = Lessons.of(study, asked, harmless, ground.wrapped)
    pooled = _pooled(ground, learnt.turns, Split.DISCOVERY)
    own = pooled.at(np.arange(len(learnt.turns)) < learnt.n_own)
    return Reading((*asked, *harmless), own), Reading(learnt.turns, pooled)


def read_validation(ground: Groundwork) -> Reading:
    """Validation prompts, on which kinds of gates are compared."""
    study, n = ground.study, 2 * ground.sizes.validation
    prompts = (*study.prompts(Split.VALIDATION, n, *ASKED), *study.prompts(Split.VALIDATION, n, *HARMLESS))
    return Reading(prompts, _pooled(ground, last_turns(prompts), Split.VALIDATION))


def _pooled(ground: Groundwork, turns: Sequence[Prompt], split: Split) -> Pooled:
    study = ground.study
    job = plan_pass(study.lm, [gate_reading(study.site, study.sae)], turns)
    with ground.stages.stage(f"Reading {split} prompts") as tick:
        return Pooled.of(collect(job, tick))


@dataclass(frozen=True, slots=True)
class Refusing:
    """The direction of refusing, and the features that differ most along it with their largest activations."""

    vector: tuple[float, ...]
    features: Mapping[int, float]


def refusing_direction(ground: Groundwork, read: Reading) -> Refusing:
    """The module's steps 1 and 2. Raises `NotEnoughDataError`."""
    study = ground.study
    sides = {
        "harmful": read.are(lambda prompt: study.data.roles[prompt.suite] is PromptRole.HARMFUL),
        "over-refused": read.are(lambda prompt: prompt.suite in study.data.over_refused),
    }
    chosen = np.flatnonzero(sides["harmful"] | sides["over-refused"])
    refused = np.zeros(len(read.prompts), dtype=bool)
    refused[chosen] = _refused_unsteered(ground, [read.prompts[int(i)] for i in chosen])
    residual, activations = read.pooled.residual["assistant_start"], read.pooled.features["assistant_start"].toarray()
    apart = [
        (residual[side & refused].mean(0) - residual[side & ~refused].mean(0),
         activations[side & refused].mean(0) - activations[side & ~refused].mean(0))
        for side in sides.values()
        if min((side & refused).sum(), (side & ~refused).sum()) >= LEAST
    ]  # fmt: skip
    if not apart:
        raise NotEnoughDataError(
            f"the model refuses {int(refused.sum())} of {len(chosen)} discovery prompts: nothing to tell refusing from "
            "answering by",
            hint="more harmful and borderline prompts, some refused and some answered",
        )
    direction = np.mean([each[0] for each in apart], axis=0)
    along = study.sae.W_dec.float().cpu().numpy() @ (direction / np.linalg.norm(direction))
    gain = np.mean([each[1] for each in apart], axis=0) * along
    peaks = activations.max(0)
    best = [int(f) for f in np.argsort(-gain)[: max(SET_SIZES)] if gain[f] > 0 and along[f] > 0 and peaks[f] > 0]
    return Refusing(tuple(direction.astype(float).tolist()), {f: float(peaks[f]) for f in best})


def _refused_unsteered(ground: Groundwork, prompts: Sequence[Prompt]) -> list[bool]:
    study, found = ground.study, {}
    ordered = sorted(prompts, key=lambda prompt: len(prompt.text))
    with ground.stages.stage("What the model refuses unsteered") as tick:
        for place in range(0, len(ordered), 4 * PROMPTS_AT_ONCE):
            some = ordered[place : place + 4 * PROMPTS_AT_ONCE]
            for reply in generate_arms(study.lm, (), [(BASELINE, p) for p in some], max_new_tokens=FIRST_TOKENS):
                verdict = study.judge(reply.prompt, reply.text).verdict
                found[reply.prompt.suite, reply.prompt.id] = verdict is Verdict.REFUSED
            tick(place + len(some), len(ordered))
    return [found[prompt.suite, prompt.id] for prompt in prompts]


# ---- edits ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tried:
    """The edits that are tried, and which of them validation prompts choose. `facts` keeps what they came to."""

    ground: Groundwork
    refusing: Refusing
    facts: dict[str, Any] = field(default_factory=dict)
    found: dict[str, tuple[Counter[str], list[Plan], int]] = field(default_factory=dict)

    def best_up(self, tick: Callable[[int, int], None]) -> Plan:
        """The weakest of those that turn about as many attacks into refusals as the best."""
        n = 2 * self.ground.sizes.validation
        shown = self.ground.study.prompts(Split.VALIDATION, n, *ASKED)
        tried = [plan for size in SIZES_UP for plan in self._plans(size)]
        refused, able = self._refused(tried, shown, "up", tick)
        return _weakest(able, refused, len(shown))

    @property
    def best_features(self) -> Plan | None:
        """The same of the feature sets alone, after `best_up`; None where they break replies or there are none."""
        refused, able, n = self.found["up"]
        sets = [plan for plan in able if not plan.vectors]
        return _weakest(sets, refused, n) if sets else None

    def best_down(self, tick: Callable[[int, int], None]) -> Plan:
        """The one that leaves the fewest refusals of over-refused prompts, the weakest of equals."""
        shown = _over_refused(self.ground, Split.VALIDATION, 2 * self.ground.sizes.validation)
        tried = [plan for size in SIZES_DOWN for plan in self._plans(-size)]
        refused, able = self._refused(tried, shown, "down", tick)
        return min(able, key=lambda plan: refused[plan.name])

    def _plans(self, size: float) -> list[Plan]:
        """The direction and the feature sets at a size; down, the direction taken out, too."""
        sets = [self._features(size, n) for n in SET_SIZES]
        edits = [edit for edit in sets if edit is not None]
        if size == -SIZES_DOWN[0]:
            edits.append(self._direction("ablate_direction", 1.0))
        return [self._plan(edit, size) for edit in (*edits, self._direction("add_direction", size))]

    def _direction(self, operator: str, size: float) -> Edit:
        site = self.ground.study.site.name
        return Edit(site=site, operator=operator, strengths=(size,), vector=VECTOR, scope=SCOPE)

    def _features(self, size: float, n: int) -> Edit | None:
        """The first n clamped at a multiple of their largest activations; down, their own activations turned round."""
        peaks = dict(itertools.islice(self.refusing.features.items(), n))
        if len(peaks) < n or not -1 <= size <= SIZES_UP[1]:
            return None
        strengths = tuple(size * peak if size > 0 else size for peak in peaks.values())
        operator = "clamp" if size > 0 else "scale"
        site = self.ground.study.site.name
        return Edit(site=site, operator=operator, features=tuple(peaks), strengths=strengths, scope=SCOPE)

    def _plan(self, edit: Edit, size: float) -> Plan:
        study, what = self.ground.study, " + ".join(map(str, edit.features)) or VECTOR
        vectors = {VECTOR: self.refusing.vector} if edit.vector else {}
        name = f"{edit.operator} {what} x{size:g}"
        return Plan.of(study.lm, [study.sae], [edit], name, vectors=vectors)

    def _refused(
        self, plans: Sequence[Plan], shown: Sequence[Prompt], side: str, tick: Callable[[int, int], None]
    ) -> tuple[Counter[str], list[Plan]]:
        """How many prompts each plan refuses, and the plans that break no more replies than the model does anyway."""
        study, length = self.ground.study, self.ground.sizes.answering.max_new_tokens
        arms = [BASELINE, *(Arm(plan.name, ArmKind.FEATURE, plan) for plan in plans)]
        refused: Counter[str] = Counter()
        broken: Counter[str] = Counter()
        for place in range(0, len(shown), PROMPTS_AT_ONCE):
            pairs = [(arm, prompt) for prompt in shown[place : place + PROMPTS_AT_ONCE] for arm in arms]
            for reply in generate_arms(study.lm, study.saes, pairs, max_new_tokens=length):
                verdict = study.judge(reply.prompt, reply.text).verdict
                refused[reply.arm.name] += verdict is Verdict.REFUSED
                broken[reply.arm.name] += verdict is Verdict.DEGENERATE
            tick(min(place + PROMPTS_AT_ONCE, len(shown)), len(shown))
        limit = broken[BASELINE.name] + max(1.0, DEGENERATE_LIMIT * len(shown))
        able = [plan for plan in plans if broken[plan.name] <= limit]
        self.facts[f"edits {side}"] = {
            arm.name: {"refused": refused[arm.name], "degenerate": broken[arm.name], "n": len(shown)} for arm in arms
        }
        if not able:
            raise NotEnoughDataError(f"every edit {side} breaks replies", hint="more validation prompts may tell")
        self.found[side] = refused, able, len(shown)
        return refused, able


def _weakest(plans: Sequence[Plan], refused: Mapping[str, int], n: int) -> Plan:
    """The first, in order of size, that is within `SLACK` of the most refusals."""
    most = max(refused[plan.name] for plan in plans)
    return next(plan for plan in plans if refused[plan.name] >= most - SLACK * n)


# ---- gates ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gates:
    """Both gates. `read` are discovery prompts, `learnt` what gates learn from, and `checked` validation prompts.
    `facts` keeps how well each kind does."""

    ground: Groundwork
    read: Reading
    learnt: Reading
    checked: Reading
    facts: dict[str, Any] = field(default_factory=dict)

    def up(self) -> FittedGate:
        """Fires on attacks; see the module's step 4."""
        study, n = self.ground.study, self.ground.sizes.calibration
        fitted = self._best("up", lambda prompt: study.data.roles[prompt.suite] in ATTACKS)
        benign, wanted = benign_once(study.data, n), self.ground.benign_budget
        budget = max(wanted, check_provable(len(benign), wanted))
        found = self._turnwise(benign).within(fitted, benign, budget)
        return self._sparing(found, _over_refused(self.ground, Split.CALIBRATION), SPARED)

    def down(self) -> FittedGate:
        """Fires on over-refused prompts; see the module's step 4."""
        study, n = self.ground.study, self.ground.sizes.calibration
        fitted = self._best("down", lambda prompt: prompt.suite in study.data.over_refused)
        harmful = study.prompts(Split.CALIBRATION, n, *ASKED)
        budget = max(DOWN_BUDGET, check_provable(len(harmful), DOWN_BUDGET, "harmful"))
        found = self._turnwise(harmful).at_last(fitted, harmful, budget, on="harmful")
        return self._sparing(found, study.prompts(Split.CALIBRATION, n, PromptRole.BENIGN), DOWN_SPARED)

    def _best(self, side: str, fires: Callable[[Prompt], bool]) -> FittedGate:
        """The kind that tells the sides apart best on validation prompts."""
        positive, truth = self.learnt.are(fires), self.checked.are(fires)
        fitted = {kind: fit_gate(kind, self.learnt.pooled, positive, seed=self.ground.study.seed) for kind in KINDS}
        quality = {kind: auroc(gate.scores(self.checked.pooled), truth) for kind, gate in fitted.items()}
        self.facts[f"gate {side}, AUROC on validation"] = quality
        return fitted[max(KINDS, key=lambda kind: quality[kind])]

    def _sparing(self, fitted: FittedGate, prompts: Sequence[Prompt], share: float) -> FittedGate:
        """With a threshold that also leaves all but `share` of these prompts alone. What was promised still holds: a
        higher threshold fires less."""
        if not prompts:
            return fitted
        study = self.ground.study
        readings = read_prompts(study.lm, fitted.gate, fitted.vectors, study.sae, last_turns(prompts))
        scores: Float[np.ndarray, " n"] = np.array([reading.score for reading in readings], dtype=float)
        least = float(np.quantile(scores, 1 - share, method="higher"))
        return fitted.changed(threshold=max(fitted.gate.threshold, least))

    def _turnwise(self, calibration: Sequence[Prompt]) -> Turnwise:
        study = self.ground.study
        window = longest_turn(study.lm, [*self.read.prompts, *self.learnt.prompts, *calibration])
        return Turnwise(study.lm, study.sae, window, CONFIDENCE)
