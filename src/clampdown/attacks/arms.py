"""The arms that are attacked alike: the model as it is, the plan without its gate, with it, with both of its sides, and
a system prompt that asks in place of steering."""

from __future__ import annotations

from dataclasses import dataclass

from clampdown.evaluation.control_arms import SYSTEM_PROMPT
from clampdown.evaluation.controls import system_prompt_arm
from clampdown.steering.arms import BASELINE, Arm
from clampdown.steering.plan import Plan
from clampdown.types import ArmKind

CLAMP, GATED, TWO_SIDED, SYSTEM = "clamp", "gated", "two-sided", "system prompt"


@dataclass(frozen=True, slots=True)
class Defence:
    """One arm. `kind` is what it is: baseline, clamp, gated, two-sided or system prompt; it is the arm's name too, as
    one plan has at most one of each."""

    arm: Arm

    @property
    def kind(self) -> str:
        return self.arm.name

    @property
    def plan(self) -> Plan | None:
        return self.arm.plan

    @property
    def searched(self) -> Plan | None:
        """What a search with gradients runs against: the edits for a plan that always steers, and the bare model for
        one with a gate. Who gets past a gate meets the bare model, and a gate's score is a term of its own."""
        return None if self.plan is None or self.plan.gates else self.plan


def defences(plan: Plan) -> tuple[Defence, ...]:
    """The baseline, every form of the plan, and the system prompt. What steers down alone is no defence."""
    up = plan.raising()
    arms = [BASELINE, Arm(CLAMP, ArmKind.FEATURE, up.ungated().named(CLAMP))]
    if up.gate is not None:
        arms.append(Arm(GATED, ArmKind.GATED, up.named(GATED)))
    if plan.otherwise is not None:
        arms.append(Arm(TWO_SIDED, ArmKind.TUNED, plan.named(TWO_SIDED)))
    return tuple(map(Defence, (*arms, system_prompt_arm(SYSTEM_PROMPT, SYSTEM))))
