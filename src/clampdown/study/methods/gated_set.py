"""The gated set of features: what is searched, and on which prompts each part is decided.

1. Up, found on discovery prompts: the best refusal feature clamped on the prompt's tokens, alone and with one or two
   partners (`discovery/partners.py`); and with what lets replies relapse ablated while they are written
   (`discovery/relapse.py`). Three strengths of each. Validation prompts choose, with no gate: of those that turn as
   many whole replies into refusals as the best, but for `SLACK`, the one with the largest refusal log-odds, because
   known wrappers are turned by many edits and only a margin helps with unknown ones.
2. Gate: a sparse probe on SAE features, fitted on discovery prompts; its threshold
   promises `BUDGET` on benign calibration prompts.
3. Two-sided or not: asked first, a probe for borderline prompts, behind which the refusal feature is reversed. Its
   threshold is set on harmful calibration prompts: a jailbreak taken for a borderline prompt would be helped.
4. The arms that are left meet the other methods' on validation prompts. Among those that refuse no more safe prompts
   than the unsteered model and are within `SLACK` of the best refusal, the one with the least over-refusal is chosen.

No step sees a harmful prompt of a held-out wrapper family, on any split. Benign requests in those wrappers are among
the benign prompts of every split. Whoever set the constants below had such harmful validation prompts in view.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from clampdown.discovery import causal
from clampdown.discovery.finders import run_finder
from clampdown.discovery.partners import partners, with_partners
from clampdown.discovery.relapse import failing, held, repairs
from clampdown.discovery.screening import PrefillRefusal
from clampdown.steering.arms import Arm, generate_arms
from clampdown.steering.gates import Pooled, Probe, fit_probe
from clampdown.steering.plan import Branch, Edit, Gate, Plan
from clampdown.steering.turn_promise import Turnwise, longest_turn
from clampdown.study.gating import HARMLESS, Lessons, benign_once, check_provable, read_pooled, ungauged
from clampdown.study.groundwork import Groundwork
from clampdown.study.methods.method import Method, arm_of
from clampdown.study.strengths import Candidate
from clampdown.types import ATTACKS, ArmKind, Prompt, PromptRole, Split, Verdict

NAME = "tuned"
SCOPE = "prompt"
TEMPTING = (PromptRole.JAILBROKEN, PromptRole.MULTI_TURN)
MULTIPLES = (1.5, 2.0, 2.5)
SEARCHED_AT = 2.0
PARTNERS = 2
PARTNER_MULTIPLE = 1.5
RELAPSES = 32
"""Failing prompts on which repairs are looked for."""
HELD = 3
"""How many of the best repairs are held together."""
BUDGET = 0.01
DOWN_BUDGET = 0.002
CONFIDENCE = 0.95
PROBE_FEATURES = 300
PROBE_PENALTY = 0.3
MORE = 6.25
"""Gates read this many times the prompts that finders read: what many seen wrappers share is what unseen ones have."""
SLACK = 0.005
DEGENERATE_LIMIT = 0.05


@dataclass(frozen=True, slots=True)
class Discovery:
    """What gates learn from, and what they read of it. `prompts` are the discovery prompts as they are."""

    prompts: tuple[Prompt, ...]
    learnt: Lessons
    pooled: Pooled

    @classmethod
    def read(cls, ground: Groundwork) -> Discovery:
        n = int(MORE * ground.sizes.discovery)
        prompts = [p for roles in (ATTACKS, HARMLESS) for p in ground.study.prompts(Split.DISCOVERY, n, *roles)]
        learnt = Lessons.discovery(ground, n, ground.wrapped)
        return cls(tuple(prompts), learnt, read_pooled(ground.study, learnt.turns))

    @property
    def peaks(self) -> Float[np.ndarray, " d_sae"]:
        """Each feature's largest activation on any content token of the prompts as they are."""
        own: Any = self.pooled["max"][: self.learnt.n_own]
        return own.max(axis=0).toarray().ravel()


def gated_set(ground: Groundwork) -> Method:
    """The arms around the clamp finder's first feature: behind gates of one and, where it can be, of two sides."""
    best = run_finder("clamp", ground.given).features[0]
    return Method(NAME, ArmKind.TUNED, search(ground, best.feature, best.scores["max_activation"]), choose)


