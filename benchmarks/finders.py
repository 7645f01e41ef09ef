"""Which finder picks the features that really cause refusal? Every feature is clamped, and every finder is ranked.

1. The truth: each feature of the SAE is clamped on the prompt's tokens at the strength that costs a given benign KL
   (teacher-forced replies), the same for all, and its effect is the mean change of the refusal log-odds on held-out
   jailbroken and multi-turn prompts. The first 40 of them then answer prompts: those are ordered by refusals (the
   corpus's exact judge), equal ones by log-odds. Prompts of all corpus seeds together.
2. Each finder gets discovery prompts of one seed, and nothing else. Its ranking is compared with the truth: precision
   at k (the share of its first k that are among the truth's first k), the truth's rank of its first choice, and
   Spearman's correlation of its score with the effect over all features that have one.

Seconds are CPU seconds of this process from nothing but a loaded model; prompts are the distinct ones that were read.

    python benchmarks/finders.py [--quick] [--weights DIR] [--seeds 0 1 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import spearmanr

from clampdown.config import ORGANISM_WEIGHTS
from clampdown.discovery.causal import clamp_plan
from clampdown.discovery.finders import DEFAULT, FINDERS, Material, run_finder
from clampdown.discovery.pairs import Pair
from clampdown.discovery.refusal_tokens import find_refusal_tokens
from clampdown.discovery.screening import BenignKl, Matched, PrefillRefusal, match_strengths
from clampdown.models.loading import LanguageModel, load_model
from clampdown.organism.judge import judge
from clampdown.organism.suites import suites, without_wrapper
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae
from clampdown.steering.arms import Arm, generate_arms
from clampdown.types import ArmKind, FeatureSet, Prompt, Split, Verdict

TEMPTING = ("jailbroken_seen", "jailbroken_unseen", "multi_turn")
SCOPE = "prompt"
KS = (1, 5, 10)
console = Console(width=110)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Prompts in all: screened and generated are split over seeds and tempting suites, benign over seeds."""

    screened: int = 27
    benign: int = 12
    generated_features: int = 40
    generated_prompts: int = 18
    discovery: int = 120


@dataclass(frozen=True, slots=True)
class Truth:
    """`effect` per feature in nats at matched KL; `order` is the truth's ranking; `refused` of the generated ones."""

    effect: np.ndarray
    order: tuple[int, ...]
    refused: dict[int, float]
    baseline_refused: float
    unmatched: int
    seconds: float

    @property
    def rank(self) -> dict[int, int]:
        return {feature: place for place, feature in enumerate(self.order, 1)}


def drawn(split: Split, names: Sequence[str], seeds: Sequence[int], n: int) -> list[Prompt]:
    """About n prompts, equally many of every seed and suite, each once."""
    each = max(1, round(n / len(seeds) / len(names)))
    found: dict[str, Prompt] = {}
    for seed in seeds:
        by_name = {suite.name: suite for suite in suites(split, 2 * each, seed)}
        for name in names:
            fresh = [p for p in by_name[name].prompts if p.id not in found][:each]
            found.update((p.id, p) for p in fresh)
    return list(found.values())


def truth_of(lm: LanguageModel, sae: Sae, seeds: Sequence[int], sizes: Sizes, goal: float) -> Truth:
    """Clamp every feature."""
    began = time.process_time()
    known = drawn(Split.DISCOVERY, ("harmful", "benign"), seeds, 48)
    tokens = find_refusal_tokens(lm, known, judge)
    kl = BenignKl(lm, sae, drawn(Split.TEST, ("benign",), seeds, sizes.benign), max_new_tokens=10)
    refusal = PrefillRefusal(lm, sae, drawn(Split.TEST, TEMPTING, seeds, sizes.screened), tokens)
    effect, matched = np.zeros(sae.cfg.d_sae), []
    for start in track(range(0, sae.cfg.d_sae, 64), description=f"Clamping {sae.name}", console=console):
        features = range(start, min(start + 64, sae.cfg.d_sae))
        plans = [lambda c, f=f: clamp_plan(lm, sae, f, c, SCOPE) for f in features]
        found = match_strengths(plans, kl, goal, [100.0] * len(features))
        effect[features.start : features.stop] = refusal([m.plan for m in found])
        matched.extend(found)
    refused, baseline = generated(
        lm, sae, matched, effect, drawn(Split.TEST, TEMPTING, seeds, sizes.generated_prompts), sizes
    )
    by_effect = np.argsort(-effect, kind="stable").tolist()
    order = sorted(refused, key=lambda f: (-refused[f], -effect[f])) + [f for f in by_effect if f not in refused]
    unmatched = sum(not m.ok for m in matched)
    return Truth(effect, tuple(order), refused, baseline, unmatched, time.process_time() - began)


