"""The chosen plan as a request that one can copy: curl, and the openai package.

A plan that the server offers is named in the model's id. One that was adjusted on the page and not saved is sent as an
inline edit where a request can say it: one edit on features, without a gate or with that of a plan which is offered.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from clampdown.steering.plan import Plan


@dataclass(frozen=True, slots=True)
class Target:
    """Where and as what to ask: the server's address, the model's name, and the plan's name there, if it has one."""

    url: str
    model: str
    offered: str | None
    gate_of: str | None = None
    """The offered plan that has this plan's gate."""


def inline_edit(plan: Plan, gate_of: str | None) -> dict[str, Any] | None:
    """The plan as the field `steering`; None when a request cannot say it."""
    if len(plan.edits) != 1 or plan.otherwise or not plan.edits[0].features or plan.edits[0].error_term != "keep":
        return None
    edit = plan.edits[0]
    if len(set(edit.strengths)) != 1 or (plan.gate is not None and gate_of is None):
        return None
    features = {"feature": edit.features[0]} if len(edit.features) == 1 else {"features": list(edit.features)}
    said = {**features, "operator": edit.operator, "strength": edit.strengths[0], "scope": edit.scope}
    return {**said, "gate": gate_of} if plan.gate is not None else said


def body(target: Target, plan: Plan, question: str) -> dict[str, Any] | None:
    """The request's JSON; None for a plan that must be saved before it can be asked for."""
    messages = [{"role": "user", "content": question}]
    if target.offered is not None:
        return {"model": f"{target.model}:{target.offered}", "messages": messages}
    steering = inline_edit(plan, target.gate_of)
    return None if steering is None else {"model": target.model, "messages": messages, "steering": steering}


SAVE_FIRST = "# A request cannot say this plan: save it above, then it has a name."


def curl(target: Target, plan: Plan, question: str) -> str:
    """A command for a POSIX shell."""
    asked = body(target, plan, question)
    if asked is None:
        return SAVE_FIRST
    quoted = json.dumps(asked, indent=2, ensure_ascii=False).replace("'", "'\\''")
    return (
        f"curl {target.url}/v1/chat/completions \\\n"
        "  -H 'Authorization: Bearer none' \\\n"
        "  -H 'Content-Type: application/json' \\\n"
        f"  -d '{quoted}'"
    )


def python(target: Target, plan: Plan, question: str) -> str:
    """A script for the openai package."""
    asked = body(target, plan, question)
    if asked is None:
        return SAVE_FIRST
    extra = f'    extra_body={{"steering": {asked["steering"]!r}}},\n' if "steering" in asked else ""
    return (
        "from openai import OpenAI\n\n"
        f'client = OpenAI(base_url="{target.url}/v1", api_key="none")\n'
        "reply = client.chat.completions.create(\n"
        f"    model={asked['model']!r},\n"
        f"    messages={asked['messages']!r},\n"
        f"{extra}"
        ")\n"
        "print(reply.choices[0].message.content)\n"
        'print(reply.model_extra["steering"])  # the receipt: what was done\n'
    )
