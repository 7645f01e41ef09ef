"""Two-sided steering for a model that refuses too little and too much: more right refusals, fewer wrong ones, one plan.

1. Edits, on validation prompts and with no gate. Up: a feature set or the difference of means, the weakest that comes
   within `SLACK` of the most refusals of attacks. Down: the same turned round, the one that leaves the fewest refusals
   of over-refused prompts. Neither may break more than `DEGENERATE_LIMIT` of the replies.
2. The feature set is read off the difference of means: those features whose activations differ most along it, where
   the reply is decided.
3. Gates, fitted on discovery prompts, each of `KINDS`. Up: attacks against everything harmless; its threshold promises
   `BUDGET` on benign calibration prompts, and lets at most `SPARED` of over-refused ones through. Down: over-refused
   prompts against all others; its threshold promises `DOWN_BUDGET` on harmful calibration prompts, and lets at most
   `SPARED` of the benign ones through. The kind with the better AUROC on validation prompts is taken.
4. Arms: up alone behind its gate, and both. Validation prompts choose: refusals of attacks minus wrong refusals.

Nothing here searches with many forward passes: on a model of 0.5 B parameters it takes minutes of one core.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

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
from clampdown.study.gating import HARMLESS, check_provable
from clampdown.study.groundwork import Groundwork
from clampdown.study.methods.method import Method, arm_of
from clampdown.study.strengths import Candidate
from clampdown.types import ATTACKS, SAFE, ArmKind, Prompt, PromptRole, Split, Verdict

NAME = "two-sided"
SCOPES = ("assistant", "prompt")
SIZES_UP, SIZES_DOWN = (0.5, 1.0, 1.5), (0.5, 1.0)
"""Multiples of the raw difference of means, and of each feature's largest activation."""
SET_SIZE = 3
KINDS = ("dense", "probe")
BUDGET, DOWN_BUDGET, SPARED, CONFIDENCE = 0.02, 0.02, 0.1, 0.95
SLACK = 0.05
DEGENERATE_LIMIT = 0.02
VECTOR = "direction"
ASKED = (PromptRole.HARMFUL, PromptRole.JAILBROKEN)
"""Attacks that gates are fitted and calibrated on: what they read of a conversation is its last turn, a plain one."""


def two_sided(ground: Groundwork) -> Method:
    """The method's arms. Raises `NotEnoughDataError` without over-refused prompts."""
    if not _over_refused(ground, Split.DISCOVERY) or not _over_refused(ground, Split.VALIDATION):
        raise NotEnoughDataError("no borderline prompts", hint="without wrong refusals there is no second side")
    with ground.stages.stage("Choosing edits up and down") as tick:
        edits = Edits(ground)
        up, down = edits.best_up(tick), edits.best_down(tick)
    with ground.stages.stage("Fitting gates"):
        gates = Gates(ground)
        raised, lowered = gates.up(), gates.down()
    one = up.behind(raised, f"{NAME}: up only")
    fitted = lowered.renamed("down") if lowered.vectors else lowered
    vectors = {**up.vectors, **raised.vectors, **fitted.vectors}
    both = Plan.of(
        ground.study.lm,
        [ground.study.sae],
        down.edits,
        f"{NAME}: up and down",
        gate=fitted.gate,
        otherwise=Branch(gate=raised.gate, edits=up.edits),
        vectors=vectors,
    )
    arms = (arm_of(one, NAME, ArmKind.TUNED), Arm(both.name, ArmKind.TUNED, both, group=NAME))
    return Method(NAME, ArmKind.TUNED, arms, choose, facts=edits.facts | gates.facts)


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


# ---- edits ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edits:
    """The edits that are tried, and which of them validation prompts choose."""

    ground: Groundwork
    facts: dict[str, object] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", {})

    @cached_property
    def features(self) -> Mapping[int, float]:
        """The module's step 2: each feature of the set with its largest activation."""
        given = self.ground.given
        contrast, sae = given.contrast, given.sae
        activations = contrast.activations.matrix("assistant_start").toarray()
        harmful = np.asarray(contrast.harmful)
        direction = np.array(self.ground.dense)
        along = sae.W_dec.float().cpu().numpy() @ (direction / np.linalg.norm(direction))
        gap = (activations[harmful].mean(0) - activations[~harmful].mean(0)) * along
        peaks = activations.max(0)
        chosen = [int(f) for f in np.argsort(-gap)[: 4 * SET_SIZE] if gap[f] > 0 and along[f] > 0 and peaks[f] > 0]
        return {feature: float(peaks[feature]) for feature in chosen[:SET_SIZE]}

    def best_up(self, tick: Callable[[int, int], None]) -> Plan:
        """The weakest of those that turn about as many attacks into refusals as the best."""
        n = self.ground.sizes.validation
        shown = self.ground.study.prompts(Split.VALIDATION, n, *ASKED)
        tried = [plan for size in SIZES_UP for plan in self._plans(size)]
        refused, able = self._refused(tried, shown, "up", tick)
        most = max(refused[plan.name] for plan in able)
        return next(plan for plan in able if refused[plan.name] >= most - SLACK * len(shown))

    def best_down(self, tick: Callable[[int, int], None]) -> Plan:
        """The one that leaves the fewest refusals of over-refused prompts, the weakest of equals."""
        shown = _over_refused(self.ground, Split.VALIDATION, self.ground.sizes.validation)
        tried = [plan for size in SIZES_DOWN for plan in self._plans(-size)]
        refused, able = self._refused(tried, shown, "down", tick)
        return min(able, key=lambda plan: refused[plan.name])

    def _plans(self, size: float) -> list[Plan]:
        """The difference of means and the feature set at a size, in every scope."""
        study = self.ground.study
        found = []
        for scope in SCOPES:
            dense = Edit(
                site=study.site.name, operator="add_direction", strengths=(size,), vector=VECTOR, scope=scope
            )
            vectors = {VECTOR: self.ground.dense}
            name = f"difference of means x{size:g}, {scope}"
            found.append(Plan.of(study.lm, [study.sae], [dense], name, vectors=vectors))
            features = self.features
            if features:
                operator = "clamp" if size > 0 else "scale"
                strengths = [size * peak if size > 0 else size for peak in features.values()]
                edit = Edit(
                    site=study.site.name,
                    operator=operator,
                    features=tuple(features),
                    strengths=tuple(strengths),
                    scope=scope,
                )
                name = f"{operator} {' + '.join(map(str, features))} x{size:g}, {scope}"
                found.append(Plan.of(study.lm, [study.sae], [edit], name))
        return found

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
        limit = broken[BASELINE.name] + DEGENERATE_LIMIT * len(shown)
        able = [plan for plan in plans if broken[plan.name] <= limit]
        self.facts[f"edits {side}"] = {
            arm.name: {"refused": refused[arm.name], "degenerate": broken[arm.name], "n": len(shown)} for arm in arms
        }
        if not able:
            raise NotEnoughDataError(f"every edit {side} breaks replies", hint="more validation prompts may tell")
        return refused, able


