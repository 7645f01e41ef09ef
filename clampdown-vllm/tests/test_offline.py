"""`clampdown evaluate --engine vllm`: the same records as without, in fewer words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Reference


def evaluate(plans: list[Path], out: Path, *more: str) -> dict[tuple[str, str, str], dict[str, object]]:
    command = [sys.executable, "-m", "clampdown", "evaluate", *map(str, plans), "--out", str(out), "--limit", "3"]
    command += ["--suites", "jailbroken_seen,facts", "--no-likelihood", *more]
    subprocess.run(command, check=True, timeout=600)
    lines = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    return {(line["arm"], line["suite"], line["prompt_id"]): line for line in lines}


def test_records_and_receipts_are_those_of_this_packages_own_engine(reference: Reference, tmp_path: Path) -> None:
    plans = [reference.plans / f"{name}.toml" for name in ("clamp-352", "clamp-352-gated", "two-sided", "sites")]
    own = evaluate(plans, tmp_path / "own")
    options = json.dumps({"enforce_eager": True, "block_size": 32})
    for _ in range(2):  # the second finds everything written
        other = evaluate(plans, tmp_path / "vllm", "--engine", f"vllm:{options}")
    assert other.keys() == own.keys()
    for key, record in own.items():
        for field in ("reply", "verdict", "n_tokens"):
            assert other[key][field] == record[field], (key, field)
        receipt = record["receipt"]
        assert other[key]["receipt"] == (receipt and pytest.approx(receipt, rel=1e-3, abs=1e-3)), key
