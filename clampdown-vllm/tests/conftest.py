"""One reference for all tests, made once per session in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import setups

setups.environment()

from table import Row, read_rows  # noqa: E402  (the environment goes first)

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Reference:
    """The plans' directory, and what every reply should be."""

    plans: Path
    file: Path
    rows: Sequence[Row]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Every conversation under every plan, by clampdown's own engine."""
    directory = tmp_path_factory.mktemp("reference")
    plans, out = directory / "plans", directory / "rows.json"
    plans.mkdir()
    subprocess.run([sys.executable, str(HERE / "reference.py"), str(plans), str(out)], check=True, cwd=HERE)
    return Reference(plans, out, read_rows(out))
