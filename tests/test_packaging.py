"""The wheel holds what the package needs at run time: code, the embedded model's weights, the report's templates."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built from a copy of the sources.

    Calls the build back end of pyproject.toml itself: pip would make an isolated environment, which needs the network.
    """
    copy = tmp_path_factory.mktemp("source")
    shutil.copytree(SOURCE, copy / "src", ignore=NOT_SHIPPED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    script = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", script], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = (copy / "dist").glob("*.whl")
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


def test_constraints_are_exact_pins() -> None:
    """Torch without a local-version suffix (`+cpu`): such a pin can be satisfied on one kind of machine only."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert not [version for version in pins.values() if "+" in version or "*" in version]
    assert "torch" in pins
