"""The tuned plan of `compare-methods`: what is searched, and on which prompts each part is decided.

1. Up, found on discovery prompts: the best refusal feature clamped on the prompt's tokens, alone and with one or two
   partners (`discovery/partners.py`); and with what lets replies relapse ablated while they are written
   (`discovery/relapse.py`). Three strengths of each. Validation prompts choose, with no gate: of those that turn as
   many whole replies into refusals as the best, but for `SLACK`, the one with the largest refusal log-odds, because
   known wrappers are turned by many edits and only a margin helps with unknown ones.
2. Gate: a sparse probe on SAE features, fitted on discovery prompts; its threshold promises `BUDGET` on benign
   calibration prompts.
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

import numpy as np
from jaxtyping import Bool, Float

from clampdown.discovery import causal
from clampdown.discovery.partners import partners, with_partners
from clampdown.discovery.refusal_tokens import RefusalTokens
from clampdown.discovery.relapse import failing, held, repairs
from clampdown.discovery.screening import PrefillRefusal
from clampdown.steering.arms import Arm, generate_arms
from clampdown.steering.gates import Pooled, Probe, fit_probe, provable_budget
from clampdown.steering.plan import Branch, Edit, Gate, Plan
from clampdown.steering.turn_promise import Turnwise, last_turns, longest_turn
from clampdown.study import demo
from clampdown.study.experiment import Subject
from clampdown.study.strengths import Candidate
from clampdown.types import ArmKind, Prompt, Split, Verdict

NAME = "tuned"
SCOPE = "prompt"
TEMPTING = ("jailbroken_seen", "multi_turn")
BORDERLINE = "borderline"
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
    """Discovery prompts, harmful ones first, and what gates read of them."""

    prompts: tuple[Prompt, ...]
    harmful: Bool[np.ndarray, " prompts"]
    pooled: Pooled

    @classmethod
    def read(cls, subject: Subject, scale: demo.Scale) -> Discovery:
        n = int(MORE * scale.discovery)
        harmful = subject.prompts(Split.DISCOVERY, n, *demo.HARMFUL)
        prompts = (*harmful, *subject.prompts(Split.DISCOVERY, n, *demo.HARMLESS))
        pooled = demo.read_pooled(subject, last_turns(prompts))
        return cls(prompts, np.arange(len(prompts)) < len(harmful), pooled)

    @property
    def peaks(self) -> Float[np.ndarray, " d_sae"]:
        """Each feature's largest activation on any content token."""
        return self.pooled["max"].max(axis=0).toarray().ravel()


def search(subject: Subject, scale: demo.Scale, feature: int, unit: float, tokens: RefusalTokens) -> tuple[Arm, ...]:
    """The tuned plan's arms around one refusal feature and its unit (largest activation): one- and two-sided."""
    read = Discovery.read(subject, scale)
    plans = edits_up(subject, scale, clamps(subject, feature, unit), tokens, read)
    plan = best_edit(subject, scale, plans, tokens)
    gate, down = up_gate(subject, scale, read), down_gate(subject, scale, read)
    reverse = Edit(site=plan.edits[0].site, operator="scale", features=(feature,), strengths=(-1.0,), scope=SCOPE)
    one = plan.model_copy(update={"name": f"{plan.name} one-sided", "gate": gate})
    first = {"edits": (reverse,), "gate": down, "otherwise": Branch(gate=gate, edits=plan.edits)}
    two = Plan.model_validate({**dict(plan), "name": f"{plan.name} two-sided", **first})
    strength = plan.edits[0].strengths[0]
    return tuple(Arm(p.name, ArmKind.TUNED, p, strength, group=NAME) for p in (one, two))


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


def clamps(subject: Subject, feature: int, unit: float) -> dict[float, Plan]:
    """The feature clamped at every multiple of its unit, by multiple."""
    return {m: causal.clamp_plan(subject.lm, subject.sae, feature, m * unit, SCOPE) for m in MULTIPLES}


def edits_up(
    subject: Subject, scale: demo.Scale, alone: Mapping[float, Plan], tokens: RefusalTokens, read: Discovery
) -> list[Plan]:
    """Ungated plans: every strength with none, one, two partners, each with and without the relapse held down."""
    lm, sae = subject.lm, subject.sae
    units = {f: PARTNER_MULTIPLE * float(peak) for f, peak in enumerate(read.peaks) if peak > 0}
    shown = subject.prompts(Split.DISCOVERY, scale.causal_prompts, *TEMPTING)
    measure = PrefillRefusal(lm, sae, shown, tokens)
    joined = [partner.feature for partner in partners(alone[SEARCHED_AT], units, measure, PARTNERS)]
    sets = [{f: units[f] for f in joined[:n]} for n in range(len(joined) + 1)]
    holds = relapses(subject, scale, with_partners(alone[SEARCHED_AT], sets[-1]), read)
    plans = []
    for further, (multiple, plan) in itertools.product(sets, alone.items()):
        grown = with_partners(plan, further)
        name = f"{NAME} {' + '.join(map(str, grown.edits[0].features))} x{multiple:g}"
        plans.append(grown.model_copy(update={"name": name}))
        if holds:
            also = f"{name}, {' + '.join(map(str, holds))} held"
            plans.append(held(grown, holds).model_copy(update={"name": also}))
    return plans


