"""Many clients for minutes: no wrong reply, no receipt missing, memory flat. Not a test; it says what it found.

    python soak.py [--minutes 5] [--clients 16]

Clients ask under eight plans and none, in all three ways of naming one; a fifth of them hang up in the middle of a
stream. Memory is what all processes of the server hold, after the first minute and at the end.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.request import Request, urlopen

import setups

setups.environment()

from server import Server, serving  # noqa: E402  (the environment goes first)
from table import Row, read_rows  # noqa: E402
from test_server import by  # noqa: E402

PLANS = (
    None,
    "clamp-352",
    "clamp-352-everywhere",
    "clamp-352-gated",
    "generated",
    "last-user",
    "sites",
    "gate-probe",
    "two-sided-turns",
)


def resident_mb(group: int) -> float:
    """Of all processes of a process group."""
    pids = subprocess.run(["pgrep", "-g", str(group)], capture_output=True, text=True, check=False).stdout.split()
    pages = 0
    for pid in pids:
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
    return pages * 4096 / 2**20


def hang_up(server: Server, row: Row, how: str, draw: random.Random) -> None:
    data = json.dumps({**by(how, row), "stream": True}).encode()
    request = Request(f"{server.url}/v1/chat/completions", data, {"content-type": "application/json"})
    with urlopen(request, timeout=120) as answer:
        for _ in range(draw.randrange(1, 8)):
            answer.readline()


def client(server: Server, rows: list[Row], seed: int, until: float, found: Counter[str]) -> None:
    draw = random.Random(seed)
    while time.monotonic() < until:
        row, how = draw.choice(rows), draw.choice(["model", "field", "xargs"])
        try:
            if draw.random() < 0.2:
                hang_up(server, row, how, draw)
                found["hung up"] += 1
                continue
            status, answer = server.post("/v1/chat/completions", by(how, row))
        except OSError as error:
            found[f"error {type(error).__name__}"] += 1
            continue
        found[f"status {status}"] += 1
        if status == 200:
            found["wrong"] += answer["choices"][0]["message"]["content"] != row["text"]
            found["wrong receipt"] += bool(row["plan"]) and (
                answer["steering"]["tokens_touched"] != row["receipt"]["tokens_touched"]
            )


def soak(server: Server, rows: list[Row], minutes: float, clients: int) -> dict[str, object]:
    found: Counter[str] = Counter()
    until = time.monotonic() + 60 * minutes
    threads = [threading.Thread(target=client, args=(server, rows, i, until, found)) for i in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(min(60, 30 * minutes))
    early = resident_mb(server.pid)
    for thread in threads:
        thread.join()
    return {**found, "MB after a minute": round(early), "MB at the end": round(resident_mb(server.pid))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory, plans = Path(name), Path(name, "plans")
        plans.mkdir()
        here = Path(__file__).parent
        made = [sys.executable, str(here / "reference.py"), str(plans), str(directory / "rows.json")]
        subprocess.run(made, check=True, cwd=here)
        for path in plans.glob("*.toml"):
            if path.stem not in PLANS:
                path.unlink()
        rows = [row for row in read_rows(directory / "rows.json") if row["plan"] in PLANS]
        engine = ("--enforce-eager", "--max-num-batched-tokens", "64", "--max-num-seqs", "16")
        with serving(plans, directory, *engine) as server:
            sys.stdout.write(json.dumps(soak(server, rows, options.minutes, options.clients), indent=2) + "\n")


if __name__ == "__main__":
    main()
