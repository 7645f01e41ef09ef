"""What steering costs: steered over unsteered generation, interleaved in one run.

    python benchmarks/steering_overhead.py [--json FILE] [--repeats 15] [--rows 16] [--tokens 32] [--threads 1]
    python benchmarks/steering_overhead.py --accelerator    # Llama-3-8B shape on a CUDA device; elsewhere: not run

On the embedded model, the same prompts, tokens and weights for all:
    sparse    clampdown's path: one feature clamped, error term kept, receipts on
    full      the plain hook that encodes all features, edits one, decodes and adds the error back
    saelens   SAELens's bridge with its SAE spliced in (error term kept) and a hook that sets the feature; its generate
    bridge    the same bridge without an SAE: how much of `saelens` is the bridge's own loop
Every run generates equally many tokens; each figure is the median over repeats of a run's time over that of the
unsteered run just before it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from clampdown.config import embedded_model, embedded_sae
from clampdown.discovery.causal import clamp_plan
from clampdown.models.generation import generate
from clampdown.models.layout import find_layout
from clampdown.models.loading import LanguageModel, load_model
from clampdown.saes.checkpoints import load_sae, open_sae
from clampdown.saes.sae import Sae, SaeConfig
from clampdown.steering.hooks import steer
from clampdown.types import Site

FEATURE, STRENGTH = 5, 3.0
Run = Callable[[], object]


@contextmanager
def plain_hook(lm: LanguageModel, sae: Sae) -> Iterator[None]:
    """Encode everything, set one feature, decode, add the error back: what most tools do."""

    def hook(_module: object, _args: object, x: Tensor) -> Tensor:
        wide = x.to(sae.dtype)
        code = sae.encode(wide)
        error = wide - sae.decode(code, wide)
        code[..., FEATURE] = STRENGTH
        return (sae.decode(code, wide) + error).to(x.dtype)

    handle = lm.layout.blocks[sae.site.layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def seconds(run: Run) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def ratios(base: Run, runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Per repeat, each run's time over that of the base run beside it."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in (base, *runs.values()):
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            beside = seconds(base)
            found[name].append(seconds(run) / beside)
    return found


def median(values: list[float]) -> float:
    return round(statistics.median(values), 4)


def never_ending(lm: LanguageModel) -> LanguageModel:
    """The same model without an end token, so that every run generates equally many tokens."""
    copy = replace(lm)
    copy.__dict__["eos_ids"] = frozenset()
    return copy


def saelens_runs(prompts: list[list[int]], tokens: int) -> dict[str, Run]:
    """SAELens's bridge with and without its SAE on the embedded weights; nothing where it is not installed."""
    try:
        import sae_lens
        from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
    except ImportError:
        return {}
    model, where = embedded_model("organism"), embedded_sae("organism")
    assert model is not None and where is not None, "the embedded model is a directory"
    with tempfile.TemporaryDirectory() as copy:  # the bridge may write beside the model
        shutil.copytree(model, copy, dirs_exist_ok=True)
        bridge: Any = SAETransformerBridge.boot_transformers(copy, device="cpu")
    sae = sae_lens.SAE.load_from_disk(where)
    batch = torch.tensor(prompts)

    def clamp(code: Tensor, hook: object) -> Tensor:
        code[..., FEATURE] = STRENGTH
        return code

    def plain() -> None:
        bridge.generate(
            batch, max_new_tokens=tokens, stop_at_eos=False, do_sample=False, verbose=False, return_type="tokens"
        )

    def clamped() -> None:
        bridge.add_sae(sae, use_error_term=True)
        try:
            with bridge.hooks(fwd_hooks=[(bridge.get_sae_hook_name(sae), clamp)]):
                plain()
        finally:
            bridge.reset_saes()

    return {"saelens": clamped, "bridge": plain}


def bytes_per_feature() -> int:
    """What one served feature holds in memory: it is read from the file, the SAE is not loaded."""
    opened = open_sae("organism")
    opened.select([FEATURE])
    return opened.bytes_held


def embedded(rows: int, tokens: int, repeats: int) -> dict[str, float | int | None]:
    """All ways on the embedded model."""
    lm, sae = never_ending(load_model("organism")), load_sae("organism")
    prompts = torch.randint(300, 1400, (rows, 40), generator=torch.Generator().manual_seed(0)).tolist()
    plan = clamp_plan(lm, sae, FEATURE, STRENGTH)
    opened = open_sae("organism")

    def within(block: Callable[[], AbstractContextManager[object]]) -> Run:
        def run() -> None:
            with block():
                generate(lm, prompts, max_new_tokens=tokens)

        return run

    runs = {"sparse": within(lambda: steer(lm, plan, opened)), "full": within(lambda: plain_hook(lm, sae))}
    found = ratios(within(nullcontext), runs | saelens_runs(prompts, tokens), repeats)
    own = [s / b for s, b in zip(found.get("saelens", []), found.get("bridge", []), strict=True)]
    return {
        "sparse_over_unsteered": median(found["sparse"]),
        "full_over_unsteered": median(found["full"]),
        "saelens_over_unsteered": median(found["saelens"]) if own else None,
        "saelens_over_its_own_unsteered": median(own) if own else None,
        "bytes_per_feature": bytes_per_feature(),
    }


