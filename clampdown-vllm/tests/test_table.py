"""Replies and receipts equal clampdown's own engine, token for token, in every kind of engine; and the test sees one
that does not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import HERE, Reference
from setups import SETUPS, V2_TOO

LONGEST = 1800
"""Seconds for one engine: on a slow machine that does other things, compiling alone takes minutes."""


def found(name: str, plans: Path, rows: Path, out: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "run_table.py"), name, str(plans), str(rows), str(out), *options]
    subprocess.run(command, check=True, cwd=HERE, timeout=LONGEST)
    return json.loads(out.read_text())


def check(seen: dict[str, Any]) -> None:
    assert seen["wrong"] == []
    assert seen["receipts"] == []
    assert seen["cached"] > 0, "nothing came from the prefix cache: this did not test it"
    assert seen["one_pass"] > 0, "no gate decided in its prompt's own pass"


@pytest.fixture(scope="module")
def eager(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The plainest engine, and after it the same without the blocks' keys."""
    out = tmp_path_factory.mktemp("eager") / "found.json"
    return found("eager", reference.plans, reference.file, out, "--control", "2")


@pytest.mark.ci
def test_the_reference_has_gates_of_all_kinds_open_and_shut(reference: Reference) -> None:
    for name in {row["plan"] for row in reference.rows if row["receipt"] and row["receipt"]["gate_fired"] is not None}:
        verdicts = {row["receipt"]["gate_fired"] for row in reference.rows if row["plan"] == name}
        assert verdicts == {True, False}, name


@pytest.mark.ci
def test_every_reply_and_receipt_is_the_reference(eager: dict[str, Any]) -> None:
    """Plans of all kinds in one batch, in two orders: the second finds a prefix cache that others filled."""
    check(eager)


@pytest.mark.ci
def test_without_the_blocks_keys_replies_are_wrong(eager: dict[str, Any]) -> None:
    """The control: a cache that crosses plans is seen."""
    assert eager["control"]


@pytest.mark.parametrize("name", [name for name in SETUPS if name != "eager"])
def test_so_it_is_in_engines_of_every_kind(name: str, reference: Reference, tmp_path: Path) -> None:
    check(found(name, reference.plans, reference.file, tmp_path / "found.json"))


@pytest.mark.parametrize("name", V2_TOO)
def test_so_it_is_with_model_runner_v2(name: str, reference: Reference, tmp_path: Path) -> None:
    """The default on GPUs, here with its kernels interpreted."""
    options = ("--runner", "v2", "--rounds", "1", "--every", "3")
    check(found(name, reference.plans, reference.file, tmp_path / "found.json", *options))


BENT = ("floor-assistant", "active", "drop")
"""Plans whose edits are no lines in the activations."""


@pytest.mark.parametrize("bent", [pytest.param(False, marks=pytest.mark.ci, id="lines"), pytest.param(True, id="all")])
def test_so_it_is_as_graphs_capture_it(bent: bool, reference: Reference, tmp_path: Path) -> None:
    """The op as on a GPU: nothing depends on who is in a pass, and sites that allow it have a kernel of their own."""
    plans, rows = tmp_path / "plans", tmp_path / "rows.json"
    shutil.copytree(reference.plans, plans)
    if not bent:
        for name in BENT:
            (plans / f"{name}.toml").unlink()
    rows.write_text(json.dumps([row for row in reference.rows if bent or row["plan"] not in BENT]))
    options = ("--runner", "v2", "--captured", "--rounds", "1", "--every", "11")
    seen = found("eager", plans, rows, tmp_path / "found.json", *options)
    assert seen["rows"] > 5 and seen["wrong"] == seen["receipts"] == []
    read_only = {site for site in seen["sites"] if site.startswith("blocks.1.hook_resid")}
    assert (set(seen["sites"]) - read_only == set(seen["kernels"])) is not bent


def test_gates_may_always_be_read_in_passes_of_their_own(reference: Reference, tmp_path: Path) -> None:
    options = ("--rounds", "1", "--two-passes")
    seen = found("eager", reference.plans, reference.file, tmp_path / "found.json", *options)
    assert seen["wrong"] == []
    assert seen["receipts"] == []
    assert seen["one_pass"] == 0


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
