"""What a plan costs inside vLLM: tokens per second, steered over plain, in one run.

    .venv-vllm/bin/python benchmarks/vllm_serving.py --model DIR [--json FILE] [--rounds 5] [--eager]

It needs the environment of `make vllm-environment`; elsewhere it says so and measures nothing. The SAE is random
(16,384 features in the middle of the model): arithmetic costs the same whatever it means. Prompts have about 200
tokens that nobody has seen. Arms take turns; a ratio is that of medians.

- `clamp`: eight features at every token.      - `everywhere`: the same and a direction at another block.
- `open`, `shut`: the clamp behind a probe of 30 features that always, or never, opens.

On a CPU seconds are those of the process (engine and worker run in it), so that neighbours do not count; on an
accelerator they are those of the clock.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

PROMPT, FEATURES = 200, 16_384
ARMS = (None, "clamp", "everywhere", "open", "shut")


class Size(NamedTuple):
    """Requests at once, and tokens of a reply."""

    requests: int
    reply: int


def environment() -> None:
    """Before vLLM is imported: one process, quiet."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }.items():
        os.environ.setdefault(name, value)


def write_sae(directory: Path, d_model: int, layer: int, name: str) -> None:
    """A random ReLU SAE, as files."""
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(0)
    decoder = torch.nn.functional.normalize(torch.randn(FEATURES, d_model, generator=draw), dim=-1)
    tensors = {"W_dec": decoder, "W_enc": decoder.T.contiguous(), "b_enc": torch.zeros(FEATURES)}
    save_file({**tensors, "b_dec": torch.zeros(d_model)}, directory / "sae_weights.safetensors")
    config = {"architecture": "standard", "d_in": d_model, "d_sae": FEATURES, "dtype": "float32"}
    more = {"apply_b_dec_to_input": True, "normalize_activations": "none"}
    hook = {"metadata": {"hook_name": f"blocks.{layer}.hook_resid_post", "model_name": name}}
    (directory / "cfg.json").write_text(json.dumps({**config, **more, **hook}))


def write_plans(directory: Path, sae_directory: Path, model: str) -> Any:
    from clampdown.models.loading import load_identity
    from clampdown.saes.checkpoints import open_sae
    from clampdown.steering.plan import Edit, Gate, Plan, write_plan
    from clampdown.types import Site

    lm = load_identity(model)
    write_sae(sae_directory, lm.d_model, lm.n_layers // 2, model)
    sae = open_sae(sae_directory)
    site, low = sae.cfg.site.name, Site(lm.n_layers // 4).name
    clamp = Edit(site=site, operator="clamp", features=tuple(range(0, 800, 100)), strengths=(0.5,) * 8)
    direction = Edit(site=low, operator="add_direction", vector="v", strengths=(0.05,))
    features = tuple(range(1, 1501, 50))

    def gate(threshold: float) -> Gate:
        n = len(features)
        return Gate(site=site, features=features, weights=(0.1,) * n, poolings=("max",) * n, threshold=threshold)

    draw = random.Random(0)
    vectors = {"v": tuple(draw.gauss(0, 1) for _ in range(lm.d_model))}
    plans = (
        Plan.of(lm, [sae], [clamp], "clamp"),
        Plan.of(lm, [sae], [clamp, direction], "everywhere", vectors=vectors),
        Plan.of(lm, [sae], [clamp], "open", gate=gate(-1e9)),
        Plan.of(lm, [sae], [clamp], "shut", gate=gate(1e9)),
    )
    for plan in plans:
        write_plan(directory / f"{plan.name}.toml", plan)
    return lm


def prompts(lm: Any, draw: random.Random, n: int) -> list[list[int]]:
    """Lone user turns of random words, which no cache has seen."""
    from clampdown.models.chat import encode
    from clampdown.types import Message

    found = []
    for _ in range(n):
        words: list[str] = []
        while len(ids := encode(lm, [Message("user", " ".join(words) or "a")])) < PROMPT:
            words += ["".join(draw.choices("abcdefghijklmnop", k=4)) for _ in range(max(1, (PROMPT - len(ids)) // 3))]
        found.append(ids[:PROMPT] if not getattr(lm.tokenizer, "chat_template", None) else ids)
    return found


def one(llm: Any, lm: Any, plan: str | None, draw: random.Random, clock: Any, size: Size) -> float:
    """Tokens per second of one batch under one plan."""
    from vllm import SamplingParams

    extra = {"clampdown": plan} if plan else None
    params = SamplingParams(temperature=0, max_tokens=size.reply, ignore_eos=True, extra_args=extra)
    asked = [{"prompt_token_ids": ids} for ids in prompts(lm, draw, size.requests)]
    began = clock()
    outs = llm.generate(asked, params, use_tqdm=False)
    seconds = clock() - began
    for out in outs:
        assert plan is None or (out.steering["tokens_touched"] > 0) is (plan != "shut"), (plan, out.steering)
    return sum(len(out.outputs[0].token_ids) for out in outs) / seconds


def measure(model: str, rounds: int, eager: bool, size: Size) -> dict[str, Any]:
    import torch
    from vllm import LLM

    with tempfile.TemporaryDirectory() as name:
        plans, sae = Path(name, "plans"), Path(name, "sae")
        plans.mkdir()
        sae.mkdir()
        lm = write_plans(plans, sae, model)
        on_cpu = not torch.cuda.is_available()
        llm = LLM(
            model=model,
            dtype="float32" if on_cpu else "auto",
            max_model_len=1024,
            max_num_seqs=size.requests,
            enforce_eager=eager,
            additional_config={"clampdown": {"plans": str(plans)}},
        )
        clock, draw = time.process_time if on_cpu else time.perf_counter, random.Random(1)
        speed: dict[str | None, list[float]] = {arm: [] for arm in ARMS}
        for arm in ARMS:
            one(llm, lm, arm, draw, clock, size)
        for _ in range(rounds):
            for arm in ARMS:
                speed[arm].append(one(llm, lm, arm, draw, clock, size))
        del llm
        gc.collect()
    middle = {arm: statistics.median(values) for arm, values in speed.items()}
    ratios = {arm: [a / b for a, b in zip(speed[arm], speed[None], strict=True)] for arm in ARMS if arm}
    return {
        "model": Path(model).name,
        "eager": eager,
        **size._asdict(),
        "device": "cpu" if on_cpu else torch.cuda.get_device_name(),
        "tokens_per_second": {str(arm): round(value, 2) for arm, value in middle.items()},
        "rounds": rounds,
        "steered_over_plain": {arm: round(middle[arm] / middle[None], 3) for arm in ARMS if arm},
        "least_and_most_of_a_round": {arm: [round(min(r), 3), round(max(r), 3)] for arm, r in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--reply", type=int, default=96)
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()
    environment()
    try:
        import vllm  # noqa: F401

        import clampdown_vllm  # noqa: F401
    except ImportError as error:
        sys.stdout.write(f"nothing measured: {error}; see `make vllm-environment`\n")
        return
    if not options.model:
        sys.stdout.write("nothing measured: give --model DIR\n")
        return
    found = measure(options.model, options.rounds, options.eager, Size(options.requests, options.reply))
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
