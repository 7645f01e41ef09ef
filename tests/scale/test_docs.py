"""The examples of docs/scale.md work, and its table is the function's."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from clampdown.cli.main import app
from clampdown.evaluation.suites import write_suites
from clampdown.organism.suites import one_suite
from clampdown.scale.sizing import DEVICES, LLAMA_8B, LLAMA_70B, SHAPES, Device, Work, need, table
from clampdown.steering.plan import write_plan
from clampdown.store import read_records
from clampdown.types import Split
from tests.study.test_evaluate import command, plan

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")


def example(name: str) -> str:
    (found,) = re.findall(rf"<!-- {re.escape(name)} -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
    return found


def typed_by(script: str, tmp_path: Path, **environment: str) -> list[str]:
    """The words with which a script calls `clampdown`."""
    shim, said = tmp_path / "bin" / "clampdown", tmp_path / "said"
    shim.parent.mkdir(exist_ok=True)
    shim.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {said}\n')
    shim.chmod(0o755)
    path = {"PATH": f"{shim.parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", script], env=os.environ | path | environment, check=True)
    return said.read_text().splitlines()


def test_the_slurm_array_runs_and_merges(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.toml", plan())
    write_suites(tmp_path / "s.jsonl", [one_suite(name, Split.TEST, 40) for name in ("harmful", "benign")])
    asked = {"PLAN": str(tmp_path / "plan.toml"), "SUITES": str(tmp_path / "s.jsonl"), "OUT": str(tmp_path / "big")}
    for index in range(2):
        task = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_TASK_COUNT": "2"}
        assert command(*typed_by(example("slurm.sh"), tmp_path, **asked, **task)) == 0
    (merge,) = re.findall(r'--wrap "(clampdown merge.*?)"', PAGE)
    assert command(*typed_by(merge.replace("runs/big", asked["OUT"]), tmp_path)) == 0
    assert len(read_records(tmp_path / "big" / "records.jsonl")) == 160
    assert (tmp_path / "big" / "report.html").exists()


def test_the_kubernetes_job_is_one_and_its_command_is_ours() -> None:
    job: dict[str, Any] = yaml.safe_load(example("kubernetes.yaml"))
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert (job["kind"], spec["completionMode"]) == ("Job", "Indexed")
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "3") for word in container["args"]]
    parsed = typer.main.get_command(app).commands[words[0]].make_context(words[0], words[1:])
    assert parsed.params["shard"] == f"3/{spec['completions']}"
    assert any(one["name"] == "JOB_COMPLETION_INDEX" for one in container["env"])


def test_the_table_of_the_page_is_the_functions() -> None:
    assert table(Work()) in PAGE


@pytest.mark.parametrize("shape", SHAPES)
def test_more_devices_never_take_longer_and_all_is_counted(shape: Any) -> None:
    found = [need(shape, 65_536, n, Work()) for n in DEVICES]
    times = [each.test_seconds for each in found if each.test_seconds]
    assert times == sorted(times, reverse=True) and len(times) >= 2
    for each, n in zip(found, DEVICES, strict=True):
        assert each.copies * each.devices_per_copy <= n
        assert each.copy_bytes <= each.devices_per_copy * Device().memory


def test_shapes_have_the_weights_that_their_names_say() -> None:
    """Blocks of Llama: two projections of d_model, two of the heads' width, three of the inner width."""
    for shape, inner in ((LLAMA_8B, 14_336), (LLAMA_70B, 28_672)):
        block = 2 * shape.d_model**2 + 2 * shape.d_model * shape.kv_width + 3 * shape.d_model * inner
        whole = shape.layers * block + 2 * shape.vocabulary * shape.d_model
        assert whole == pytest.approx(shape.weights, rel=0.01)
