"""The documentation speaks about what exists: every command and option, every link, every file of the tree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
LAYOUT = ROOT / "docs" / "layout.md"
PACKAGE = ROOT / "src" / "clampdown"
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")})
SHELL_COMPLETION = {"--install-completion", "--show-completion"}  # typer's own, on every app

LINK = re.compile(r"(?<!`)\[[^\]]*\]\(<?([^)\s>]+)>?[^)]*\)|<img[^>]+src=\"([^\"]+)\"")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
TREE_LINE = re.compile(r"(?P<indent>[\s│├└─]*)(?P<names>\S.*?)(\s{2,}.*|\s*)")


def commands() -> Iterator[tuple[str, Any]]:
    """("demo", command) for each command of the typer app, groups opened: ("organism train", command)."""
    import typer

    from clampdown.cli.main import app

    todo: list[tuple[str, Any]] = [("", typer.main.get_command(app))]
    while todo:
        name, command = todo.pop()
        children = getattr(command, "commands", None)
        if children is None:
            yield name, command
        else:
            todo.extend((f"{name} {child}".strip(), children[child]) for child in children)


def options(command: Any) -> set[str]:
    """The long options of a command, `--no-x` forms excepted."""
    visible = [p for p in command.params if p.param_type_name == "option" and not getattr(p, "hidden", False)]
    return {name for p in visible for name in p.opts if name.startswith("--")} - SHELL_COMPLETION


def test_every_command_and_option_is_documented() -> None:
    """An option counts as documented on a page that also names its command."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    missing = []
    for name, command in commands():
        pages = [text for text in texts if re.search(rf"clampdown {name}\b", text)]
        missing += [] if pages else [f"clampdown {name}"]
        missing += [
            f"clampdown {name} {option}"
            for option in sorted(options(command))
            if not any(re.search(rf"(?<![\w-]){option}(?![\w-])", text) for text in pages)
        ]
    assert not missing, missing


def links(page: Path) -> Iterator[str]:
    """Targets of a page's links and pictures that point into this repository."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for match in LINK.finditer(text):
        target = match[1] or match[2]
        if not re.match(r"[a-z]+:|#", target):
            yield target.split("#")[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    assert not [target for target in links(page) if not (page.parent / target).exists()]


def tree_entries(block: str) -> Iterator[Path]:
    """Paths that a drawn tree names, relative to the repository.

    A line is an indent (spaces or box drawing), one or more paths, and after two spaces a description. Directories end
    with a slash; a path hangs on the last directory with a smaller indent.
    """
    parents: list[tuple[int, Path]] = [(-1, Path())]
    for line in filter(str.strip, block.splitlines()):
        match = TREE_LINE.fullmatch(line)
        assert match is not None, line
        depth = len(match["indent"])
        parents = [(indent, path) for indent, path in parents if indent < depth]
        for name in re.split(r",?\s", match["names"]):
            path = parents[-1][1] / name
            yield path
            if name.endswith("/"):
                parents.append((depth, path))


def drawn_tree() -> list[Path]:
    """Entries of the block that draws the package."""
    blocks = (block.split("\n", 1)[1].removesuffix("```") for block in FENCED.findall(LAYOUT.read_text("utf-8")))
    return next(list(tree_entries(block)) for block in blocks if re.search(r"^src/clampdown/", block, re.MULTILINE))


def test_the_drawn_tree_names_only_what_exists() -> None:
    assert not [str(path) for path in drawn_tree() if not list(ROOT.glob(str(path)))]


def test_the_drawn_tree_names_every_package_and_module() -> None:
    tree = {(ROOT / path).resolve() for path in drawn_tree()}
    packages = {path.parent for path in PACKAGE.rglob("__init__.py")} - {PACKAGE}
    modules = {path for path in PACKAGE.glob("*.py") if not path.name.startswith("__")}
    assert not sorted(str(path.relative_to(ROOT)) for path in (packages | modules) - tree)


INDENTED = """src/clampdown/
  errors.py types.py    rank 0
  models/               any decoder
    layout.py           where blocks are
  cli.py                the root, see errors.py
tests/                  mirrors it
"""
BOXED = """src/clampdown/
├── errors.py, types.py    rank 0
├── models/                any decoder
│   └── layout.py          where blocks are
└── cli.py                 the root, see errors.py
tests/                     mirrors it
"""


@pytest.mark.parametrize("drawn", [INDENTED, BOXED])
def test_a_drawn_tree_is_read(drawn: str) -> None:
    named = ("", "errors.py", "types.py", "models", "models/layout.py", "cli.py")
    assert list(tree_entries(drawn)) == [*(Path("src/clampdown") / name for name in named), Path("tests")]


def test_install_lines_pin_torch_as_the_constraints_do() -> None:
    """An install line that leaves torch open may pull gigabytes."""
    pin = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pin is not None
    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    installs = [line for line in lines if re.search(r"pip install\b.*\btorch\b", line)]
    assert installs
    assert not [line for line in installs if pin[0] not in line]
