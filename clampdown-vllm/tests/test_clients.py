"""Other people's clients against the server, unchanged. Each lives where it can: a client that is not installed is
skipped, and the reason says how to get it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import HERE, Reference
from reference import TOKENS
from server import Server
from table import Row

ROOT = HERE.parent.parent
LONGEST = 1800


@pytest.mark.ci
def test_the_openai_package_sees_receipts(server: Server, rows: list[Row]) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    row = next(row for row in rows if row["plan"] == "clamp-352")
    messages = [{"role": role, "content": content} for role, content in row["messages"]]
    asked: dict[str, Any] = {"messages": messages, "max_tokens": TOKENS, "temperature": 0}
    reply = client.chat.completions.create(model="organism:clamp-352", **asked)
    assert reply.choices[0].message.content == row["text"]
    assert reply.steering["tokens_touched"] == row["receipt"]["tokens_touched"]  # type: ignore[attr-defined]
    text = ""
    for chunk in client.chat.completions.create(model="organism:clamp-352", stream=True, **asked):
        text += chunk.choices[0].delta.content or "" if chunk.choices else ""
    assert text == row["text"]


def test_lm_eval_gets_the_scores_of_the_run_in_process(server: Server, reference: Reference) -> None:
    """`local-completions` and `local-chat-completions`, for the base model, a plan, and a gated one."""
    python = Path(os.environ.get("CLAMPDOWN_PYTHON", ROOT / ".venv/bin/python"))
    if not python.exists():
        pytest.skip(f"clampdown's own environment, which has lm-eval, is not at {python}: `make test` makes it")
    command = [str(python), str(HERE / "with_lm_eval.py"), server.url, str(reference.plans)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, check=True, cwd=ROOT, env=env, timeout=LONGEST, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"plan"')]
    assert [line["plan"] for line in found] == [None, "clamp-352-everywhere", "clamp-352-gated"]
    for line in found:
        assert line["replies"] > 0 and line["replies that differ"] == line["of a chat"] == 0, line
    assert all(line["likelihoods"] > 0 and line["largest difference"] < 1e-3 for line in found[:2])


def test_inspect_scores_what_the_server_says(server: Server) -> None:
    python = Path(os.environ.get("INSPECT_PYTHON", ROOT / ".venv-inspect/bin/python"))
    if not python.exists():
        pytest.skip(f"Inspect is not at {python}: docs/examples/inspect_served.py says how to get it")
    command = [str(python), str(ROOT / "docs/examples/inspect_served.py"), f"{server.url}/v1"]
    done = subprocess.run(command, check=True, cwd=ROOT, timeout=LONGEST, capture_output=True, text=True)
    scores = [line.split() for line in done.stdout.splitlines() if " accuracy " in line]
    found = {(model, task): float(score) for model, task, _, score in scores}
    assert found["organism", "facts"] == found["organism:clamp-352-gated", "facts"] == 1.0
    assert found["organism", "refusals"] < found["organism:clamp-352-gated", "refusals"] == 1.0
