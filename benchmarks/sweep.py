"""Many arms together against one arm at a time through the library's own `generate`: time as a ratio, in one run.

    python benchmarks/sweep.py [--json FILE] [--models organism llama-60m] [--repeats 3] [--growth]

Nine arms (the baseline and eight plans on SAE features at one site) answer prompts of 128 tokens with 32 new ones.

same_batch       all nine arms together over nine runs of `generate` with the same hook, the same prompts per batch (16)
best_batch       the same, against `generate` at the batch size at which it is quickest per prompt
screening        200 candidates by refusal log-odds and benign KL, halved successively to 8, over generating for each
                 of them with the library; `screening_over_ours`: over generating for them in this engine;
                 `screening_unhalved`: all of them on all prompts, over the library
multiple_choice  four options per prompt and nine arms, over one full pass per (arm, prompt, option)
equal            the replies of both ways are the same, token for token

Time is this process's CPU time on one thread (`--device cuda`: wall time, synchronised). Runs are interleaved, figures
are medians of the ratios of neighbouring runs. What an arm costs the library is measured on every arm in turn.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clampdown.discovery.refusal_tokens import RefusalTokens
from clampdown.models.chat import pad_left
from clampdown.models.generation import generate
from clampdown.models.layout import find_layout
from clampdown.models.loading import LanguageModel, load_model
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae, SaeConfig
from clampdown.steering.hooks import steer
from clampdown.steering.options import Continued, continuation_log_likelihoods
from clampdown.steering.plan import Edit, ModelRef, Plan, SaeRef
from clampdown.study.screening import Halving, Prefills, screen
from clampdown.types import Site

PROMPT, NEW, ROWS, CANDIDATES = 128, 32, 16, 200
Replies = list[list[int]]


@dataclass(frozen=True)
class Subject:
    """A model that never ends a reply, its SAE, and prompts of equal length."""

    lm: LanguageModel
    sae: Sae
    prompts: list[list[int]]

    def plans(self, n: int) -> list[Plan | None]:
        """The baseline and n - 1 clamps of different features, half of them on the prompt only."""
        return [None, *(self.clamp(i, 2.0 + i, ("all", "prompt")[i % 2]) for i in range(n - 1))]

    def clamp(self, feature: int, strength: float, scope: str) -> Plan:
        site = self.sae.cfg.site.name
        return Plan(
            name=f"clamp-{feature}",
            model=ModelRef(name=self.lm.name, revision=self.lm.revision),
            saes=(SaeRef(site=site, name=self.sae.name, revision=self.sae.revision),),
            edits=(Edit(site=site, operator="clamp", features=(feature,), strengths=(strength,), scope=scope),),
        )


def embedded(device: str) -> Subject:
    lm = load_model("organism", device=device)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(300, 1400, (256, PROMPT), generator=generator).tolist()
    return Subject(endless(lm), load_sae("organism").to(lm.device), prompts)


def random_llama(device: str, dtype: torch.dtype, **shape: Any) -> Subject:
    """A Llama with random weights and a random SAE above 60 % of its blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**shape, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    model = model.to(dtype).eval().requires_grad_(False)
    width, d_sae = config.hidden_size, 4 * config.hidden_size
    directions = torch.nn.functional.normalize(torch.randn(d_sae, width), dim=-1)
    weights = {"W_enc": directions.T, "W_dec": directions, "b_enc": torch.zeros(d_sae), "b_dec": torch.zeros(width)}
    site = Site(int(0.6 * config.num_hidden_layers) - 1)
    cfg = SaeConfig(architecture="relu", d_in=width, d_sae=d_sae, site=site)
    sae = Sae(cfg, weights, name="random", revision="s0").to(torch.device(device))
    tokenizer: Any = type("Ids", (), {"pad_token_id": 0, "eos_token_id": 2, "decode": lambda _s, ids, **_k: str(ids)})()
    lm = LanguageModel(model, tokenizer, find_layout(model), "random", "r0")
    prompts = torch.randint(3, config.vocab_size, (256, PROMPT)).tolist()
    return Subject(endless(lm), sae, prompts)


