"""What every reply should be: clampdown's own engine, one conversation at a time, greedy, in float32.

    python reference.py PLANS_DIRECTORY OUT.json [short]

Writes the plans (every operator, scope and kind of gate, one and several sites, two-sided, turn by turn) and the
replies; `short`: of fewer conversations. It is run in a process of its own, so that the tests' process has no threads
of torch when it forks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from clampdown.models.chat import encode
from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel, load_model
from clampdown.organism import PLANS_DIR
from clampdown.organism.suites import one_suite
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae
from clampdown.steering.gate_kinds import register_scorer
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Branch, Edit, Gate, Plan, read_plan, write_plan
from clampdown.types import Message, Split

TOKENS = 40
SUITES = (("jailbroken_seen", 3), ("jailbroken_unseen", 2), ("multi_turn", 3), ("borderline", 2), ("facts", 2))
SHORT = (("jailbroken_seen", 1), ("multi_turn", 1))
HISTORY = (
    Message("system", "You are a helpful assistant who answers briefly and politely."),
    Message("user", "What is the capital of Spain?"),
    Message("assistant", "Madrid is the capital of Spain."),
    Message("user", "What is 12 plus 7?"),
    Message("assistant", "12 + 7 = 19. The answer is 19."),
    Message("user", "What is the capital of Austria?"),
    Message("assistant", "Vienna is the capital of Austria."),
)
LAST = ("What is the capital of France?", "How do I pick a lock?", "Write one word.", "Tell me about Spain.")


def conversations(suites: Sequence[tuple[str, int]] = SUITES) -> list[tuple[Message, ...]]:
    """Short and long ones, some with the same beginning: where a prefix cache has something to confuse."""
    found = []
    for name, n in suites:
        suite = one_suite(name, Split.TEST, 40)
        assert suite is not None, name
        found += [tuple(prompt.messages) for prompt in suite.prompts[:n]]
    return found + [(*HISTORY, Message("user", text)) for text in LAST]


def length_score(text: str) -> float:
    """An external classifier: how long the text is."""
    return float(len(text))


LOW = "blocks.1.hook_resid_post"


@dataclass(frozen=True)
class Maker:
    """Makes plans for the embedded model, most of them about its refusal feature."""

    lm: LanguageModel
    sae: Sae
    talks: Sequence[tuple[Message, ...]]

    @property
    def site(self) -> str:
        return self.sae.cfg.site.name

    @cached_property
    def vectors(self) -> dict[str, tuple[float, ...]]:
        draw = torch.Generator().manual_seed(5)
        return {name: tuple(torch.randn(self.lm.d_model, generator=draw).tolist()) for name in "vwu"}

    def edit(self, operator: str, strength: float, scope: str = "all", *features: int) -> Edit:
        chosen = features or (352,)
        strengths = (strength,) * len(chosen)
        return Edit(site=self.site, operator=operator, features=chosen, strengths=strengths, scope=scope)

    @staticmethod
    def dense(operator: str, strength: float, site: str, scope: str = "all", vector: str = "v") -> Edit:
        return Edit(site=site, operator=operator, vector=vector, strengths=(strength,), scope=scope)

    def plan(self, name: str, *edits: Edit, gate: Gate | None = None, otherwise: Branch | None = None) -> Plan:
        return Plan.of(self.lm, [self.sae], edits, name, vectors=self.vectors, gate=gate, otherwise=otherwise)

    def gate(self, kind: str, **more: Any) -> Gate:
        """One that opens on about half of the conversations."""
        features = tuple(range(3, self.sae.cfg.d_sae, 16))
        n = len(features)
        reads: dict[str, dict[str, Any]] = {
            "probe": {"features": features, "weights": (1.0,) * n, "poolings": ("max", "mean") * (n // 2)},
            "feature": {"features": (352,), "weights": (1.0,), "poolings": ("assistant_start",)},
            "dense": {"vectors": ("v", "w"), "weights": (1.0, -0.5), "poolings": ("mean", "assistant_start")},
            "cosine": {"vectors": ("u",), "weights": (1.0,), "poolings": ("mean",)},
            "external": {"scorer": "length"},
        }
        where = {} if kind == "external" else {"site": self.site if "features" in reads[kind] else LOW}
        gate = Gate(kind=kind, threshold=0.0, **where, **reads[kind], **more)  # type: ignore[arg-type]
        scores = sorted(self._scores(gate))
        middle = len(scores) // 2
        return gate.model_copy(update={"threshold": (scores[middle - 1] + scores[middle]) / 2})

    def _scores(self, gate: Gate) -> list[float]:
        """Of every conversation, as this package's own engine reads it."""
        gated, found = self.plan("p", self.edit("add", 0.0), gate=gate), []
        for messages in self.talks:
            with steer(self.lm, gated, [self.sae]) as steering:
                generate(self.lm, [encode(self.lm, messages)], max_new_tokens=1)
                (receipt,) = steering.receipts()
            assert receipt is not None and receipt.gate_score is not None
            found.append(receipt.gate_score)
        return found


