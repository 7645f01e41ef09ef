"""Raw rows of a data file, each with its place, so that whoever finds a fault can name the file and the line.

Kinds of file, by suffix: `.jsonl`, `.csv`, `.json` (a list of objects, or an object that holds one), `.txt` (a prompt a
line), `.parquet` (with pyarrow installed). A directory is all files of these kinds in it, in order of name.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from clampdown.documents import parse_json
from clampdown.errors import PromptSetError
from clampdown.extras import extra


@dataclass(frozen=True, slots=True)
class Row:
    """One raw row: `source` and `line` are where it stands, `index` counts rows from 0."""

    source: str
    stem: str
    line: int
    cells: Mapping[str, Any]
    index: int = 0
    unit: str = "line"

    def fail(self, problem: str, hint: str | None = None) -> NoReturn:
        """Raise `PromptSetError` with the row's place."""
        raise PromptSetError(f"{self.source} {self.unit} {self.line}: {problem}", hint=hint)

    def text(self, column: str) -> str | None:
        """The cell as text; None when the column is absent or the cell empty. Numbers are taken as written."""
        value = self.cells.get(column)
        if value is None or value == "":
            return None
        if isinstance(value, dict | list | bool):
            self.fail(f"column '{column}' should be text, got {json.dumps(value)[:60]}")
        return str(value)

    def needed(self, *columns: str) -> str:
        """The text of the first of these columns that has any. Raises `PromptSetError` when none has."""
        for column in columns:
            value = self.text(column)
            if value is not None and value.strip():
                return value
        known = ", ".join(str(name) for name in self.cells)
        absent = not any(column in self.cells for column in columns)
        names = " or ".join(f"'{column}'" for column in columns)
        self.fail(f"no column {names} (columns: {known})" if absent else f"{names} is empty")

    def structure(self, column: str, kind: type, what: str) -> Any:
        """The cell as a JSON list or object, given as such (JSONL) or as JSON text (CSV). None when empty."""
        value = self.cells.get(column)
        if value is None or value == "":
            return None
        if isinstance(value, str):
            value = parse_json(value, f"{self.source} {self.unit} {self.line}: column '{column}'", PromptSetError)
        if not isinstance(value, kind):
            self.fail(f"column '{column}' should be {what}, got {json.dumps(value)[:60]}")
        return value

    def needed_structure(self, column: str, kind: type, what: str) -> Any:
        """As `structure`, but absent or empty is an error."""
        value = self.structure(column, kind, what)
        if not value:
            self.fail(f"no column '{column}' (columns: {', '.join(map(str, self.cells))})")
        return value


def read_rows(path: Path, header: Sequence[str] | None = None) -> list[Row]:
    """All rows of a file, or of every file of a directory. `header` names the columns of a CSV that has no first line
    for them (one whose first line names these very columns is read as usual).

    Raises `PromptSetError` for what is missing, of an unknown kind, or malformed; it says where.
    """
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in READERS)
        if not files:
            raise PromptSetError(f"{path} holds no data files", hint=f"kinds: {', '.join(READERS)}")
        return [row for file in files for row in read_rows(file, header)]
    reader = READERS.get(path.suffix.lower()) or READERS.get(_before_split(path))
    if reader is None:
        raise PromptSetError(f"{path}: unknown kind of prompt file", hint=f"use one of: {', '.join(READERS)}")
    return list(reader(path, header))


def _before_split(path: Path) -> str:
    """The suffix before the one that names a split: `.txt` of "sentences.txt.test"."""
    last = path.suffix.lower()
    return Path(path.stem).suffix.lower() if last in (".train", ".dev", ".val", ".test") else last


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise PromptSetError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise PromptSetError(f"{path} line {line}: not UTF-8 text", hint="save the file as UTF-8") from error


def _jsonl_rows(path: Path, _header: Sequence[str] | None) -> Iterator[Row]:
    # Only \n ends a line: str.splitlines would also cut at U+2028 and friends, which JSON strings may contain.
    index = 0
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        cells = _parsed(line, f"{path} line {number}")
        if not isinstance(cells, dict):
            raise PromptSetError(f"{path} line {number}: expected an object, got {line.strip()[:60]}")
        yield Row(str(path), path.stem, number, cells, index)
        index += 1


def _parsed(text: str, where: str) -> Any:
    return parse_json(text, where, PromptSetError)


def _json_rows(path: Path, _header: Sequence[str] | None) -> Iterator[Row]:
    found = _parsed(_text(path), str(path))
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else found
    if not isinstance(found, list):
        raise PromptSetError(f"{path}: expected a list of objects", hint="JSON Lines (.jsonl) is one object per line")
    for index, cells in enumerate(found):
        row = Row(str(path), path.stem, index + 1, cells if isinstance(cells, dict) else {}, index, "item")
        if not isinstance(cells, dict):
            row.fail(f"expected an object, got {json.dumps(cells)[:60]}")
        yield row


def _csv_rows(path: Path, header: Sequence[str] | None) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    line, index = 1, 0
    try:
        names = first = next(reader, [])
        if header is not None and not set(header) <= set(first):
            names = list(header)
            if first:
                yield _csv_row(path, 1, names, first, index)
                index += 1
        if len(set(names)) != len(names):
            raise PromptSetError(f"{path} line 1: two columns have the same name ({', '.join(names)})")
        while True:
            line = reader.line_num + 1  # where the row starts: quoted cells may span lines
            cells = next(reader, None)
            if cells is None:
                return
            if cells:
                yield _csv_row(path, line, names, cells, index)
                index += 1
    except csv.Error as error:
        raise PromptSetError(f"{path} line {line}: not CSV: {error}") from error


def _csv_row(path: Path, line: int, names: Sequence[str], cells: Sequence[str], index: int) -> Row:
    row = Row(str(path), path.stem, line, dict(zip(names, cells, strict=False)), index)
    if len(cells) != len(names):
        row.fail(f"{len(cells)} cells, the header has {len(names)}", "quote cells that contain commas")
    return row


def _parquet_rows(path: Path, _header: Sequence[str] | None) -> Iterator[Row]:
    with extra("hub", f"{path}: reading Parquet", otherwise="convert it to JSON Lines"):
        import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses of these
        raise PromptSetError(f"{path}: not Parquet: {error}") from error
    for index, cells in enumerate(table.to_pylist()):
        yield Row(str(path), path.stem, index + 1, cells, index, "row")


def _txt_rows(path: Path, _header: Sequence[str] | None) -> Iterator[Row]:
    """One prompt per line, empty lines between them."""
    filled = ((number, line.strip()) for number, line in enumerate(_text(path).split("\n"), 1) if line.strip())
    for index, (number, line) in enumerate(filled):
        yield Row(str(path), path.stem, number, {"prompt": line}, index)


READERS: dict[str, Callable[[Path, Sequence[str] | None], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".json": _json_rows,
    ".txt": _txt_rows,
    ".parquet": _parquet_rows,
}