LLAMA_60M = {
    "vocab_size": 16_000,
    "hidden_size": 640,
    "intermediate_size": 1_728,
    "num_hidden_layers": 10,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
}
LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4_096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
MODELS: dict[str, Callable[[str], Subject]] = {
    "organism": embedded,
    "llama-60m": lambda device: random_llama(device, torch.float32, **LLAMA_60M),
    "llama-8b": lambda device: random_llama(device, torch.bfloat16, **LLAMA_8B),  # for an accelerator
}


def endless(lm: LanguageModel) -> LanguageModel:
    """The same model without an end token: every reply has all its tokens."""
    copy = replace(lm)
    copy.__dict__["eos_ids"] = frozenset()
    return copy


def ours(subject: Subject, plans: Sequence[Plan | None], prompts: list[list[int]]) -> list[Replies]:
    """Replies per plan, all plans together."""
    rows = [(plan, i) for i in range(len(prompts)) for plan in plans]
    prompt_of = torch.tensor([i for _, i in rows])
    with steer(subject.lm, [plan for plan, _ in rows], subject.sae, prompt_of=prompt_of) as steering:
        found = generate(
            subject.lm,
            prompts,
            max_new_tokens=NEW,
            on_keep=steering.keep_rows,
            widened=lambda: steering.row_map.prompt_of,
        )
        steering.receipts()
    replies = [list(found[row].ids) for row in steering.row_map.row_of.tolist()]
    return [replies[i :: len(plans)] for i in range(len(plans))]


def librarys(subject: Subject, plan: Plan | None, prompts: list[list[int]]) -> Replies:
    """One arm through the library's `generate`, with the same hook."""
    batch = pad_left(prompts, subject.lm.pad_id, subject.lm.device)
    with steer(subject.lm, plan, subject.sae):
        output = subject.lm.model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            do_sample=False,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=subject.lm.pad_id,
        )
    return output[:, PROMPT:].tolist()


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(subject: Subject, run: Callable[[], object]) -> float:
    device = subject.lm.device.type
    start = clock(device)
    run()
    return clock(device) - start


def generation(subject: Subject, repeats: int) -> dict[str, Any]:
    plans = subject.plans(9)
    few, many = subject.prompts[:ROWS], best_batch(subject)
    equal = ours(subject, plans, few) == [librarys(subject, plan, few) for plan in plans]
    same, best = [], []
    for repeat in range(repeats):
        for prompts, ratios in ((few, same), (many, best)):
            together = timed(subject, lambda p=prompts: ours(subject, plans, p))
            # Every arm costs the library the same: one in three is timed, another third at every repeat.
            asked = plans[repeat % 3 :: 3]
            apart = sum(timed(subject, lambda a=plan, p=prompts: librarys(subject, a, p)) for plan in asked)
            ratios.append(together / (apart * len(plans) / len(asked)))
    return {
        "same_batch": round(statistics.median(same), 3),
        "best_batch": round(statistics.median(best), 3),
        "best_batch_rows": len(many),
        "equal": equal,
    }


def best_batch(subject: Subject) -> list[list[int]]:
    """As many prompts as the library answers quickest per prompt."""
    sizes = [ROWS, 2 * ROWS, 4 * ROWS]
    cost = {n: timed(subject, lambda n=n: librarys(subject, None, subject.prompts[:n])) / n for n in sizes}
    return subject.prompts[: min(cost, key=cost.__getitem__)]


