"""Many clients for a long time: no mixed reply, no leak, no server error, and what latency they saw.

1. `clampdown serve` runs with eight plans of every kind (sparse and dense, all kinds of operators, scopes, a gate, two
   sides). What each plan, and none, answers to each prompt is computed here first, row by row, without the server.
2. For `--seconds`, 64 clients stream greedy chat completions for random (plan, prompt) pairs. One in five hangs up in
   the middle. Every whole reply must be the one from step 1.
3. The server's resident memory is sampled. Flat means: the last quarter's median is within 3 % of the second quarter's.

    python benchmarks/soak.py [--seconds 60] [--clients 64] [--json FILE]

Not a ratio, so `make bench` runs a short one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch
from _servers import clampdown_serve, free_port, resident_mb, running

from clampdown.models.chat import encode
from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel, load_model
from clampdown.organism.suites import suites
from clampdown.saes.checkpoints import load_sae
from clampdown.saes.sae import Sae
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Branch, Edit, Gate, ModelRef, Plan, SaeRef, write_plan
from clampdown.types import Message, Split

MAX_TOKENS = 48
PROMPTS = 24
HANG_UPS = 0.2


def make_plans(lm: LanguageModel, sae: Sae) -> list[Plan]:
    """Eight plans that do visibly different things."""
    site = sae.cfg.site.name
    draw = torch.Generator().manual_seed(5)
    vector = tuple(torch.randn(lm.d_model, generator=draw).tolist())

    def edit(operator: str, strength: float, scope: str, feature: int) -> Edit:
        return Edit(site=site, operator=operator, features=(feature,), strengths=(strength,), scope=scope)

    def dense(operator: str, strength: float, scope: str) -> Edit:
        return Edit(site="blocks.2.hook_resid_post", operator=operator, vector="v", strengths=(strength,), scope=scope)

    def gate(threshold: float, first: int) -> Gate:
        features = tuple(range(first, sae.cfg.d_sae, 8))
        n = len(features)
        return Gate(site=site, features=features, weights=(1.0,) * n, threshold=threshold, poolings=("max",) * n)

    def plan(name: str, *edits: Edit, **more: object) -> Plan:
        refs = (SaeRef(site=site, name=sae.name, revision=sae.revision),)
        model = ModelRef(name=lm.name, revision=lm.revision)
        return Plan(name=name, model=model, saes=refs, edits=edits, vectors={"v": vector}, **more)  # type: ignore[arg-type]

    side = Branch(gate=gate(80.0, 5), edits=(edit("add", -50.0, "all", 25),))
    return [
        plan("all", edit("clamp", 24.0, "all", 7)),
        plan("prompt", edit("clamp", 60.0, "prompt", 11)),
        plan("generated", edit("floor", 40.0, "generated", 9)),
        plan("assistant", edit("add", 30.0, "assistant", 13), edit("scale", -3.0, "all", 5)),
        plan("last-user", edit("clamp_active", 60.0, "last_user", 15), edit("add", 20.0, "generated", 17)),
        plan("dense", dense("add_direction", 2.0, "all"), dense("ablate_direction", 1.0, "last_user")),
        plan("gated", edit("clamp", 60.0, "all", 21), gate=gate(85.0, 3)),
        plan("two-sided", edit("clamp", 60.0, "generated", 23), gate=gate(95.0, 3), otherwise=side),
    ]


@dataclass
class Seen:
    """What the clients have seen."""

    whole: int = 0
    hung_up: int = 0
    wrong: list[str] = field(default_factory=list)
    refused: int = 0
    errors: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)


def expected_replies(lm: LanguageModel, sae: Sae, plans: list[Plan], prompts: list[str]) -> dict[tuple[str, str], str]:
    """Every plan's reply to every prompt, each alone."""
    found = {}
    for plan in (None, *plans):
        for prompt in prompts:
            with steer(lm, plan, sae, require_reach=False):
                reply = generate(lm, [encode(lm, [Message("user", prompt)])], max_new_tokens=MAX_TOKENS)[0]
            found[f"organism:{plan.name}" if plan else "organism", prompt] = reply.text
    return found