PROMPTS_AT_ONCE = 8


# ---- gates ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gates:
    """Discovery prompts by side, and what one pass pooled of them."""

    ground: Groundwork
    facts: dict[str, object] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", {})

    @cached_property
    def read(self) -> tuple[tuple[Prompt, ...], Pooled]:
        study, n = self.ground.study, self.ground.sizes.discovery
        harmful = study.prompts(Split.DISCOVERY, n, *ASKED)
        prompts = (*harmful, *study.prompts(Split.DISCOVERY, n, *HARMLESS))
        return prompts, self._pooled(prompts)

    @cached_property
    def checked(self) -> tuple[tuple[Prompt, ...], Pooled]:
        """Validation prompts, on which the kinds of gates are compared."""
        study, n = self.ground.study, 2 * self.ground.sizes.validation
        prompts = (*study.prompts(Split.VALIDATION, n, *ASKED), *study.prompts(Split.VALIDATION, n, *HARMLESS))
        return prompts, self._pooled(prompts)

    def up(self) -> FittedGate:
        """Fires on attacks; see the module's step 3."""
        study, n = self.ground.study, self.ground.sizes.calibration
        fitted = self._best("up", lambda prompt: study.data.roles[prompt.suite] in ATTACKS)
        benign = study.prompts(Split.CALIBRATION, n, PromptRole.BENIGN) or study.prompts(Split.CALIBRATION, n, *SAFE)
        budget = max(BUDGET, check_provable(len(benign), BUDGET))
        found = self._turnwise(benign).within(fitted, benign, budget)
        return self._sparing(found, _over_refused(self.ground, Split.CALIBRATION))

    def down(self) -> FittedGate:
        """Fires on over-refused prompts; see the module's step 3."""
        study, n = self.ground.study, self.ground.sizes.calibration
        fitted = self._best("down", lambda prompt: prompt.suite in study.data.over_refused)
        harmful = study.prompts(Split.CALIBRATION, n, *ASKED)
        budget = max(DOWN_BUDGET, check_provable(len(harmful), DOWN_BUDGET, "harmful"))
        found = self._turnwise(harmful).at_last(fitted, harmful, budget, on="harmful")
        return self._sparing(found, study.prompts(Split.CALIBRATION, n, PromptRole.BENIGN))

    def _best(self, side: str, fires: Callable[[Prompt], bool]) -> FittedGate:
        """The kind that tells the sides apart best on validation prompts."""
        (prompts, pooled), (shown, seen) = self.read, self.checked
        positive, truth = _labels(prompts, fires), _labels(shown, fires)
        fitted = {kind: fit_gate(kind, pooled, positive, seed=self.ground.study.seed) for kind in KINDS}
        quality = {kind: auroc(gate.scores(seen), truth) for kind, gate in fitted.items()}
        self.facts[f"gate {side}, AUROC on validation"] = quality
        return fitted[max(KINDS, key=lambda kind: quality[kind])]

    def _sparing(self, fitted: FittedGate, prompts: Sequence[Prompt]) -> FittedGate:
        """With a threshold that also leaves all but `SPARED` of these prompts alone. What was promised still holds: a
        higher threshold fires less."""
        if not prompts:
            return fitted
        study = self.ground.study
        readings = read_prompts(study.lm, fitted.gate, fitted.vectors, study.sae, last_turns(prompts))
        scores: Float[np.ndarray, " n"] = np.array([reading.score for reading in readings], dtype=float)
        least = float(np.quantile(scores, 1 - SPARED, method="higher"))
        return fitted.changed(threshold=max(fitted.gate.threshold, least))

    def _pooled(self, prompts: Sequence[Prompt]) -> Pooled:
        study = self.ground.study
        return Pooled.of(collect(plan_pass(study.lm, [gate_reading(study.site, study.sae)], last_turns(prompts))))

    def _turnwise(self, calibration: Sequence[Prompt]) -> Turnwise:
        study = self.ground.study
        window = longest_turn(study.lm, [*self.read[0], *calibration])
        return Turnwise(study.lm, study.sae, window, CONFIDENCE)


def _labels(prompts: Sequence[Prompt], fires: Callable[[Prompt], bool]) -> Bool[np.ndarray, " prompts"]:
    return np.array([fires(prompt) for prompt in prompts], dtype=bool)