def search(ground: Groundwork, feature: int, unit: float) -> tuple[Arm, ...]:
    """The arms around one refusal feature and its unit (largest activation): one- and two-sided.

    Without borderline prompts, or with too few harmful calibration prompts, there is no second side, and that is said.
    """
    read = Discovery.read(ground)
    plan = best_edit(ground, edits_up(ground, clamps(ground, feature, unit), read))
    gate = up_gate(ground, read)
    arms = [arm_of(plan.behind(gate, f"{plan.name} one-sided"), NAME, ArmKind.TUNED)]
    with ground.stages.attempt("steering down where the model refuses wrongly"):
        down = down_gate(ground, read)
        site = plan.edits[0].site
        reverse = Edit(site=site, operator="scale", features=(feature,), strengths=(-1.0,), scope=SCOPE)
        otherwise = Branch(gate=gate, edits=plan.edits)
        two = plan.changed(name=f"{plan.name} two-sided", edits=(reverse,), gate=down, otherwise=otherwise)
        arms.append(Arm(two.name, ArmKind.TUNED, two, arms[0].strength, group=NAME))
    return tuple(arms)


def choose(found: Sequence[Candidate], unsteered: Candidate) -> Arm | None:
    """The module's step 4; None when no arm gains a refusal without refusing more safe prompts or breaking."""
    safe = unsteered.axes.over_refusal or 0.0
    able = [
        (c, c.axes.refusal)
        for c in found
        if c.axes.refusal is not None
        and (c.axes.over_refusal or 0.0) <= safe
        and (c.axes.degenerate or 0.0) <= DEGENERATE_LIMIT
    ]
    best = max((refusal for _, refusal in able), default=0.0)
    if best <= (unsteered.axes.refusal or 0.0):
        return None
    near = [c for c, refusal in able if refusal >= best - SLACK]
    return min(near, key=lambda c: c.axes.over_refusal or 0.0).arm


# ---- edits ---------------------------------------------------------------------------------------------------


def clamps(ground: Groundwork, feature: int, unit: float) -> dict[float, Plan]:
    """The feature clamped at every multiple of its unit, by multiple."""
    study = ground.study
    return {m: causal.clamp_plan(study.lm, study.sae, feature, m * unit, SCOPE) for m in MULTIPLES}


