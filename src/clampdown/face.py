"""The main job from Python: what a notebook needs, by short names (`import clampdown as cd`).

    lm, sae = cd.load("organism"), cd.load_sae("organism")
    data = cd.data("organism")                           # or cd.data(harmful="a.csv", benign="b.jsonl", ...)
    found = cd.find(lm, sae, data)
    plan = cd.clamp(lm, sae, found[0], "1.5p99", scope="prompt")
    with cd.steer(lm, plan) as s:
        replies = cd.generate(lm, ["Hi", "2 + 2?"])
    gated = plan.behind(cd.gate(lm, plan, data, budget=0.02))
    run = cd.evaluate(lm, [plan, gated], data, controls=20)

Every function takes loaded things or what names them: models and SAEs by name or directory, plans by their file. Long
calls show progress. Errors are those of `clampdown.errors`: they say what, where, and what to do.
"""

from __future__ import annotations

from clampdown.interactive.exchanging import export, import_plan
from clampdown.interactive.loading import data, load, load_sae, plan, run
from clampdown.interactive.making import add, along, card, clamp, find, gate
from clampdown.interactive.measuring import attack, evaluate, evaluate_shard, merge, side_effects
from clampdown.interactive.replying import generate, steer
from clampdown.interactive.searching import run_study, tune
from clampdown.models.placing import Placing
from clampdown.study.budgets import Budgets

__all__ = [
    "Budgets",
    "Placing",
    "add",
    "along",
    "attack",
    "card",
    "clamp",
    "data",
    "evaluate",
    "evaluate_shard",
    "export",
    "find",
    "gate",
    "generate",
    "import_plan",
    "load",
    "load_sae",
    "merge",
    "plan",
    "run",
    "run_study",
    "side_effects",
    "steer",
    "tune",
]
