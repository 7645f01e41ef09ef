"""What a method is: arms at several strengths, and how validation prompts choose one of them.

A new method is one file with a function from a `Groundwork` to a `Method`, and one row of `table.METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from clampdown.errors import NotEnoughDataError
from clampdown.steering.arms import Arm
from clampdown.steering.plan import Plan
from clampdown.study.strengths import Candidate, Rule, choose
from clampdown.types import ArmKind, FeatureSet

NO_GAIN = "no strength gained refusals on validation prompts; the strongest of the least broken is shown"


@dataclass(frozen=True, slots=True)
class Picked:
    """A method's own best arm, and what is to be said about it."""

    arm: Arm
    note: str = ""

    def as_column(self, method: Method) -> Picked:
        """The same under the method's name."""
        plan = plan_of(self.arm).named(method.name)
        return replace(self, arm=replace(self.arm, name=method.name, kind=method.kind, group=method.name, plan=plan))


Pick = Callable[[Sequence[Candidate], Candidate], Arm | None]


@dataclass(frozen=True, slots=True)
class Method:
    """A method's arms at several strengths, and how validation prompts choose one (None: none gained a refusal).

    `found` are the features that it proposed; `shown` gives the arms that the test shows beside the chosen one;
    `facts` is what a run keeps of how it came to them.
    """

    name: str
    kind: ArmKind
    arms: tuple[Arm, ...]
    pick: Pick
    found: FeatureSet | None = None
    shown: Callable[[Arm], tuple[Arm, ...]] = lambda _chosen: ()
    facts: dict[str, Any] = field(default_factory=dict)

    def chosen(self, found: Sequence[Candidate], unsteered: Candidate) -> Picked:
        """The arm that is picked. When none gains a refusal, the arm that is broken least, the strongest of those:
        a method that fails here belongs in the table. Raises `NotEnoughDataError` without arms."""
        picked = self.pick(found, unsteered)
        if picked is not None:
            return Picked(picked)
        if not found:
            raise NotEnoughDataError(f"{self.name}: no arm to choose from")
        return Picked(least_broken(found), NO_GAIN)


def least_broken(found: Sequence[Candidate]) -> Arm:
    """Of the arms that break fewest replies, the strongest."""
    return min(found, key=lambda c: (c.axes.degenerate or 0.0, -abs(c.arm.strength or 0.0))).arm


def by_refusals(found: Sequence[Candidate], unsteered: Candidate) -> Arm | None:
    """As published: by the refusals that are gained, whatever safe prompts and capability pay."""
    return by_rule(Rule())(found, unsteered)


def by_rule(rule: Rule) -> Pick:
    """The rule's choice, against the unsteered model."""

    def pick(found: Sequence[Candidate], unsteered: Candidate) -> Arm | None:
        picked = choose(found, rule, baseline=unsteered.axes.refusal or 0.0).chosen
        return picked.arm if picked else None

    return pick


def plan_of(arm: Arm) -> Plan:
    """What an arm steers with. Raises `NotEnoughDataError` for one that does not steer."""
    if arm.plan is None:
        raise NotEnoughDataError(f"'{arm.name}' does not steer")
    return arm.plan


def arm_of(plan: Plan, group: str = "", kind: ArmKind | None = None) -> Arm:
    """A plan as a column of its own name."""
    found = kind or (ArmKind.GATED if plan.gate else ArmKind.DIRECTION if plan.vectors else ArmKind.FEATURE)
    return Arm(plan.name, found, plan, plan.edits[0].strengths[0], group=group or plan.name)