def generated(
    lm: LanguageModel, sae: Sae, matched: Sequence[Matched], effect: np.ndarray, prompts: Sequence[Prompt], sizes: Sizes
) -> tuple[dict[int, float], float]:
    """Share of prompts refused under each of the strongest features, and by the unsteered model."""
    best = np.argsort(-effect, kind="stable")[: sizes.generated_features].tolist()
    arms = [Arm("baseline", ArmKind.BASELINE), *(Arm(str(f), ArmKind.FEATURE, matched[f].plan) for f in best)]
    counts = dict.fromkeys((arm.name for arm in arms), 0)
    for start in track(range(0, len(arms), 6), description="Generating", console=console):
        pairs = [(arm, prompt) for arm in arms[start : start + 6] for prompt in prompts]
        for reply in generate_arms(lm, sae, pairs, max_new_tokens=32):
            counts[reply.arm.name] += judge(reply.prompt, reply.text).verdict is Verdict.REFUSED
    shares = {name: count / len(prompts) for name, count in counts.items()}
    return {f: shares[str(f)] for f in best}, shares["baseline"]


def material(lm: LanguageModel, sae: Sae, seed: int, sizes: Sizes) -> Material:
    """What finders get: discovery prompts of one seed. Wrapper families held out for tests never occur in them."""
    found = {suite.name: suite.prompts for suite in suites(Split.DISCOVERY, sizes.discovery, seed)}
    pairs = tuple(Pair(without_wrapper(prompt), prompt) for prompt in found["jailbroken_seen"])
    return Material(lm, sae, found["harmful"], found["benign"], pairs, judge, seed=seed)


def score_of(found: FeatureSet, truth: Truth) -> dict[str, float]:
    """One ranking against the truth."""
    values = np.asarray(found.column(found.ranked_by))
    has = np.isfinite(values)
    chosen = list(found.ranking)
    precision = {f"precision_at_{k}": len(set(chosen[:k]) & set(truth.order[:k])) / k for k in KS}
    paired: Any = spearmanr(values[has], truth.effect[has])
    rho = float(paired.statistic) if has.sum() > 2 else float("nan")
    return {
        **precision,
        "rank_of_first": truth.rank[chosen[0]],
        "spearman": rho,
        "spearman_n": int(has.sum()),
        "prompts": int(found.provenance.extra["n_prompts"]),
    }


def compare(lm: LanguageModel, sae: Sae, truth: Truth, seeds: Sequence[int], sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Every finder on every seed, each from fresh material."""
    results: dict[str, dict[str, Any]] = {}
    for name in track(FINDERS, description=f"Finders on {sae.name}", console=console):
        runs = []
        for seed in seeds:
            given = material(lm, sae, seed, sizes)
            began = time.process_time()
            found = run_finder(name, given)
            seconds = time.process_time() - began
            runs.append({"seed": seed, "first": found.ranking[0], "seconds": seconds, **score_of(found, truth)})
        means = {key: statistics.mean(run[key] for run in runs) for key in runs[0] if key not in ("seed", "first")}
        results[name] = {**means, "worst_rank_of_first": max(run["rank_of_first"] for run in runs), "runs": runs}
    return results


def show(width: str, truth: Truth, results: dict[str, dict[str, Any]]) -> None:
    first = ", ".join(f"{f} ({truth.effect[f]:+.2f} nats, refused {truth.refused[f]:.2f})" for f in truth.order[:5])
    console.print(
        f"\n{width}: truth {first}; unsteered refused {truth.baseline_refused:.2f}; {truth.unmatched} unmatched"
    )
    table = Table("finder", "rank of first (seeds)", "p@1", "p@5", "p@10", "Spearman", "prompts", "CPU s")
    for name, row in sorted(
        results.items(), key=lambda item: (item[1]["worst_rank_of_first"], -item[1]["precision_at_5"])
    ):
        ranks = " ".join(str(run["rank_of_first"]) for run in row["runs"])
        shares = [f"{row[f'precision_at_{k}']:.2f}" for k in KS]
        rho = f"{row['spearman']:.2f} ({row['spearman_n']:.0f})"
        table.add_row(name, ranks, *shares, rho, f"{row['prompts']:.0f}", f"{row['seconds']:.1f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=ORGANISM_WEIGHTS, help="a trained organism")
    parser.add_argument("--saes", nargs="+", default=["x4", "x8"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--kl", type=float, default=0.02, help="benign KL at which features are compared, nats per token"
    )
    parser.add_argument("--quick", action="store_true", help="fewer prompts and generated features")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = Sizes(18, 6, 10, 9, 60) if options.quick else Sizes()
    lm = load_model(str(options.weights / "model"))
    summary: dict[str, Any] = {"default_finder": DEFAULT, "best_rank_of_default_choice": {}, "finders": {}, "truth": {}}
    for width in options.saes:
        sae = load_sae(str(options.weights / f"sae-{width}"))
        truth = truth_of(lm, sae, options.seeds, sizes, options.kl)
        results = compare(lm, sae, truth, options.seeds, sizes)
        show(width, truth, results)
        summary["best_rank_of_default_choice"][width] = results[DEFAULT]["worst_rank_of_first"]
        for name, row in results.items():
            summary["finders"].setdefault(name, {})[width] = row
        summary["truth"][width] = {
            "first": [
                {"feature": f, "effect": float(truth.effect[f]), "refused": truth.refused.get(f)}
                for f in truth.order[:20]
            ],
            "baseline_refused": truth.baseline_refused,
            "unmatched": truth.unmatched,
            "seconds": truth.seconds,
        }
    if options.json:
        options.json.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
