"""Our batched greedy generation against the library's `generate`, on the embedded model: tokens per second and ratio.

Both answer the same prompts, left padded, in one batch, greedily, on one thread. Runs are interleaved and medians
taken; time is this process's CPU time, which other work on the machine does not stretch as it does wall time. Two
cases: every row writes all its tokens ("full length"), and rows stop where the model ends them ("as it ends"), where
ours drops finished rows and the library goes on padding them.

    python benchmarks/generation.py [--batch 16 64 256] [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clampdown.models.chat import Batch, encode, pad_left
from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel, load_model
from clampdown.organism.suites import suites
from clampdown.types import Split


def ours(lm: LanguageModel, prompts: list[list[int]], new_tokens: int) -> int:
    """Generate; returns how many tokens the replies hold."""
    return sum(len(g.ids) + g.finished for g in generate(lm, prompts, max_new_tokens=new_tokens))


def librarys(lm: LanguageModel, batch: Batch, new_tokens: int) -> int:
    """The same through the library: its output keeps finished rows as padding, which counts for nothing."""
    kwargs: dict[str, Any] = {} if lm.eos_ids else {"eos_token_id": None}
    output = lm.model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        do_sample=False,
        max_new_tokens=new_tokens,
        pad_token_id=lm.pad_id,
        **kwargs,
    )
    written = output[:, batch.input_ids.shape[1] :].tolist()
    return sum(_length(row, lm.eos_ids) for row in written)


def _length(row: list[int], eos_ids: frozenset[int]) -> int:
    ends = [i + 1 for i, token in enumerate(row) if token in eos_ids]
    return ends[0] if ends else len(row)


def endless(lm: LanguageModel) -> LanguageModel:
    """The same model, never stopping: what it costs to write every token."""
    copy = replace(lm)
    copy.__dict__["eos_ids"] = frozenset()  # fills the cached property
    return copy


def measure(lm: LanguageModel, prompts: list[list[int]], new_tokens: int, repeats: int) -> dict[str, float]:
    batch = pad_left(prompts, lm.pad_id, lm.device)
    runs: dict[str, Callable[[], int]] = {
        "ours": lambda: ours(lm, prompts, new_tokens),
        "library": lambda: librarys(lm, batch, new_tokens),
    }
    counts = {name: run() for name, run in runs.items()}  # warm-up
    if counts["ours"] != counts["library"]:
        raise SystemExit(f"the two disagree: {counts}")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    rates = {name: counts[name] / statistics.median(taken) for name, taken in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["library"], seconds["ours"], strict=True)]
    return {**{f"{name}_tokens_per_s": rate for name, rate in rates.items()}, "ratio": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm = load_model("organism")
    pool = [prompt for suite in suites(Split.TEST) for prompt in suite.prompts]
    results = []
    for size in options.batch:
        prompts = [encode(lm, pool[i % len(pool)].messages) for i in range(size)]
        for case, model in (("full length", endless(lm)), ("as it ends", lm)):
            row = {"batch": size, "case": case, **measure(model, prompts, options.new_tokens, options.repeats)}
            results.append(row)
            print(
                f"batch {size:4d}, {case:11s}: ours {row['ours_tokens_per_s']:7.0f} tokens/s, "
                f"library {row['library_tokens_per_s']:7.0f}, ratio {row['ratio']:.2f}"
            )
    if options.json:
        options.json.write_text(json.dumps({"generation": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
