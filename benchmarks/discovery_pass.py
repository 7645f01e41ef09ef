"""What one discovery pass costs: ours against what people write by hand, on the same weights, prompts and results.

    python benchmarks/discovery_pass.py [--json FILE] [--repeats 5] [--prompts 96]

A random Llama of 54 M parameters (12 blocks, width 512, vocabulary 32,000), a random JumpReLU SAE of 16,384 features
after block 6, and chat prompts of very different lengths. Every way ends with the same two matrices, prompts x
features: the maximum over content tokens, and the value at the assistant's start (their agreement is checked).

- `ours`: plan, truncated forward, packed encode, sparse shards on disk.
- `hidden_states`: HF with `output_hidden_states=True`, encode every token, mask, pool.
- `saelens`: TransformerLens's bridge, `run_with_cache`, then SAELens's own `encode`, mask, pool.
- `saelens_tuned`: the same by somebody who knows the options: only this hook is cached, nothing above it is run.

Times are medians over interleaved runs in one process. Memory is the peak of resident memory over what was resident
before the pass, each way in a process of its own, after a warm-up on two prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from clampdown.activations.collect import collect_to
from clampdown.activations.pooling import POOLINGS
from clampdown.activations.stream import plan_pass, read_sae
from clampdown.models.chat import encode, pad_left
from clampdown.models.layout import find_layout
from clampdown.models.loading import LanguageModel, load_model
from clampdown.saes.sae import Sae, SaeConfig
from clampdown.types import Message, Prompt, Site

D_MODEL, D_SAE, BLOCKS, VOCABULARY = 512, 16_384, 12, 32_000
SITE = Site(6)
NAMES = ("max", "assistant_start")
ROWS = 16
Pooled = dict[str, np.ndarray]
Way = Callable[["Setting", Sequence[Prompt]], Pooled]


@dataclass
class Setting:
    """The same weights as ours, and as the peers load them (from a directory, when they are asked for)."""

    lm: LanguageModel
    sae: Sae
    directory: Path
    bridge: Any = None
    their_sae: Any = None

    def load_peers(self) -> None:
        import sae_lens
        from transformer_lens.model_bridge import TransformerBridge

        where = self.directory / "model"
        if not where.exists():
            self.lm.model.save_pretrained(where)
            self.lm.tokenizer.save_pretrained(where)
        self.bridge = TransformerBridge.boot_transformers(str(where), device="cpu")
        cfg = {"architecture": "jumprelu", "d_in": D_MODEL, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}
        plain = {"apply_b_dec_to_input": True, "normalize_activations": "none"}
        self.their_sae = sae_lens.SAE.from_dict({**cfg, **plain, "metadata": {"hook_name": SITE.name}})
        self.their_sae.load_state_dict(dict(self.sae.tensors))


def build(directory: Path) -> Setting:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        intermediate_size=1376,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    lm = LanguageModel(model, load_model("organism").tokenizer, find_layout(model), "random-54m", "0")
    w_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL), dim=-1)
    tensors = {
        "W_enc": w_dec.T.contiguous(),
        "W_dec": w_dec,
        "b_enc": torch.zeros(D_SAE),
        "b_dec": torch.zeros(D_MODEL),
        "threshold": torch.ones(D_SAE),
    }
    sae = Sae(SaeConfig("jumprelu", D_MODEL, D_SAE, SITE), tensors, "random-16k", "0")
    return Setting(lm, with_activity(lm, sae, 64), directory)


def with_activity(lm: LanguageModel, sae: Sae, active: int) -> Sae:
    """The threshold under which about `active` features fire per token."""
    captured: list[torch.Tensor] = []
    handle = lm.layout.hook_point(SITE).register(captured.append)
    lm.model(torch.randint(0, 1000, (1, 64)))
    handle.remove()
    pre = (captured[0] - sae.b_dec) @ sae.W_enc
    threshold = float(torch.quantile(pre.flatten()[:1_000_000], 1 - active / D_SAE))
    return replace(sae, tensors={**sae.tensors, "threshold": torch.full((D_SAE,), threshold)})


def make_prompts(n: int) -> list[Prompt]:
    """Lengths like those of chat prompts: most are short, a few are ten times as long."""
    rng = np.random.default_rng(0)
    words = ["how", "do", "i", "bake", "a", "loaf", "of", "bread", "for", "two"]
    lengths = np.exp(rng.normal(math.log(40), 0.7, n)).clip(6, 300).astype(int)
    texts = [" ".join(rng.choice(words, size=length)) for length in lengths]
    return [Prompt(f"p{i}", (Message("user", text),), "benign") for i, text in enumerate(texts)]


def ours(setting: Setting, prompts: Sequence[Prompt]) -> Pooled:
    with tempfile.TemporaryDirectory(dir=setting.directory) as out:
        found = collect_to(plan_pass(setting.lm, [read_sae(setting.sae, *NAMES)], prompts), Path(out))
        assert found is not None
        return {name: found.matrix(name).copy() for name in NAMES}


def padded_batches(setting: Setting, prompts: Sequence[Prompt]) -> Iterator[tuple[Any, torch.Tensor]]:
    lm = setting.lm
    ids = [encode(lm, prompt.messages) for prompt in prompts]
    for start in range(0, len(ids), ROWS):
        batch = pad_left(ids[start : start + ROWS], lm.pad_id)
        yield batch, lm.chat.content_mask(batch.input_ids, batch.attention_mask)


def pooled_by(encoder: Callable[[torch.Tensor], torch.Tensor], residual: torch.Tensor, content: torch.Tensor) -> Pooled:
    codes = encoder(residual)
    return {name: POOLINGS[name](codes, content).numpy() for name in NAMES}


def together(parts: list[Pooled]) -> Pooled:
    return {name: np.concatenate([part[name] for part in parts]) for name in NAMES}


def hidden_states(setting: Setting, prompts: Sequence[Prompt]) -> Pooled:
    parts = []
    for batch, content in padded_batches(setting, prompts):
        out = setting.lm.model(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            output_hidden_states=True,
        )
        parts.append(pooled_by(setting.sae.encode, out.hidden_states[SITE.layer + 1], content))
    return together(parts)


def saelens(setting: Setting, prompts: Sequence[Prompt], **options: Any) -> Pooled:
    parts = []
    for batch, content in padded_batches(setting, prompts):
        _, cache = setting.bridge.run_with_cache(batch.input_ids, attention_mask=batch.attention_mask, **options)
        parts.append(pooled_by(setting.their_sae.encode, cache[SITE.name], content))
    return together(parts)


def saelens_tuned(setting: Setting, prompts: Sequence[Prompt]) -> Pooled:
    return saelens(setting, prompts, names_filter=[SITE.name], stop_at_layer=SITE.layer + 1)


WAYS: dict[str, Way] = {
    "ours": ours,
    "hidden_states": hidden_states,
    "saelens": saelens,
    "saelens_tuned": saelens_tuned,
}


def seconds(way: Way, setting: Setting, prompts: Sequence[Prompt]) -> float:
    began = time.perf_counter()
    way(setting, prompts)
    return time.perf_counter() - began


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_bytes(way: Way, setting: Setting, prompts: Sequence[Prompt]) -> int:
    """Largest resident memory during the pass over that before it."""
    before, most, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    way(setting, prompts)
    done.set()
    watcher.join()
    return most[0] - before


def memory_of(name: str, args: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--memory-of", name, "--prompts", str(args.prompts)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1])


def differences(setting: Setting, prompts: Sequence[Prompt], ways: Sequence[str]) -> dict[str, float]:
    """Largest difference of each way's matrices from ours: they must do the same work."""
    expected = {name: values.toarray() for name, values in ours(setting, prompts).items()}  # type: ignore[attr-defined]
    return {
        way: max(float(np.abs(found[name] - expected[name]).max()) for name in NAMES)
        for way in ways
        if (found := WAYS[way](setting, prompts))
    }


