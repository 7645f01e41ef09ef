"""Reading JSON, TOML and JSON Lines that somebody else may have written: the one place that parses files.

1. Whatever is wrong is the caller's class of error and says where: no file, no text, not JSON, a key stated twice, a
   number of thousands of digits, nesting deeper than anything of ours.
2. Reading takes bounded time: a document has a largest size, so an endless one is an error like another.
3. `from_json` makes a dataclass of plain values and checks each of them, so that `5` where a record should stand is an
   error that names the place, not an exception somewhere later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from clampdown.errors import ClampdownError, StoreError

Failure = type[ClampdownError]
Reader = Callable[[Any], Any]
T = TypeVar("T")

MAX_JSON, MAX_TOML = 256 << 20, 8 << 20
"""Largest documents in bytes. TOML is parsed in Python, a few megabytes a second."""

MAX_DEPTH = 64
"""Deepest nesting. Ours has about ten levels; far above this, code that walks a document would run out of stack."""


def read_json(path: Path, error: Failure = StoreError) -> Any:
    """A JSON file's value. Raises `error`, naming the file and the place in it."""
    return parse_json(_bytes(path, MAX_JSON, error), str(path), error)


def read_object(path: Path, error: Failure = StoreError) -> dict[str, Any]:
    """A JSON file that holds an object. Raises `error`."""
    value = read_json(path, error)
    if not isinstance(value, dict):
        raise error(f"{path} does not hold a JSON object, but {_shown(value)}")
    return value


def read_toml(path: Path, error: Failure = StoreError) -> dict[str, Any]:
    """A TOML file's tables. Raises `error`, naming the file and the place in it."""
    return parse_toml(_bytes(path, MAX_TOML, error), str(path), error)


def parse_json(text: str | bytes, where: str, error: Failure = StoreError) -> Any:
    """Raises `error`; `where` names the text."""
    with _named(f"{where}: not JSON", error):
        return _json(text)


def parse_toml(text: str | bytes, where: str, error: Failure = StoreError) -> dict[str, Any]:
    """Raises `error`; `where` names the text."""
    with _named(f"{where}: not TOML", error):
        value = tomllib.loads(text if isinstance(text, str) else text.decode())
        _check_depth(value)
    return value


class Lines(NamedTuple):
    """The lines of a JSON Lines file: those that are whole, and what follows the last of them."""

    whole: tuple[bytes, ...]
    cut: bytes


def read_lines(path: Path, error: Failure = StoreError) -> Lines:
    """Only `\\n` ends a line: others stand unescaped in JSON strings. Raises `error`."""
    try:
        if not path.is_file():
            raise error(f"cannot read {path}: no such file")
        *whole, cut = path.read_bytes().split(b"\n")
    except (OSError, ValueError) as cause:
        raise error(f"cannot read {path}: {getattr(cause, 'strerror', None) or cause}") from cause
    return Lines(tuple(whole), cut)


def parse_rows(
    path: Path, lines: Sequence[bytes], parse: Callable[[Any], T], what: str, error: Failure = StoreError
) -> Iterator[T]:
    """Each line by `parse`. Raises `error` naming the line of the first that is no `what`."""
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line.decode())
            if b"\\u" in line or line.count(b"[") + line.count(b"{") > MAX_DEPTH:
                _check(value)
            row = parse(value)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as cause:
            raise error(f"{path} line {number} is not {what}: {_reason(cause)}") from cause
        yield row


def from_json(kind: type[T], value: Any) -> T:
    """A dataclass of plain values, those inside it too. Raises `ValueError` naming the field that is wrong."""
    return row_of(kind)(value)


def row_of(kind: type[T]) -> Callable[[Any], T]:
    """`from_json` of one kind, to read many."""
    return _reader(kind)


@contextlib.contextmanager
def _named(what: str, error: Failure) -> Iterator[None]:
    """Parsing, with whatever parsers raise as one class of error. Errors of ours pass."""
    try:
        yield
    except (ValueError, TypeError, RecursionError) as cause:
        raise error(f"{what}: {_reason(cause)}") from cause


def _reason(cause: Exception) -> str:
    if isinstance(cause, RecursionError):
        return f"nested deeper than {MAX_DEPTH} levels"
    return repr(cause) if isinstance(cause, KeyError) else str(cause)


def _bytes(path: Path, limit: int, error: Failure) -> bytes:
    try:
        with path.open("rb") as handle:
            data = handle.read(limit + 1)
    except (OSError, ValueError) as cause:
        raise error(f"cannot read {path}: {getattr(cause, 'strerror', None) or cause}") from cause
    if len(data) > limit:
        raise error(f"{path} is larger than {limit >> 20} MiB, too large for a document of its kind")
    return data


def _json(text: str | bytes) -> Any:
    value = json.loads(text if isinstance(text, str) else text.decode(), object_pairs_hook=_unique)
    _check(value)
    return value