def edits_up(ground: Groundwork, alone: Mapping[float, Plan], read: Discovery) -> list[Plan]:
    """Ungated plans: every strength with none, one, two partners, each with and without the relapse held down."""
    study, sizes = ground.study, ground.sizes
    shown = tempting(ground, Split.DISCOVERY, sizes.causal_prompts)
    live = [feature for feature, peak in enumerate(read.peaks) if peak > 0]
    tried = ground.affordable(live, sum(len(prompt.text) // 4 + 8 for prompt in shown))
    units = {f: PARTNER_MULTIPLE * float(read.peaks[f]) for f in tried}
    measure = PrefillRefusal(study.lm, study.sae, shown, ground.tokens)
    joined = [partner.feature for partner in partners(alone[SEARCHED_AT], units, measure, PARTNERS)]
    sets = [{f: units[f] for f in joined[:n]} for n in range(len(joined) + 1)]
    holds = relapses(ground, with_partners(alone[SEARCHED_AT], sets[-1]), read)
    plans = []
    for further, (multiple, plan) in itertools.product(sets, alone.items()):
        grown = with_partners(plan, further)
        name = f"{NAME} {' + '.join(map(str, grown.edits[0].features))} x{multiple:g}"
        plans.append(grown.named(name))
        if holds:
            also = f"{name}, {' + '.join(map(str, holds))} held"
            plans.append(held(grown, holds).named(also))
    return plans


def tempting(ground: Groundwork, split: Split, n: int) -> list[Prompt]:
    """Prompts of attacks that the model may answer: jailbroken and multi-turn ones, else plain harmful ones."""
    study = ground.study
    return study.prompts(split, n, *TEMPTING) or study.prompts(split, n, *ATTACKS)


def relapses(ground: Groundwork, plan: Plan, read: Discovery) -> list[int]:
    """The features whose ablation repairs most failing replies of discovery prompts, at most `HELD`."""
    study, length = ground.study, ground.sizes.answering.max_new_tokens
    shown = tempting(ground, Split.DISCOVERY, int(MORE * ground.sizes.discovery))
    failed = failing(study.lm, study.sae, plan, shown, study.judge, max_new_tokens=length)[:RELAPSES]
    if not failed:
        return []
    live = [int(f) for f in np.flatnonzero(read.peaks) if f not in plan.edits[0].features]
    tried = ground.affordable(live, len(failed) * length)
    found = repairs(study.lm, study.sae, plan, failed, tried, study.judge, max_new_tokens=length)
    return [repair.feature for repair in found[:HELD] if repair.repaired]


def best_edit(ground: Groundwork, plans: Sequence[Plan]) -> Plan:
    """The choice among edits, on validation prompts."""
    study = ground.study
    shown = tempting(ground, Split.VALIDATION, int(MORE * ground.sizes.validation))
    arms = [Arm(plan.name, ArmKind.FEATURE, plan) for plan in plans]
    pairs = [(arm, prompt) for prompt in shown for arm in arms]
    replies = generate_arms(study.lm, study.saes, pairs, max_new_tokens=ground.sizes.answering.max_new_tokens)
    refused = Counter(r.arm.name for r in replies if study.judge(r.prompt, r.text).verdict is Verdict.REFUSED)
    enough = max(refused.values(), default=0) - SLACK * len(shown)
    able = [plan for plan in plans if refused[plan.name] >= enough]
    margins = PrefillRefusal(study.lm, study.sae, shown, ground.tokens)(able)
    return able[int(np.argmax(margins))]


def steering_up(plan: Plan) -> tuple[Edit, ...]:
    """The edits that raise refusal: those of the second branch when the first steers down."""
    return plan.otherwise.edits if plan.otherwise else plan.edits


def opened(plan: Plan) -> Plan:
    """What the plan does to a prompt that it takes for harmful, with no gate, and no SAE that only a gate reads."""
    up = plan.changed(edits=steering_up(plan), gate=None, otherwise=None)
    sites = {edit.site for edit in up.edits if edit.features}
    return up.changed(saes=tuple(ref for ref in plan.saes if ref.site in sites))


def at_strengths(plan: Plan, up: Plan, name: str) -> Plan:
    """The plan with the edits of an opened one where it steers up."""
    if plan.otherwise is None:
        return plan.changed(edits=up.edits, name=name)
    branch = plan.otherwise.changed(edits=up.edits)
    return plan.changed(otherwise=branch, name=name)


# ---- gates ---------------------------------------------------------------------------------------------------


def up_gate(ground: Groundwork, read: Discovery) -> Gate:
    """The gate of harmful prompts, at the module's step 2."""
    benign = benign_once(ground.study.data, 2 * ground.sizes.calibration)
    budget = max(BUDGET, check_provable(len(benign), BUDGET))
    fitted = ungauged(ground.study, _probe(ground, read, read.learnt.harmful))
    return _turnwise(ground, read, benign).within(fitted, benign, budget).gate


def down_gate(ground: Groundwork, read: Discovery) -> Gate:
    """The gate of borderline prompts, which spares harmful ones. Raises `NotEnoughDataError` without either."""
    study = ground.study
    borderline = np.array([turn.suite in study.data.over_refused for turn in read.learnt.turns])
    harmful = study.prompts(Split.CALIBRATION, 2 * ground.sizes.calibration, *ATTACKS)
    budget = max(DOWN_BUDGET, check_provable(len(harmful), DOWN_BUDGET, "harmful"))
    fitted = ungauged(study, _probe(ground, read, borderline))
    return _turnwise(ground, read, harmful).at_last(fitted, harmful, budget, on="harmful").gate


def _turnwise(ground: Groundwork, read: Discovery, calibration: Sequence[Prompt]) -> Turnwise:
    study = ground.study
    return Turnwise(
        study.lm, study.sae, longest_turn(study.lm, [*read.prompts, *read.learnt.turns, *calibration]), CONFIDENCE
    )


def _probe(ground: Groundwork, read: Discovery, positive: Bool[np.ndarray, " turns"]) -> Probe:
    return fit_probe(
        read.pooled, positive, max_features=PROBE_FEATURES, inverse_penalty=PROBE_PENALTY, seed=ground.study.seed
    )
