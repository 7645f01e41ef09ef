"""One reference for all tests, made once per session in a process of its own, and one server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import setups

setups.environment()

from server import Server, serving  # noqa: E402  (the environment goes first)
from table import Row, read_rows  # noqa: E402

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Reference:
    """The plans' directory, and what every reply should be."""

    plans: Path
    file: Path
    rows: Sequence[Row]


@pytest.fixture(scope="session")
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Every conversation under every plan, by clampdown's own engine; fewer conversations under `-m ci`."""
    directory = tmp_path_factory.mktemp("reference")
    plans, out = directory / "plans", directory / "rows.json"
    plans.mkdir()
    short = ["short"] if request.config.getoption("markexpr") == "ci" else []
    subprocess.run([sys.executable, str(HERE / "reference.py"), str(plans), str(out), *short], check=True, cwd=HERE)
    return Reference(plans, out, read_rows(out))


INLINE = ("gate-external",)  # its scorer is not registered in a server that was not told of it


@pytest.fixture(scope="session")
def server(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("server")
    plans = directory / "plans"
    plans.mkdir()
    for path in reference.plans.glob("*.toml"):
        if path.stem not in INLINE:
            (plans / path.name).write_bytes(path.read_bytes())
    options = ("--enforce-eager", "--max-num-batched-tokens", "64", "--max-num-seqs", "16")
    with serving(plans, directory, *options, "--enable-prompt-tokens-details") as found:
        yield found


@pytest.fixture(scope="session")
def rows(reference: Reference) -> list[Row]:
    """What the server can answer."""
    return [row for row in reference.rows if row["plan"] not in INLINE]
