"""The notebooks and README's Python run as they stand, in a kernel of their own."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def execute(notebook: nbformat.NotebookNode, directory: Path) -> list[nbformat.NotebookNode]:
    """Run a notebook; an error in a cell fails the test with its traceback."""
    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    os.environ["PYTHONPATH"] = source
    patience = {"timeout": 500, "startup_timeout": 500, "iopub_timeout": 500}  # seconds
    NotebookClient(notebook, **patience, resources={"metadata": {"path": str(directory)}}).execute()
    return notebook.cells


@pytest.mark.filterwarnings("ignore")  # of the kernel's own machinery
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_itself(path: Path, tmp_path: Path) -> None:
    cells = execute(nbformat.read(path, as_version=4), tmp_path)
    shown = [output.data for cell in cells if cell.cell_type == "code" for output in cell.outputs if "data" in output]
    assert any("text/html" in data for data in shown), "runs and cards are tables in a notebook"
    assert list(tmp_path.rglob("report.html")) or ".report(" not in path.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore")
def test_readmes_python_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert blocks
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(block) for block in blocks])
    execute(notebook, tmp_path)