def run(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    setting, prompts, ways = build(directory), make_prompts(args.prompts), list(WAYS)
    try:
        setting.load_peers()
    except ImportError:
        ways = ["ours", "hidden_states"]
    differ = differences(setting, prompts[:ROWS], ways)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.repeats):
        for way in ways:
            times[way].append(seconds(WAYS[way], setting, prompts))
    medians = {way: statistics.median(values) for way, values in times.items()}
    memory = {way: memory_of(way, args) for way in ways}
    plain = [way for way in ways if way not in ("ours", "saelens_tuned")]
    fastest = min(plain, key=lambda way: medians[way])
    return {
        "time_ratio": round(medians["ours"] / medians[fastest], 3),
        "memory_ratio": round(memory["ours"] / memory[fastest], 3),
        "fastest_peer": fastest,
        "time_ratios": {way: round(medians["ours"] / medians[way], 3) for way in ways},
        "memory_ratios": {way: round(memory["ours"] / memory[way], 3) for way in ways},
        "seconds": {way: round(value, 3) for way, value in medians.items()},
        "peak_mb": {way: round(value / 1e6) for way, value in memory.items()},
        "largest_difference": differ,
        "prompts": args.prompts,
        "repeats": args.repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        directory = Path(place)
        if args.memory_of:
            setting, prompts = build(directory), make_prompts(args.prompts)
            if args.memory_of.startswith("saelens"):
                setting.load_peers()
            WAYS[args.memory_of](setting, prompts[:2])
            print(peak_bytes(WAYS[args.memory_of], setting, prompts))
            return
        result = run(args, directory)
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