def _check(value: Any) -> None:
    """Refuse what code that walks or writes a document could not take: halves of surrogates, and a deep nest."""
    _check_depth(value)
    json.dumps(value, ensure_ascii=False).encode()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are stated once: of two values, two readers would take different ones."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key '{twice[:60]}' is stated twice")
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        holders = [part for part in level if isinstance(part, dict | list)]
        if not holders:
            return
        level = [item for part in holders for item in (part.values() if isinstance(part, dict) else part)]
    raise RecursionError


def _shown(value: Any) -> str:
    """A wrong value in a message."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


@cache
def _reader(kind: Any) -> Reader:
    """How a value of an annotated type is read from JSON."""
    origin, inner = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind
    if origin in (Union, UnionType):
        return _one_of(tuple(_reader(each) for each in inner))
    if origin is Literal:
        return _checked(lambda value: value in inner, f"one of {', '.join(map(repr, inner))}")
    if origin is tuple:
        return _tuple(inner)
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(_reader(inner[1]))
    if origin is not None and issubclass(origin, Sequence):
        each = _reader(inner[0])
        return lambda value: [each(item) for item in _items(value)]
    return _PLAIN[kind]


def _checked(accepts: Callable[[Any], bool], what: str) -> Reader:
    def read(value: Any) -> Any:
        if not accepts(value):
            raise ValueError(f"expected {what}, got {_shown(value)}")
        return value

    return read


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_PLAIN: dict[Any, Reader] = {
    str: _checked(lambda value: isinstance(value, str), "text"),
    bool: _checked(lambda value: isinstance(value, bool), "true or false"),
    int: _checked(lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    float: _checked(_is_number, "a number"),
    NoneType: _checked(lambda value: value is None, "null"),
    Any: lambda value: value,
}


def _dataclass(kind: Any) -> Reader:
    """Read in one loop without calls for what needs only a look: a run has a hundred thousand rows."""
    hints = get_type_hints(kind)
    made = [each for each in dataclasses.fields(kind) if each.init]
    readers = {each.name: _reader(_stated(hints[each.name])) for each in made}
    unset = dataclasses.MISSING
    needed = {each.name for each in made if each.default is unset and each.default_factory is unset}
    as_they_are = {each.name: _as_they_are(hints[each.name]) for each in made}
    words = {each.name: _words(hints[each.name]) for each in made}

    def read(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError(f"expected an object, got {_shown(value)}")
        if missing := needed - value.keys():
            raise ValueError(f"no field '{min(missing)}'")
        if unknown := value.keys() - readers.keys():
            raise ValueError(f"unknown field '{str(min(unknown))[:60]}'")
        fields, name = {}, ""
        try:
            for name, item in value.items():
                if type(item) in as_they_are[name]:
                    fields[name] = item
                else:
                    word = words[name].get(item) if type(item) is str else None
                    fields[name] = readers[name](item) if word is None else word
        except (ValueError, TypeError) as cause:
            raise ValueError(f"{name}: {cause}") from cause
        return kind(**fields)

    return read


def _stated(kind: Any) -> Any:
    """The type without its `None`, which has been looked at before."""
    inner = tuple(each for each in get_args(kind) if each is not NoneType)
    return Union[inner] if get_origin(kind) in (Union, UnionType) else kind  # noqa: UP007 - of a tuple


def _as_they_are(kind: Any) -> frozenset[type]:
    """The types whose values need no more than a look: most of what stands in a row."""
    if get_origin(kind) in (Union, UnionType):
        return frozenset().union(*map(_as_they_are, get_args(kind)))
    return frozenset({int, float}) if kind is float else frozenset({kind} & {str, bool, int, NoneType})


def _words(kind: Any) -> dict[str, Enum]:
    """The words of an enumeration, or of one that may be absent."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return {each.value: each for part in kinds if isinstance(part, type) and issubclass(part, Enum) for each in part}


def _one_of(readers: tuple[Reader, ...]) -> Reader:
    def read(value: Any) -> Any:
        problems = []
        for reader in readers:
            try:
                return reader(value)
            except ValueError as cause:
                problems.append(str(cause))
        raise ValueError(problems[0])

    return read


def _items(value: Any) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"expected a list, got {_shown(value)}")
    return value


def _tuple(inner: tuple[Any, ...]) -> Reader:
    if inner[-1] is Ellipsis:
        each = _reader(inner[0])
        return lambda value: tuple(each(item) for item in _items(value))
    readers = tuple(map(_reader, inner))

    def read(value: Any) -> Any:
        if len(_items(value)) != len(readers):
            raise ValueError(f"expected {len(readers)} items, got {len(value)}")
        return tuple(reader(item) for reader, item in zip(readers, value, strict=True))

    return read


def _mapping(item: Reader) -> Reader:
    def read(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError(f"expected an object, got {_shown(value)}")
        return {str(key): item(each) for key, each in value.items()}

    return read
