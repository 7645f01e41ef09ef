"""What steering costs: steered over unsteered generation, interleaved in one run.

    python benchmarks/steering_overhead.py [--json FILE] [--repeats 15] [--rows 16] [--tokens 32]

Sparse: clampdown's path (one feature clamped, error term kept, receipts on). Full: the plain hook that encodes all
features, edits one and decodes. SAELens: its own hooked model on the same weights, when `sae_lens` is installed.
Every run generates the same number of tokens; figures are medians of the ratio of neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from clampdown.discovery.causal import clamp_plan
from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel, load_model
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae
from clampdown.steering.hooks import steer

FEATURE, STRENGTH = 5, 3.0
Block = Callable[[], AbstractContextManager[object]]


@contextmanager
def plain_hook(lm: LanguageModel, sae: Sae) -> Iterator[None]:
    """Encode everything, set one feature, decode, add the error back: what most tools do."""

    def hook(_module: object, _args: object, x: Tensor) -> Tensor:
        code = sae.encode(x)
        error = x - sae.decode(code, x)
        code[..., FEATURE] = STRENGTH
        return sae.decode(code, x) + error

    handle = lm.layout.blocks[sae.site.layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def seconds(lm: LanguageModel, prompts: list[list[int]], tokens: int, block: Block) -> float:
    began = time.perf_counter()
    with block():
        generate(lm, prompts, max_new_tokens=tokens)
    return time.perf_counter() - began


def ratios(
    lm: LanguageModel, prompts: list[list[int]], tokens: int, blocks: dict[str, Block], repeats: int
) -> dict[str, float]:
    """Median over repeats of each block's time over that of the unsteered run beside it."""
    found: dict[str, list[float]] = {name: [] for name in blocks}
    for block in (nullcontext, *blocks.values()):
        seconds(lm, prompts, tokens, block)
    for _ in range(repeats):
        for name, block in blocks.items():
            base = seconds(lm, prompts, tokens, nullcontext)
            found[name].append(seconds(lm, prompts, tokens, block) / base)
    return {name: round(statistics.median(values), 4) for name, values in found.items()}


def never_ending(lm: LanguageModel) -> LanguageModel:
    """The same model without an end token, so that every run generates equally many tokens."""
    copy = replace(lm)
    copy.__dict__["eos_ids"] = frozenset()
    return copy


def bytes_per_feature(sae: Sae) -> int:
    view = sae.select([FEATURE])
    tensors = [view.directions, view.encoder, view.b_dec, *view.vectors.values()]
    return sum(t.numel() * t.element_size() for t in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lm, sae = never_ending(load_model("organism")), load_sae("organism")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(300, 1400, (args.rows, 40), generator=generator).tolist()
    plan = clamp_plan(lm, sae, FEATURE, STRENGTH)
    blocks: dict[str, Block] = {"sparse": lambda: steer(lm, plan, sae), "full": lambda: plain_hook(lm, sae)}
    with torch.no_grad():
        found = ratios(lm, prompts, args.tokens, blocks, args.repeats)
    result = {
        "sparse_over_unsteered": found["sparse"],
        "full_over_unsteered": found["full"],
        "saelens_over_unsteered": None,
        "bytes_per_feature": bytes_per_feature(sae),
        "rows": args.rows,
        "tokens": args.tokens,
        "repeats": args.repeats,
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