def screening(subject: Subject, repeats: int) -> dict[str, float]:
    """Successive halving down to 8 candidates, and all of them on all prompts, over generating for every candidate."""
    plans = [subject.clamp(i // 4, 1.0 + i % 4, ("all", "prompt")[i % 2]) for i in range(CANDIDATES)]
    prompts, sample = subject.prompts[:ROWS], subject.plans(9)[1:]
    benign = subject.prompts[ROWS : 2 * ROWS]
    ratios: dict[str, list[float]] = {"screening": [], "screening_over_ours": [], "screening_unhalved": []}
    for repeat in range(repeats):
        measure = Prefills(subject.lm, subject.sae, prompts, benign, RefusalTokens((5, 6, 7), 1.0, 0.0, 1, 1))
        halved = timed(subject, lambda m=measure: screen(plans, m, ROWS, Halving(keep=8, first=1)))
        every = timed(subject, lambda m=measure: m(plans[:8], ROWS)) * CANDIDATES / 8
        generated = timed(subject, lambda: ours(subject, sample, prompts)) * CANDIDATES / len(sample)
        one = sample[repeat % len(sample)]
        library = timed(subject, lambda p=one: librarys(subject, p, prompts)) * CANDIDATES
        ratios["screening"].append(halved / library)
        ratios["screening_over_ours"].append(halved / generated)
        ratios["screening_unhalved"].append(every / library)
    return {name: round(statistics.median(values), 3) for name, values in ratios.items()}


def multiple_choice(subject: Subject, repeats: int) -> dict[str, float]:
    plans = subject.plans(9)
    # Scopes that generate nothing are the only ones that log-likelihoods can show: prompt and every token.
    prompts, options = subject.prompts[:ROWS], ((11, 12, 13), (14, 15), (16, 17, 18, 19), (20,))
    rows = [Continued(plan, prompt, options) for prompt in prompts for plan in plans]

    def apart(plan: Plan | None) -> list[list[float]]:
        return [option_pass(subject, plan, prompts, option) for option in options]

    found = continuation_log_likelihoods(subject.lm, subject.sae, rows)
    expected = apart(plans[1])
    difference = max(abs(found[i * 9 + 1][o] - expected[o][i]) for i in range(ROWS) for o in range(len(options)))
    ratios = []
    for repeat in range(repeats):
        together = timed(subject, lambda: continuation_log_likelihoods(subject.lm, subject.sae, rows))
        one = plans[1 + repeat % 8]
        ratios.append(together / (len(plans) * timed(subject, lambda p=one: apart(p))))
    return {"multiple_choice": round(statistics.median(ratios), 3), "multiple_choice_difference": round(difference, 6)}


def option_pass(subject: Subject, plan: Plan | None, prompts: list[list[int]], option: tuple[int, ...]) -> list[float]:
    """One full forward over prompt and option for a batch of prompts."""
    ids = torch.tensor([[*prompt, *option] for prompt in prompts], device=subject.lm.device)
    with torch.no_grad(), steer(subject.lm, plan, subject.sae, prompt_width=PROMPT):
        logits = subject.lm.model(input_ids=ids, use_cache=False, logits_to_keep=len(option) + 1).logits
    log_probs: Tensor = logits[:, :-1].float().log_softmax(-1)
    return log_probs[:, range(len(option)), list(option)].sum(-1).tolist()


def growth(subject: Subject) -> list[dict[str, float]]:
    """Seconds for 1, 3, 9 and 27 arms at 1 and 4 times the prompts, ours and the library's."""
    found = []
    for times in (1, 4):
        prompts = subject.prompts[: ROWS * times]
        library = timed(subject, lambda p=prompts: librarys(subject, subject.plans(2)[1], p))
        for arms in (1, 3, 9, 27):
            seconds = timed(subject, lambda a=arms, p=prompts: ours(subject, subject.plans(a), p))
            found.append({"prompts": len(prompts), "arms": arms, "ours": seconds, "library": library * arms})
    return found


def peak_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["organism", "llama-60m"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in options.models:
        subject = MODELS[name](options.device)
        found: dict[str, Any] = {**generation(subject, options.repeats), **multiple_choice(subject, options.repeats)}
        found |= screening(subject, options.repeats)
        found["peak_mib"] = round(peak_mib(options.device))
        if options.growth:
            found["growth"] = growth(subject)
        results[name] = found
        print(name, json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
