"""The notebooks and README's Python run as they stand, in a kernel."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
PATIENCE = 500  # seconds


def code(source: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_code_cell(source)


def all_cells() -> dict[str, list[nbformat.NotebookNode]]:
    """By the name of what they stand in."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert blocks
    return {path.stem: nbformat.read(path, as_version=4).cells for path in NOTEBOOKS} | {"README": [*map(code, blocks)]}


@pytest.mark.filterwarnings("ignore")  # of the kernel's own machinery
def test_they_run_and_show_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in an empty directory and without a name of the one before, in one kernel: importing everything takes longer
    than most of them. An error in a cell fails the test with its traceback."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    cells, parts = [], all_cells()
    for name, own in parts.items():
        (tmp_path / name).mkdir()
        cells += [code(f"%reset -f\nimport os\nos.chdir({str(tmp_path / name)!r})\ndel os"), *own]
    whole = nbformat.v4.new_notebook(cells=cells)
    patience = {"timeout": PATIENCE, "startup_timeout": PATIENCE, "iopub_timeout": PATIENCE}
    NotebookClient(whole, **patience, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for name, own in parts.items():
        shown = [output.data for cell in own if cell.cell_type == "code" for output in cell.outputs if "data" in output]
        tables = any("text/html" in data for data in shown)
        assert tables or name == "README", f"{name}: runs and cards are tables in a notebook"
        asked = any(".report(" in cell.source for cell in own)
        assert not asked or list((tmp_path / name).rglob("report.html")), name
