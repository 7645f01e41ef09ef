"""Dense baselines: the difference of means added at several sizes, ablated, and behind CAST's condition.

Arditi et al. (2406.11717) for the direction, Lee et al. (2409.05907) for the condition.
"""

from __future__ import annotations

from dataclasses import replace

from clampdown.steering.arms import Arm
from clampdown.steering.plan import Edit, Plan
from clampdown.study.groundwork import Groundwork
from clampdown.study.methods.method import Method, arm_of, by_refusals, plan_of
from clampdown.study.strengths import sweep_arms
from clampdown.types import ArmKind

ADDED, ABLATED, CAST = "difference of means", "ablated direction", "CAST-style"
SIZES = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Multiples of the raw difference: added once it moves the mean harmless prompt onto the mean harmful one."""


def added_direction(ground: Groundwork) -> Method:
    """The difference of means added at every token."""
    return Method(ADDED, ArmKind.DIRECTION, sweep_arms(_plan(ground, "add_direction", ADDED), [1.0], SIZES),
                  by_refusals)  # fmt: skip


def ablated_direction(ground: Groundwork) -> Arm:
    """The difference of means projected out at every token: has no strength to choose."""
    return arm_of(_plan(ground, "ablate_direction", ABLATED), "dense", ArmKind.DIRECTION)


def conditional_direction(ground: Groundwork) -> Method:
    """The added direction behind CAST's condition."""
    arms = tuple(_behind_condition(ground, arm) for arm in added_direction(ground).arms)
    return Method(CAST, ArmKind.DIRECTION, arms, by_refusals)


def _plan(ground: Groundwork, operator: str, name: str) -> Plan:
    study = ground.study
    edit = Edit(site=study.site.name, operator=operator, strengths=(1.0,), vector="direction", scope="all")
    return Plan.of(study.lm, [], [edit], name, vectors={"direction": ground.dense})


def _behind_condition(ground: Groundwork, arm: Arm) -> Arm:
    found, name = ground.condition, arm.name.replace(ADDED, CAST)
    plan = plan_of(arm).changed(name=name, gate=found.gate, saes=(found.ref,))
    return replace(arm, name=name, plan=plan, group=CAST)
