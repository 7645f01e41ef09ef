"""What steering costs a server, and our server against `transformers serve`: 16 clients, one run, one machine.

1. Both servers are started as their users start them, with one thread, on the same weights: `clampdown serve` with
   eight plans, and `transformers serve --continuous-batching`.
2. In every round 16 clients ask the same prompts, one after the other, of each arm: ours without plans, ours with all
   eight plans mixed, theirs. Arms take turns in an order that rotates, prompts are new in every round.
3. The plans do all that strong ones do (several features, operators and scopes) with strengths so small that replies
   stay those of the unsteered model. So every arm writes the same text, which is checked, and a ratio of replies per
   second is a ratio of throughputs.

Time is the server's CPU time (all its threads), which other work on the machine does not stretch as it does wall time;
replies per second of wall time are in the file as well. Medians over rounds.

    python benchmarks/serving.py [--rounds 6] [--per-client 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from _servers import clampdown_serve, cpu_seconds, free_port, running

from clampdown.config import embedded_model
from clampdown.models.loading import load_model
from clampdown.organism.suites import suites
from clampdown.saes.checkpoints import open_sae
from clampdown.steering.plan import Edit, ModelRef, Plan, SaeRef, write_plan
from clampdown.types import Split

CLIENTS = 16
MAX_TOKENS = 48
TINY = 1e-3  # of activations that reach tens


@dataclass(frozen=True, slots=True)
class Server:
    """A running server, and the models that clients ask it for, in turn."""

    pid: int
    url: str
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """What one arm did in one round."""

    replies: tuple[str, ...]
    cpu: float
    wall: float


def write_plans(folder: Path) -> list[str]:
    """Eight plans of different features, operators and scopes, too weak to change a reply."""
    lm, sae = load_model("organism"), open_sae("organism")
    site = sae.cfg.site.name
    others = (("floor", "generated"), ("scale", "all"), ("add", "generated"), ("floor", "prompt"))
    names = []
    for i in range(8):
        operator, scope = others[i % 4]
        weak = 1.0 + TINY if operator == "scale" else TINY
        edits = (
            Edit(site=site, operator="add", features=(11 * i, 11 * i + 4), strengths=(TINY, -TINY), scope="all"),
            Edit(site=site, operator=operator, features=(11 * i + 1,), strengths=(weak,), scope=scope),
        )
        ref = SaeRef(site=site, name=sae.name, revision=sae.revision)
        model = ModelRef(name=lm.name, revision=lm.revision)
        names.append(f"weak-{i}")
        write_plan(folder / f"weak-{i}.toml", Plan(name=names[-1], model=model, saes=(ref,), edits=edits))
    return names


async def ask_all(server: Server, prompts: Sequence[str]) -> list[str]:
    """16 clients share the prompts, each with one request at a time."""
    replies = [""] * len(prompts)

    async def client(number: int, http: httpx.AsyncClient) -> None:
        for i in range(number, len(prompts), CLIENTS):
            body = {
                "model": server.models[i % len(server.models)],
                "messages": [{"role": "user", "content": prompts[i]}],
                "max_tokens": MAX_TOKENS,
                "temperature": 0,
            }
            answer = await http.post(f"{server.url}/v1/chat/completions", json=body)
            answer.raise_for_status()
            replies[i] = answer.json()["choices"][0]["message"]["content"]

    async with httpx.AsyncClient(timeout=300, trust_env=False) as http:
        await asyncio.gather(*(client(number, http) for number in range(CLIENTS)))
    return replies


def timed(server: Server, prompts: Sequence[str]) -> Round:
    cpu, wall = cpu_seconds(server.pid), time.perf_counter()
    replies = asyncio.run(ask_all(server, prompts))
    return Round(tuple(replies), cpu_seconds(server.pid) - cpu, time.perf_counter() - wall)


def measure(arms: dict[str, Server], rounds: int, per_client: int) -> dict[str, list[Round]]:
    asked = [p.messages[0].content for s in suites(Split.TEST) for p in s.prompts if len(p.messages) == 1]
    step = CLIENTS * per_client
    found: dict[str, list[Round]] = {name: [] for name in arms}
    for number in range(-1, rounds):  # the first warms up and does not count
        prompts = [asked[(i * 7) % len(asked)] for i in range((number + 1) * step, (number + 2) * step)]
        order = list(arms)[number % len(arms) :] + list(arms)[: number % len(arms)]
        for name in order:
            done = timed(arms[name], prompts)
            if number >= 0:
                found[name].append(done)
    return found


def ratio(found: dict[str, list[Round]], over: str, under: str) -> float:
    """Median over rounds of how many times as fast `over` is, in CPU time."""
    return statistics.median(b.cpu / a.cpu for a, b in zip(found[over], found[under], strict=True))


def same_replies(found: dict[str, list[Round]], a: str, b: str) -> float:
    pairs = [pair for x, y in zip(found[a], found[b], strict=True) for pair in zip(x.replies, y.replies, strict=True)]
    return sum(x.strip() == y.strip() for x, y in pairs) / len(pairs)


def report(found: dict[str, list[Round]]) -> dict[str, Any]:
    rates = {
        name: {
            "replies_per_cpu_s": statistics.median(len(r.replies) / r.cpu for r in rounds),
            "replies_per_s": statistics.median(len(r.replies) / r.wall for r in rounds),
            "same_replies": same_replies(found, name, "unsteered"),
            "cpu_s_by_round": [round_.cpu for round_ in rounds],
        }
        for name, rounds in found.items()
    }
    for name, row in rates.items():
        cpu, wall, same = row["replies_per_cpu_s"], row["replies_per_s"], row["same_replies"]
        print(f"{name:18s} {cpu:6.1f} replies per CPU second, {wall:6.1f} per second, {same:.0%} as unsteered")
    theirs = ratio(found, "unsteered", "transformers serve") if "transformers serve" in found else None
    return {
        "steered_over_unsteered": ratio(found, "steered", "unsteered"),
        "ours_over_transformers_serve": theirs,
        "arms": rates,
    }


def their_command(port: int, weights: Path) -> list[str]:
    """Without these limits its cache takes most of the machine's memory."""
    program = str(Path(sys.executable).with_name("transformers"))
    sizes = ["--cb-num-blocks", "256", "--cb-block-size", "32", "--cb-max-batch-tokens", "512"]
    return [program, "serve", str(weights), "--continuous-batching", *sizes, "--port", str(port)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="best a multiple of three: every arm is first as often")
    parser.add_argument("--per-client", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    weights, ports = embedded_model("organism"), (free_port(), free_port())
    assert weights is not None, "it comes with the package"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "plans").mkdir()
        plans = write_plans(folder / "plans")
        with running(clampdown_serve(ports[0], folder / "plans"), ports[0], folder / "ours.log") as pid:
            url = f"http://127.0.0.1:{ports[0]}"
            arms = {
                "unsteered": Server(pid, url, ("organism",)),
                "steered": Server(pid, url, tuple(f"organism:{plan}" for plan in plans)),
            }
            try:
                with running(their_command(ports[1], weights), ports[1], folder / "theirs.log") as other:
                    theirs = Server(other, f"http://127.0.0.1:{ports[1]}", (str(weights),))
                    arms["transformers serve"] = theirs
                    results = report(measure(arms, options.rounds, options.per_client))
            except (RuntimeError, FileNotFoundError) as error:
                print(f"without transformers serve, which needs transformers[serving]: {error}")
                results = report(measure(arms, options.rounds, options.per_client))
    for key in ("steered_over_unsteered", "ours_over_transformers_serve"):
        print(f"{key}: {results[key]}" if results[key] is None else f"{key}: {results[key]:.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
