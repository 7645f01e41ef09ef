"""The rules of the source tree that no linter knows: imports point down, start-up is light, functions are short.

The table is docs/decisions/0001-layout-and-imports.md. A package has a rank and a ceiling: it may import itself and
whatever has a rank at or below its ceiling. All imports count, inside functions and under TYPE_CHECKING too: a lazy
import hides a cost, not a dependency.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = "clampdown"

RANK = {
    # Rank 0 has an order of its own: each may import those before it.
    "errors": 0.0,
    "extras": 0.02,
    "notebook": 0.05,
    "types": 0.1,
    "config": 0.2,
    "documents": 0.25,
    "store": 0.3,
    "featuresets": 0.4,
    "cards": 0.5,
    "explanation": 0.6,
    "replies": 0.7,
    "results": 0.8,
    "reports": 1,
    "models": 1,
    "saes": 1,
    "activations": 2,
    "steering": 3,
    "discovery": 4,
    "evaluation": 5,
    "organism": 5,
    "study": 6,
    "attacks": 7,
    "effects": 7,
    "sae_training": 7,
    "serving": 7,
    "interop": 7,
    "scale": 7,
    "commands": 8,
    "interactive": 8,
    "face": 8.5,
    "cli": 9,
    "__main__": 10,
}
TOP_OF_RANK_0 = RANK["results"]
CEILING = {
    "errors": -1,
    "extras": RANK["errors"],
    "notebook": RANK["extras"],
    "types": RANK["notebook"],
    "config": RANK["types"],
    "documents": RANK["config"],
    "store": RANK["documents"],
    "featuresets": RANK["store"],
    "cards": RANK["featuresets"],
    "explanation": RANK["cards"],
    "replies": RANK["explanation"],
    "results": RANK["replies"],
    "models": TOP_OF_RANK_0,
    "saes": TOP_OF_RANK_0,  # not models: any tool can use an SAE without a language model
    "activations": 1,
    "steering": 2,
    "discovery": 3,
    "evaluation": 3,  # not discovery: what finds features must not be what measures them
    "study": 5,
    "attacks": 6,
    "effects": 6,
    "sae_training": 6,
    "reports": TOP_OF_RANK_0,  # a report is made from files, anywhere
    "serving": 3,
    "interop": 6,
    "scale": 6,
    "organism": 2,
    "commands": 7,
    "interactive": 7,
    "face": 8,
    "cli": 8,
    "__main__": 9,
}

HEAVY = {"torch", "transformers", "scipy", "sklearn", "plotly", "numpy", "safetensors", "huggingface_hub", "pydantic"}
LIGHT_PACKAGES = (
    "errors",
    "extras",
    "notebook",
    "types",
    "config",
    "documents",
    "store",
    "featuresets",
    "cards",
    "replies",
)
INIT_WITH_CODE = {"clampdown", "clampdown.organism"}
MAX_FUNCTION_LINES = 80
VAGUE_NAMES = {"utils", "helpers", "common", "misc", "manager"}


@cache
def modules() -> dict[str, ast.Module]:
    """Dotted name -> syntax tree of every module of the package."""
    files = sorted((SOURCE / PACKAGE).rglob("*.py"))
    assert files
    return {_dotted(path): ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in files}


def _dotted(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def area(module: str) -> str | None:
    """The row of the table that a module belongs to; None for the package root."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def typing_only(tree: ast.Module) -> set[ast.AST]:
    """Nodes under `if TYPE_CHECKING:`."""
    guards = (node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {inner for guard in guards for statement in guard.body for inner in ast.walk(statement)}


def imported(tree: ast.Module, *, for_types_too: bool = True) -> Iterator[str]:
    """Dotted names that a module imports, wherever in it; `from a import b` yields `a.b`, module or not."""
    skipped = set() if for_types_too else typing_only(tree)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def internal_edges(*, for_types_too: bool = True) -> Iterator[tuple[str, str]]:
    """(importing module, imported module) within the package; imported names are resolved to their modules."""
    for name, tree in modules().items():
        for target in imported(tree, for_types_too=for_types_too):
            if target.split(".")[0] == PACKAGE:
                yield name, target if target in modules() else target.rpartition(".")[0]


def may_import(importer: str | None, target: str | None) -> bool:
    """Whether the table lets a module of one area import a module of another."""
    if target is None or importer == target:  # the root holds the version only
        return True
    return importer is not None and RANK[target] <= CEILING[importer]


def test_every_module_has_a_place_in_the_table() -> None:
    assert RANK.keys() == CEILING.keys()
    assert {area(name) for name in modules()} - {None} <= RANK.keys()


def test_imports_point_down() -> None:
    # The package's own names are those of its face, for type checkers alone: nothing is imported when it is.
    edges = [(a, b) for a, b in internal_edges() if (a, b) != (PACKAGE, f"{PACKAGE}.face")]
    wrong = [f"{a} imports {b}" for a, b in edges if not may_import(area(a), area(b))]
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("importer", "target"),
    [
        ("models", "saes"),
        ("saes", "models"),
        ("evaluation", "discovery"),
        ("reports", "models"),
        ("steering", "discovery"),
        ("types", "store"),
        ("organism", "steering"),
        ("serving", "study"),
        ("commands", "cli"),
    ],
)
def test_the_table_forbids(importer: str, target: str) -> None:
    assert not may_import(importer, target)


def test_no_import_cycles_between_modules() -> None:
    """Imports for types only may point back within a package; those that run may not, in functions either."""
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for importer, target in internal_edges(for_types_too=False):
        if importer != target:
            graph[importer].add(target)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_rank_0_and_reports_name_no_torch() -> None:
    wrong = [
        f"{name} imports {target}"
        for name, tree in modules().items()
        if area(name) in (*LIGHT_PACKAGES, "reports")
        for target in imported(tree)
        if target.split(".")[0] in ("torch", "transformers")
    ]
    assert not wrong, wrong


def loaded_by(*names: str) -> set[str]:
    """Top-level packages in memory after a fresh interpreter imported these modules."""
    script = f"import sys, {', '.join(names)}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_command_line_starts_without_heavy_packages() -> None:
    heavy = loaded_by(*(f"{PACKAGE}.{name}" for name in (*LIGHT_PACKAGES, "cli.main"))) & HEAVY
    assert not heavy


def test_a_report_is_made_without_torch() -> None:
    reports = [name for name in modules() if area(name) == "reports"]
    heavy = loaded_by(*reports) & {"torch", "transformers"}
    assert not heavy


def test_package_files_hold_a_docstring_only() -> None:
    """A re-export in a package file makes every import of one module an import of all, and soon a cycle."""
    wrong = [
        _dotted(path)
        for path in (SOURCE / PACKAGE).rglob("__init__.py")
        if _dotted(path) not in INIT_WITH_CODE
        and [type(node) for node in ast.parse(path.read_text(encoding="utf-8")).body] != [ast.Expr]
    ]
    assert not wrong, wrong


def test_functions_are_short() -> None:
    long = [
        f"{name}:{node.lineno} {node.name} has {lines} lines"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not long, long


def test_only_the_command_line_prints() -> None:
    wrong = [
        f"{name}:{node.lineno}"
        for name, tree in modules().items()
        if area(name) != "cli"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not wrong, wrong


def test_module_names_say_something() -> None:
    assert not {name for name in modules() if name.rpartition(".")[2] in VAGUE_NAMES}