def relapses(subject: Subject, scale: demo.Scale, plan: Plan, read: Discovery) -> list[int]:
    """The features whose ablation repairs most failing replies of discovery prompts, at most `HELD`."""
    wanted = int(MORE * scale.discovery)
    shown = subject.prompts(Split.DISCOVERY, wanted, *TEMPTING)
    length = scale.sizes.max_new_tokens
    failed = failing(subject.lm, subject.sae, plan, shown, subject.judge, max_new_tokens=length)[:RELAPSES]
    if not failed:
        return []
    live = [int(f) for f in np.flatnonzero(read.peaks) if f not in plan.edits[0].features]
    found = repairs(subject.lm, subject.sae, plan, failed, live, subject.judge, max_new_tokens=length)
    return [repair.feature for repair in found[:HELD] if repair.repaired]


def best_edit(subject: Subject, scale: demo.Scale, plans: Sequence[Plan], tokens: RefusalTokens) -> Plan:
    """The choice among edits, on validation prompts."""
    shown = subject.prompts(Split.VALIDATION, int(MORE * scale.validation), *TEMPTING)
    arms = [Arm(plan.name, ArmKind.FEATURE, plan) for plan in plans]
    pairs = [(arm, prompt) for prompt in shown for arm in arms]
    replies = generate_arms(subject.lm, subject.saes, pairs, max_new_tokens=scale.sizes.max_new_tokens)
    refused = Counter(r.arm.name for r in replies if subject.judge(r.prompt, r.text).verdict is Verdict.REFUSED)
    enough = max(refused.values(), default=0) - SLACK * len(shown)
    able = [plan for plan in plans if refused[plan.name] >= enough]
    margins = PrefillRefusal(subject.lm, subject.sae, shown, tokens)(able)
    return able[int(np.argmax(margins))]


def steering_up(plan: Plan) -> tuple[Edit, ...]:
    """The edits that raise refusal: those of the second branch when the first steers down."""
    return plan.otherwise.edits if plan.otherwise else plan.edits


def opened(plan: Plan) -> Plan:
    """What the plan does to a prompt that it takes for harmful, without any gate."""
    return plan.model_copy(update={"edits": steering_up(plan), "gate": None, "otherwise": None})


def at_strengths(plan: Plan, up: Plan, name: str) -> Plan:
    """The plan with the edits of an opened one where it steers up."""
    if plan.otherwise is None:
        return plan.model_copy(update={"edits": up.edits, "name": name})
    branch = plan.otherwise.model_copy(update={"edits": up.edits})
    return plan.model_copy(update={"otherwise": branch, "name": name})


# ---- gates ---------------------------------------------------------------------------------------------------


def up_gate(subject: Subject, scale: demo.Scale, read: Discovery) -> Gate:
    """The gate of harmful prompts, at the module's step 2."""
    fitted = demo.ungauged(subject, _probe(subject, read, read.harmful))
    benign = subject.prompts(Split.CALIBRATION, 2 * scale.calibration, "benign")
    budget = max(BUDGET, provable_budget(len(benign), CONFIDENCE))
    return _turnwise(subject, read, benign).within(fitted, benign, budget).gate


def down_gate(subject: Subject, scale: demo.Scale, read: Discovery) -> Gate:
    """The gate of borderline prompts, which spares harmful ones."""
    borderline = np.array([prompt.suite == BORDERLINE for prompt in read.prompts])
    fitted = demo.ungauged(subject, _probe(subject, read, borderline))
    harmful = subject.prompts(Split.CALIBRATION, 2 * scale.calibration, *demo.HARMFUL)
    budget = max(DOWN_BUDGET, provable_budget(len(harmful), CONFIDENCE))
    return _turnwise(subject, read, harmful).at_last(fitted, harmful, budget, on="harmful").gate


def _turnwise(subject: Subject, read: Discovery, calibration: Sequence[Prompt]) -> Turnwise:
    window = longest_turn(subject.lm, [*read.prompts, *calibration])
    return Turnwise(subject.lm, subject.sae, window, CONFIDENCE)


def _probe(subject: Subject, read: Discovery, positive: Bool[np.ndarray, " prompts"]) -> Probe:
    return fit_probe(
        read.pooled, positive, max_features=PROBE_FEATURES, inverse_penalty=PROBE_PENALTY, seed=subject.seed
    )
