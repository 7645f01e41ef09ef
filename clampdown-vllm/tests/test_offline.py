"""`LLM(...)` as its users write it, and `clampdown evaluate --engine vllm`: the same records as without."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import HERE, Reference


def evaluate(plans: list[Path], out: Path, *more: str) -> dict[tuple[str, str, str], dict[str, object]]:
    command = [sys.executable, "-m", "clampdown", "evaluate", *map(str, plans), "--out", str(out), "--limit", "3"]
    command += ["--suites", "jailbroken_seen,facts", "--no-likelihood", *more]
    subprocess.run(command, check=True, timeout=1800)
    lines = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    return {(line["arm"], line["suite"], line["prompt_id"]): line for line in lines}


def test_records_and_receipts_are_those_of_this_packages_own_engine(reference: Reference, tmp_path: Path) -> None:
    plans = [reference.plans / f"{name}.toml" for name in ("clamp-352", "clamp-352-gated", "two-sided", "sites")]
    own = evaluate(plans, tmp_path / "own")
    options = json.dumps({"enforce_eager": True, "block_size": 32})
    there = tmp_path / "vllm"
    evaluate(plans, there, "--engine", f"vllm:{options}")
    lost = {name: halved(there / name) for name in ("records.jsonl", "replies.jsonl")}
    assert all(lost.values())
    other = evaluate(plans, there, "--engine", f"vllm:{options}")  # as after a kill: goes on with what is missing
    for name, n in lost.items():
        assert len((there / name).read_text().splitlines()) == n, "what was there was made again"
    assert other.keys() == own.keys()
    for key, record in own.items():
        for field in ("reply", "verdict", "n_tokens"):
            assert other[key][field] == record[field], (key, field)
        assert differences(record["receipt"], other[key]["receipt"]) == [], key


def differences(own: dict[str, Any] | None, other: dict[str, Any] | None) -> list[str]:
    """Fields of two receipts that are not the same; sums of 32-bit numbers may be made in another order."""
    if own is None or other is None:
        return [] if own is other else ["one of them"]
    return [k for k in own.keys() | other.keys() if not _same(own.get(k), other.get(k))]


def _same(own: Any, other: Any) -> bool:
    if isinstance(own, float) and isinstance(other, float):
        return math.isclose(own, other, rel_tol=1e-3, abs_tol=1e-3)
    return own == other


def halved(log: Path) -> int:
    """Leaves the first half of a log's lines; how many there were."""
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[: len(lines) // 2]))
    return len(lines)


def test_an_llm_with_plans_as_its_users_write_it(reference: Reference, tmp_path: Path) -> None:
    """With the engine in a process of its own: prompts as text, as ids and as conversations; a receipt on each."""
    out = tmp_path / "found.json"
    command = [sys.executable, str(HERE / "run_offline.py"), str(reference.plans), str(reference.file), str(out)]
    subprocess.run(command, check=True, cwd=HERE, timeout=1800)
    found = json.loads(out.read_text())
    for row, answers in found["answers"]:
        for text, receipt in answers:
            assert text == row["text"], row["plan"]
            assert receipt["plan"] == row["plan"]
            assert receipt["tokens_touched"] == row["receipt"]["tokens_touched"]
    assert found["unsteered"] is None
    assert "there is no plan 'no-such-plan' here" in found["refused"]