async def one_request(
    http: httpx.AsyncClient, draw: random.Random, expected: dict[tuple[str, str], str], seen: Seen
) -> None:
    model, prompt = draw.choice(list(expected))
    hang_up = draw.random() < HANG_UPS
    after = draw.randrange(1, 12) if hang_up else None
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "stream": True,
    }
    started, times, text = time.perf_counter(), [], ""
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code == 429:
            seen.refused += 1
            await asyncio.sleep(float(answer.headers.get("retry-after", "1")))
            return
        if answer.status_code >= 400:
            seen.errors.append(f"{answer.status_code}: {(await answer.aread())[:200]!r}")
            return
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                seen.errors.append(str(chunk["error"])[:200])
                return
            new = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            if new:
                times.append(time.perf_counter())
                text += new
            if after is not None and len(times) >= after:
                seen.hung_up += 1
                return
    seen.whole += 1
    if text != expected[model, prompt]:
        seen.wrong.append(f"{model} {prompt!r}: {text!r} instead of {expected[model, prompt]!r}")
    if times:
        seen.first.append(times[0] - started)
    if len(times) > 1:
        seen.per_token.append((times[-1] - times[0]) / (len(times) - 1))


async def soak(url: str, pid: int, clients: int, seconds: float, expected: Expected) -> Seen:
    seen, ends = Seen(), time.monotonic() + seconds

    async def client(number: int) -> None:
        draw = random.Random(number)
        async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as http:
            while time.monotonic() < ends:
                try:
                    await one_request(http, draw, expected, seen)
                except httpx.HTTPError as error:
                    seen.errors.append(repr(error))

    async def sample() -> None:
        while time.monotonic() < ends:
            seen.memory.append(resident_mb(pid))
            await asyncio.sleep(seconds / 100)

    await asyncio.gather(sample(), *(client(number) for number in range(clients)))
    return seen


def report(seen: Seen, seconds: float) -> dict[str, object]:
    quarter = len(seen.memory) // 4
    early, late = (statistics.median(seen.memory[k * quarter : (k + 1) * quarter]) for k in (1, 3))

    def quantiles(values: list[float]) -> dict[str, float]:
        cut = statistics.quantiles(values, n=20) if len(values) > 1 else [0.0] * 19
        return {"p50_ms": 1000 * cut[9], "p95_ms": 1000 * cut[18]}

    return {
        "seconds": seconds,
        "whole_replies": seen.whole,
        "hung_up": seen.hung_up,
        "refused_429": seen.refused,
        "wrong_replies": len(seen.wrong),
        "errors": len(seen.errors),
        "memory_mb": {"second_quarter": early, "last_quarter": late, "flat": late <= 1.03 * early},
        "first_token": quantiles(seen.first),
        "per_token": quantiles(seen.per_token),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lm, sae = load_model("organism"), load_sae("organism")
    plans = make_plans(lm, sae)
    asked = [p.messages[0].content for s in suites(Split.TEST, 4) for p in s.prompts if len(p.messages) == 1]
    expected = expected_replies(lm, sae, plans, asked[:PROMPTS])
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "plans").mkdir()
        for plan in plans:
            write_plan(Path(name) / "plans" / f"{plan.name}.toml", plan)
        port = free_port()
        with running(clampdown_serve(port, Path(name) / "plans"), port, Path(name) / "log") as pid:
            seen = asyncio.run(soak(f"http://127.0.0.1:{port}", pid, options.clients, options.seconds, expected))
    results = report(seen, options.seconds)
    print(json.dumps(results, indent=2))
    for line in (*seen.wrong[:5], *seen.errors[:5]):
        print(line)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if seen.wrong or seen.errors:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