@dataclass(frozen=True)
class Shape:
    """A random model and SAE of this size."""

    d_model: int
    d_mlp: int
    blocks: int
    heads: int
    kv_heads: int
    vocab: int
    d_sae: int
    dtype: torch.dtype


LLAMA_3_8B = Shape(4096, 14336, 32, 32, 8, 128_256, 65_536, torch.bfloat16)
TINY = Shape(64, 96, 4, 4, 2, 256, 512, torch.bfloat16)  # the dtype too: what does not fit together shows here


def random_pair(shape: Shape, device: str) -> tuple[LanguageModel, Sae]:
    """Speed does not depend on what the weights are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_mlp,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        pad_token_id=0,
        eos_token_id=None,
    )
    with torch.device(device):
        torch.set_default_dtype(shape.dtype)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        site = Site(shape.blocks * 3 // 4)
        rows = torch.nn.functional.normalize(torch.randn(shape.d_sae, shape.d_model), dim=-1).to(shape.dtype)
        vectors = {name: torch.zeros(shape.d_sae, dtype=shape.dtype) for name in ("b_enc", "threshold")}
        tensors = {
            "W_enc": rows.T.contiguous(),
            "W_dec": rows,
            "b_dec": torch.zeros(shape.d_model, dtype=shape.dtype),
            **vectors,
        }
    sae = Sae(SaeConfig("jumprelu", shape.d_model, shape.d_sae, site), tensors, "random", "r0")
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=None)
    return LanguageModel(model, tokenizer, find_layout(model), "random", "r0"), sae  # type: ignore[arg-type]


def big(shape: Shape, device: str, rows: int, tokens: int, repeats: int) -> dict[str, float]:
    """Steered over unsteered with HF `generate`: eager, then with a static cache, which CUDA compiles to graphs."""
    from clampdown.models.chat import pad_left
    from clampdown.steering.prepared import Capacity, prepare

    lm, sae = random_pair(shape, device)
    plan = clamp_plan(lm, sae, FEATURE, STRENGTH)
    ids = torch.randint(3, shape.vocab, (rows, 128), generator=torch.Generator().manual_seed(0)).tolist()
    batch = pad_left(ids, 0, lm.device)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, **inputs}

    def eager() -> None:
        lm.model.generate(**options)

    def static() -> None:
        lm.model.generate(**options, cache_implementation="static")

    def within(block: Callable[[], AbstractContextManager[object]], run: Run) -> Run:
        def steered() -> None:
            with block():
                run()

        return steered

    eager_runs = {
        "eager_sparse": within(lambda: steer(lm, plan, sae), eager),
        "eager_full": within(lambda: plain_hook(lm, sae), eager),
    }
    found = ratios(eager, eager_runs, repeats)
    unhooked = [seconds(static) for _ in range(3 + repeats)][3:]  # before any hook is there to be traced
    prepared = prepare(lm, sae, capacity=Capacity(rows=rows, features=2, directions=1, gate_features=0))
    torch.compiler.reset()
    steered = within(lambda: prepared.steer(plan, batch), static)
    hooked = [seconds(steered) for _ in range(3 + repeats)][3:]
    medians = {f"{name}_over_unsteered": median(values) for name, values in found.items()}
    return {
        **medians,
        "static_sparse_over_unsteered": round(statistics.median(hooked) / statistics.median(unhooked), 4),
    }


def accelerator(rows: int, tokens: int, repeats: int) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"accelerator": "not run: no CUDA device"}
    measured = big(LLAMA_3_8B, "cuda", rows, tokens, repeats)
    return {"accelerator": torch.cuda.get_device_name(), **{f"accelerator_{k}": v for k, v in measured.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--accelerator", action="store_true", help="measure the Llama-3-8B shape on a CUDA device")
    parser.add_argument(
        "--rehearse", action="store_true", help="the accelerator's code on a tiny shape, on this machine"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # SAELens's and its dependencies' own
    size = {"rows": args.rows, "tokens": args.tokens, "repeats": args.repeats}
    with torch.no_grad():
        if args.rehearse:
            result: dict[str, Any] = big(TINY, "cpu", **size)
        elif args.accelerator:
            result = accelerator(**size)
        else:
            result = embedded(**size) | accelerator(**size)
    result |= size
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
