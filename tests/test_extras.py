"""Extras: pyproject.toml promises what the code asks for; the core works without them and names the missing one."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from clampdown.errors import MissingPackageError
from clampdown.extras import EXTRAS, extra, is_there, require
from tests.reports.example_run import write_example_run

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OTHER_NAMES = {"sklearn": "scikit-learn"}  # where a package is imported by another name than it is installed by
OF_CORE = {"anyio", "click", "markupsafe", "tqdm", "yaml"}  # required by httpx2, typer, jinja2, huggingface-hub
NOT_USERS = {"dev", "docs"}
APART = {"inspect", "spread", "quantise", "ray"}  # an environment of its own; hundreds of megabytes for a few


def _names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~ ]", each)[0].lower().replace("_", "-") for each in requirements}


def _name(module: str) -> str:
    top = module.partition(".")[0]
    return OTHER_NAMES.get(top, top).lower().replace("_", "-")


CORE = _names(PROJECT["dependencies"])
OPTIONAL = {name: _names(each) for name, each in PROJECT["optional-dependencies"].items()}


def test_every_extra_of_the_project_is_in_the_table() -> None:
    assert set(OPTIONAL) - NOT_USERS - {"all"} == set(EXTRAS)
    assert all(_name(modules[0]) in OPTIONAL[name] for name, modules in EXTRAS.items())


def test_all_is_everything_that_fits_into_one_environment() -> None:
    (everything,) = PROJECT["optional-dependencies"]["all"]
    assert set(everything.removeprefix("clampdown[").rstrip("]").split(",")) == set(EXTRAS) - APART


def _imports(tree: ast.AST, within: frozenset[str] = frozenset()) -> Iterator[tuple[int, str, frozenset[str]]]:
    """(line, module, extras that the import stands in) of every import, `import_module("...")` too."""
    for node in ast.iter_child_nodes(tree):
        inner = within
        match node:
            case ast.With(items=items):
                asked = [one.context_expr for one in items if isinstance(one.context_expr, ast.Call)]
                inner = within | {ast.literal_eval(call.args[0]) for call in asked if ast.unparse(call.func) == "extra"}
            case ast.Import(names=names):
                yield from ((node.lineno, name.name, within) for name in names)
            case ast.ImportFrom(module=str(module)):
                yield node.lineno, module, within
            case ast.Call(args=[ast.Constant(value=str(module))]) if "import_module" in ast.unparse(node.func):
                yield node.lineno, module, within
        yield from _imports(node, inner)


def test_what_is_no_part_of_the_core_is_imported_as_an_extra() -> None:
    wrong = [
        f"{path.relative_to(SOURCE)}:{line} imports {module}"
        for path in sorted(SOURCE.rglob("*.py"))
        for line, module, within in _imports(ast.parse(path.read_text(encoding="utf-8")))
        if (top := module.partition(".")[0]) not in {"clampdown", *sys.stdlib_module_names} | OF_CORE
        and _name(module) not in CORE
        and not any(top in EXTRAS[name] for name in within)
    ]
    assert not wrong, wrong


def test_the_error_names_the_command_and_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingPackageError) as caught, extra("tune", "a search", otherwise="do without"):
        import optuna  # noqa: F401
    assert (
        str(caught.value) == "a search needs the package optuna\n  hint: pip install 'clampdown[tune]', or do without"
    )
    assert not is_there("tune")
    with pytest.raises(MissingPackageError, match="optuna"):
        require("tune", "a search")
    with pytest.raises(ModuleNotFoundError, match="no_such"), extra("tune", "a search"):
        import no_such  # pyright: ignore[reportMissingImports] # noqa: F401


LIBRARIES_LOOK_FOR = {"pandas", "datasets", "pyarrow", "accelerate", "bitsandbytes"}
"""What transformers finds in the list of what is installed, whatever an import says: their absence is not played."""

WITHOUT = f"""
import sys
from importlib.abc import MetaPathFinder
class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted({top for tops in EXTRAS.values() for top in tops} - LIBRARIES_LOOK_FOR)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""
"""Before anything else in a process: as if nothing but the core were installed."""


def _without(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT + script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_extras_each_module_imports_or_says_what_is_missing() -> None:
    names = [
        ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((SOURCE / "clampdown").rglob("*.py"))
        if path.name != "__main__.py"
    ]
    script = """
from importlib import import_module
from clampdown.errors import MissingPackageError
for name in sys.argv[1:]:
    try:
        import_module(name)
    except MissingPackageError as error:
        print(name, error.hint)
"""
    done = _without(script, *names)
    assert done.returncode == 0, done.stderr
    missing = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert missing["clampdown.serving.app"] == "pip install 'clampdown[serve]'"
    users = {".".join(name.split(".")[1:3]) for name in missing}
    assert {user.split(".")[0] for user in users} == {"serving", "commands", "interop", "study"}
    assert {user for user in users if user.startswith("study")} == {"study.tune"}
    assert not users & {"commands.chat", "commands.monitor", "commands.check"}


def test_a_command_without_its_extra_names_it() -> None:
    done = _without("from clampdown.cli.main import main; main()", "serve")
    assert done.returncode == 2, done.stderr
    assert "pip install 'clampdown[serve]'" in done.stderr and "Traceback" not in done.stderr


def test_a_report_without_plotly_has_every_number_and_says_what_it_lacks(tmp_path: Path) -> None:
    write_example_run(tmp_path, n=12, controls=1)
    done = _without("from clampdown.cli.main import main; main()", "report", tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "they need plotly" in page and "clampdown[report]" in done.stderr
    assert 'class="plot"' not in page and 'id="all-arms"' in page
