"""Replies and receipts equal clampdown's own engine, token for token, in every kind of engine; and the test sees one
that does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import HERE, Reference
from setups import SETUPS

CI = {"eager"}


def _cases() -> list[object]:
    return [pytest.param(name, marks=[pytest.mark.ci] if name in CI else [], id=name) for name in SETUPS]


def found(name: str, plans: Path, rows: Path, out: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "run_table.py"), name, str(plans), str(rows), str(out), *options]
    subprocess.run(command, check=True, cwd=HERE, timeout=600)
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", _cases())
def test_every_reply_and_receipt_is_the_reference(name: str, reference: Reference, tmp_path: Path) -> None:
    """Plans of all kinds in one batch, in three orders: the later ones find a prefix cache that others filled."""
    seen = found(name, reference.plans, reference.file, tmp_path / "found.json")
    assert seen["wrong"] == []
    assert seen["receipts"] == []
    assert seen["cached"] > 0, "nothing came from the prefix cache: this did not test it"
    assert seen["one_pass"] > 0, "no gate decided in its prompt's own pass"


def test_gates_may_always_be_read_in_passes_of_their_own(reference: Reference, tmp_path: Path) -> None:
    options = ("--rounds", "1", "--two-passes")
    seen = found("eager", reference.plans, reference.file, tmp_path / "found.json", *options)
    assert seen["wrong"] == []
    assert seen["receipts"] == []
    assert seen["one_pass"] == 0


def test_without_the_blocks_keys_replies_are_wrong(reference: Reference, tmp_path: Path) -> None:
    """The control: a cache that crosses plans is seen."""
    options = ("--rounds", "2", "--without-keys")
    assert found("eager", reference.plans, reference.file, tmp_path / "found.json", *options)["wrong"]


def test_a_sink_is_left_out_or_edited_as_the_plan_says(tmp_path: Path) -> None:
    """Sinks are found on the served model, by their length (decision 0009)."""
    subprocess.run([sys.executable, str(HERE / "with_sinks.py"), str(tmp_path)], check=True, cwd=HERE)
    rows = json.loads((tmp_path / "rows.json").read_text())
    touched = [sum(r["receipt"]["tokens_touched"] for r in rows if r["plan"] == name) for name in ("spared", "edited")]
    assert touched[0] != touched[1], "the reference spares nothing"
    options = ("--rounds", "1", "--model", str(tmp_path / "model"))
    seen = found("eager", tmp_path / "plans", tmp_path / "rows.json", tmp_path / "found.json", *options)
    assert seen["wrong"] == []
    assert seen["receipts"] == []
