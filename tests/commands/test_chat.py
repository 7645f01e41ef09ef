"""Chat: two histories that never mix, and names that are shown as they are."""

from __future__ import annotations

import io

from rich.console import Console

from clampdown.commands.chat import Session, side_by_side, steered_arm
from clampdown.saes.checkpoints import OpenedSae
from clampdown.steering.arms import BASELINE, Reply
from clampdown.steering.plan import Edit
from clampdown.types import Message, Prompt
from tests.steering.conftest import SITE, make_plan, tiny_llama

PUSH = Edit(site=SITE.name, operator="add_direction", vector="v", strengths=(9.0,))
PLAN = make_plan(PUSH, vectors={"v": (1.0,) * 32})


def test_a_plan_named_like_the_baseline_keeps_a_history_of_its_own() -> None:
    saes: list[OpenedSae] = []
    arms = (BASELINE, steered_arm(PLAN.model_copy(update={"name": BASELINE.name})))
    session = Session(tiny_llama(), saes, arms, None, 4)
    replies = session.ask("w1 w2")
    expected = [[Message("user", "w1 w2"), Message("assistant", reply.text)] for reply in replies]
    assert [session.histories[arm.name] for arm in arms] == expected


def test_a_plans_name_is_text_not_markup() -> None:
    arm = steered_arm(PLAN.model_copy(update={"name": "less [/red] [bold]refusal"}))
    reply = Reply(arm, Prompt("x", (Message("user", "w1"),), "chat"), "yes", 1, None)
    out = io.StringIO()
    Console(file=out, width=100).print(side_by_side([reply], 100))
    assert "less [/red] [bold]refusal" in out.getvalue()