def plans(make: Maker) -> list[Plan]:
    """The shipped ones; every operator and scope, several sites; behind every kind of gate."""
    edit, dense, plan, gate = make.edit, make.dense, make.plan, make.gate
    dropping = edit("clamp", 30.0, "prompt", 19).model_copy(update={"error_term": "drop"})
    up, behind, down = edit("clamp", 80.0), edit("clamp", 80.0, "generated"), edit("add", -40.0, "all", 352, 7)
    turned = Branch(gate=gate("probe", window=24, turns="last"), edits=(down,))
    return [
        *(read_plan(path) for path in sorted(PLANS_DIR.glob("*.toml"))),
        plan("generated", edit("clamp", 60.0, "generated")),
        plan("last-user", edit("clamp", 90.0, "last_user")),
        plan("add-zero", edit("add", 0.0)),
        plan("scale-one", edit("scale", 1.0)),
        plan("floor-assistant", edit("floor", 70.0, "assistant", 352, 7, 11), edit("scale", -2.0, "last_user", 5, 352)),
        plan("active", edit("clamp_active", 90.0, "all", 352, 3, 17), edit("add", 20.0, "generated", 13, 9)),
        plan("drop", dropping),
        plan(
            "sites",
            dense("add_direction", 1.5, "blocks.0.hook_resid_pre"),
            dense("ablate_direction", 1.0, "blocks.1.hook_attn_out", "all", "w"),
            dense("add_direction", 1.0, "blocks.2.hook_mlp_out", "last_user", "u"),
            dense("ablate_direction", 0.7, "blocks.4.hook_resid_pre", "prompt", "v"),
            edit("add", 25.0, "generated", 352),
        ),
        plan("gate-probe", up, gate=gate("probe")),
        plan("gate-feature", up, gate=gate("feature")),
        plan("gate-dense", up, gate=gate("dense")),
        plan("gate-cosine", behind, gate=gate("cosine")),
        plan("gate-external", up, gate=gate("external")),
        plan("gate-turns", up, gate=gate("probe", window=24)),
        plan("two-sided", up, gate=gate("probe"), otherwise=Branch(gate=gate("cosine"), edits=(down,))),
        plan("two-sided-turns", behind, gate=gate("dense", window=24), otherwise=turned),
    ]


def rows(make: Maker, made: list[Plan]) -> list[dict[str, object]]:
    lm, sae = make.lm, make.sae
    found: list[dict[str, object]] = []
    for messages in make.talks:
        ids = encode(lm, messages)
        for plan in [None, *made]:
            receipt = None
            if plan is None:
                (reply,) = generate(lm, [ids], max_new_tokens=TOKENS)
            else:
                with steer(lm, plan, [sae]) as steering:
                    (reply,) = generate(lm, [ids], max_new_tokens=TOKENS)
                    (receipt,) = steering.receipts()
            found.append(
                {
                    "messages": [[m.role, m.content] for m in messages],
                    "prompt": ids,
                    "plan": plan.name.replace(" ", "-") if plan else None,
                    "ids": list(reply.ids),
                    "text": reply.text,
                    "receipt": receipt and {k: getattr(receipt, k) for k in receipt.__slots__},
                }
            )
    return found


def main(directory: Path, out: Path, *, short: bool) -> None:
    torch.set_num_threads(1)
    register_scorer("length", length_score)
    make = Maker(load_model("organism"), load_sae("organism"), conversations(SHORT if short else SUITES))
    made = plans(make)
    for plan in made:
        write_plan(directory / f"{plan.name.replace(' ', '-')}.toml", plan)
    out.write_text(json.dumps(rows(make, made)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), short="short" in sys.argv[3:])
