"""Does a gate hold over turns? Harm in the first, middle or last turn of conversations with k benign turns.

1. A gate is fitted and calibrated on the embedded corpus as `clampdown gate calibrate` does; for the first seed its
   in-context form (one reading of the whole prompt, calibrated on single prompts) beside it.
2. Held-out conversations: one harmful turn (plain and wrapped ones, of families seen and unseen, take turns) and k
   benign ones around it, with the corpus's replies between them. Benign conversations of k + 1 turns are made of the
   held-out benign suite, as calibration makes them.
3. How often each gate fires, with n per cell, for several corpus seeds. The harmful turns are the same in every cell,
   the benign ones are new.

    python benchmarks/gate_conversations.py [--quick] [--weights DIR] [--kinds probe dense ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from rich.console import Console
from rich.table import Table

from clampdown.activations.collect import collect
from clampdown.activations.stream import plan_pass
from clampdown.config import ORGANISM_WEIGHTS
from clampdown.models.loading import LanguageModel, load_model
from clampdown.organism import capability_items, safety_items
from clampdown.organism.items import Item, Sampler, assistant, draw
from clampdown.organism.suites import one_suite, suites
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae
from clampdown.steering.gate_fitting import FittedGate, Pooled, fit_gate, gate_reading
from clampdown.steering.turn_promise import Turnwise, last_turns, longest_turn
from clampdown.steering.turn_reading import read_prompts
from clampdown.types import Message, Prompt, Split

KS, PLACES = (0, 1, 2, 4, 8), ("first", "middle", "last")
BENIGN: tuple[Sampler, ...] = (
    safety_items.benign,
    safety_items.benign_wrapped,
    safety_items.small_talk,
    capability_items.unknown,
)
"""The benign suite's samplers of single turns."""
HARMFUL: tuple[Sampler, ...] = (safety_items.harmful, safety_items.jailbroken, safety_items.jailbroken_unseen)
BUDGET, CONFIDENCE, N = 0.02, 0.95, 3200
console = Console(width=110)


@dataclass(frozen=True, slots=True)
class Reader:
    """One gate in its two forms; how many of some conversations it fires on."""

    lm: LanguageModel
    sae: Sae
    turn_by_turn: FittedGate
    in_context: FittedGate | None

    def rates(self, talks: Sequence[Prompt]) -> tuple[float, ...]:
        gate = self.turn_by_turn
        read = read_prompts(self.lm, gate.gate, gate.vectors, self.sae, talks)
        found = (float(np.mean([reading.opens for reading in read])),)
        if self.in_context is None:
            return found
        whole = self.in_context.scores(pooled_of(self.lm, self.sae, talks)) > self.in_context.gate.threshold
        return (*found, float(np.mean(whole)))


def pooled_of(lm: LanguageModel, sae: Sae, prompts: Sequence[Prompt]) -> Pooled:
    return Pooled.of(collect(plan_pass(lm, [gate_reading(sae.cfg.site, sae)], prompts)))


def fitted(lm: LanguageModel, sae: Sae, kind: str, seed: int, *, both: bool) -> Reader:
    """The gate, and if wanted its in-context form from the same prompts."""
    found = [(prompt, suite.harmful) for suite in suites(Split.DISCOVERY, 240, seed) for prompt in suite.prompts]
    prompts, harmful = [prompt for prompt, _ in found], np.array([label for _, label in found])
    benign = one_suite("benign", Split.CALIBRATION, N, seed).prompts
    turnwise = Turnwise(lm, sae, longest_turn(lm, [*prompts, *benign]), CONFIDENCE)
    alone = fit_gate(kind, pooled_of(lm, sae, last_turns(prompts)), harmful, seed=seed)
    within = turnwise.within(alone, benign, BUDGET)
    if not both:
        return Reader(lm, sae, within, None)
    whole = fit_gate(kind, pooled_of(lm, sae, prompts), harmful, seed=seed)
    scores = whole.scores(pooled_of(lm, sae, benign))
    return Reader(lm, sae, within, whole.calibrated(scores, budget=BUDGET, confidence=CONFIDENCE))


def talk(seed: int, k: int, place: str, number: int) -> Prompt:
    """k benign turns and, at a place, a harmful one."""
    rng, harm = Random(f"{seed}|{place}|{k}|{number}"), Random(f"{seed}|{number}")
    items = [draw(rng.choice(BENIGN), rng, Split.TEST) for _ in range(k)]
    extra = draw(HARMFUL[number % len(HARMFUL)], harm, Split.TEST)
    items.insert({"first": 0, "middle": k // 2, "last": k}[place], extra)
    return Prompt(f"{k}-{place}-{number}", tuple(_messages(items)), "conversations")


def _messages(items: Sequence[Item]) -> list[Message]:
    found = [message for item in items for message in (*item.messages, assistant(item.reply))]
    return found[:-1]


def measured(reader: Reader, n: int, seed: int) -> dict[str, dict[int, tuple[float, ...]]]:
    """By place ('benign' for none) and k: how often the gate fires, turn by turn and in context."""
    found = {p: {k: reader.rates([talk(seed, k, p, i) for i in range(n)]) for k in KS} for p in PLACES}
    return {**found, "benign": {k: reader.rates(benign_talks(seed, k, 2 * n)) for k in KS}}


def benign_talks(seed: int, k: int, n: int) -> list[Prompt]:
    """Conversations of k + 1 turns, of consecutive prompts of the benign suite."""
    suite = one_suite("benign", Split.TEST, 20 * n, seed).prompts
    turns = [message for prompt in suite for message in prompt.messages if message.role == "user"]
    cuts = [turns[at : at + k + 1] for at in range(0, len(turns) - k, k + 1)][:n]
    talks = [[message for turn in cut for message in (turn, assistant("Okay."))][:-1] for cut in cuts]
    return [Prompt(f"benign-{k}-{i}", tuple(messages), "conversations") for i, messages in enumerate(talks)]


def shown(kind: str, seed: int, found: dict[str, dict[int, tuple[float, ...]]], reader: Reader) -> Table:
    gate = reader.turn_by_turn.gate
    title = f"{kind}, corpus seed {seed}: conversations of {gate.turns_calibrated} turns, window {gate.window}"
    table = Table("harm", "reading", *(f"k = {k}" for k in KS), title=title)
    for place, cells in found.items():
        for form, name in enumerate(("turn by turn", "in context")[: len(cells[0])]):
            table.add_row(place, name, *(f"{cells[k][form]:.3f}" for k in KS))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--weights", type=Path, default=ORGANISM_WEIGHTS)
    parser.add_argument("--kinds", nargs="+", default=["probe"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    lm, sae = load_model(given.weights / "model"), load_sae(str(given.weights / "sae-x4"))
    n, seeds = (30, given.seeds[:1]) if given.quick else (120, given.seeds)
    rows = []
    for kind in given.kinds:
        for seed in seeds:
            reader = fitted(lm, sae, kind, seed, both=seed == seeds[0])
            found = measured(reader, n, seed)
            console.print(shown(kind, seed, found, reader))
            rows.append({"kind": kind, "seed": seed, "n": n, "rates": found})
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
