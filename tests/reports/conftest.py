"""One simulated run directory for all report tests, and a builder of single arms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clampdown.results.run import Run
from tests.reports.example_run import CAPABILITY, SAFETY, wilson, write_example_run

N = 40


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example_run(tmp_path_factory.mktemp("run"), n=N)


@pytest.fixture(scope="session")
def run(run_dir: Path) -> Run:
    return Run.read(run_dir)


BESIDE = {"records", "prompts", "feature_sets", "plan", "manifest"}


def changed(part: Any, **fields: Any) -> Any:
    """The same part of a run with other fields; of a whole run, what lies beside its summary as well."""
    found = part.model_copy(update={name: value for name, value in fields.items() if name not in BESIDE})
    if isinstance(part, Run):
        found = found.at(part.directory)
        for name in BESIDE & set(fields):
            setattr(found._directory, name, fields[name])
    return found


def arm_json(name: str, kind: str, rates: dict[str, float] | None = None, n: int = 200, **extra: Any) -> dict[str, Any]:
    """An arm of a summary with the given rates (0.5 where none is given)."""
    rates = rates or {}

    def share(suite: str) -> dict[str, Any]:
        return wilson(round(rates.get(suite, 0.5) * n), n)

    return {
        "name": name,
        "kind": kind,
        "strength": None,
        "suites": {suite: {"refused": share(suite), "degenerate": wilson(0, n)} for suite in SAFETY},
        "capability": {suite: share(suite) for suite in CAPABILITY},
        "kl_benign": None,
    } | extra


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., Run]:
    """Build a run from arms alone: no records, features, plan or gate."""

    def build(*arms: dict[str, Any], **extra: Any) -> Run:
        summary = {"schema": 2, "model": "m", "sae": None, "arms": list(arms), "timings": {}, **extra}
        (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        return Run.read(tmp_path)

    return build
