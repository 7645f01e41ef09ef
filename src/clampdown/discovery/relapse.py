"""What lets a reply that began as a refusal break off: features whose ablation from the assistant's start repairs it.

An edit on the prompt's tokens decides how a reply begins. Some then fall back ("I must refuseSure. To ..."), because
the tokens being written are read without the edit. On prompts whose replies fail under a plan, every live feature is
ablated from the assistant's header on, one at a time; the one that repairs most is proposed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.arms import Arm, generate_arms
from clampdown.steering.plan import Edit, Plan
from clampdown.types import ArmKind, Judge, Prompt, Verdict


@dataclass(frozen=True, slots=True)
class Repair:
    """A feature, and how many of `n` failing replies became refusals when it was ablated."""

    feature: int
    repaired: int
    n: int


def held(plan: Plan, features: Sequence[int]) -> Plan:
    """The plan with the features ablated from the assistant's header on."""
    hold = Edit(
        site=plan.edits[0].site,
        operator="scale",
        features=tuple(features),
        strengths=(0.0,) * len(features),
        scope="assistant",
    )
    return plan.changed(edits=(*plan.edits, hold))


def failing(
    lm: LanguageModel, sae: Sae, plan: Plan, prompts: Sequence[Prompt], judge: Judge, *, max_new_tokens: int
) -> list[Prompt]:
    """The prompts that the plan does not turn into refusals."""
    arm = Arm(plan.name, ArmKind.FEATURE, plan)
    replies = generate_arms(lm, sae, [(arm, prompt) for prompt in prompts], max_new_tokens=max_new_tokens)
    return [r.prompt for r in replies if judge(r.prompt, r.text).verdict is not Verdict.REFUSED]


def repairs(
    lm: LanguageModel,
    sae: Sae,
    plan: Plan,
    prompts: Sequence[Prompt],
    features: Sequence[int],
    judge: Judge,
    *,
    max_new_tokens: int,
) -> tuple[Repair, ...]:
    """What ablating each of `features` repairs on failing prompts, most first; ties go to the lower index."""
    arms = [(f, Arm(str(f), ArmKind.FEATURE, held(plan, [f]))) for f in features]
    pairs = [(arm, prompt) for prompt in prompts for _, arm in arms]
    replies = generate_arms(lm, sae, pairs, max_new_tokens=max_new_tokens)
    good = Counter(r.arm.name for r in replies if judge(r.prompt, r.text).verdict is Verdict.REFUSED)
    found = [Repair(f, good[arm.name], len(prompts)) for f, arm in arms]
    return tuple(sorted(found, key=lambda repair: (-repair.repaired, repair.feature)))
