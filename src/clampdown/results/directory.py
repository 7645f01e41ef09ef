"""The files beside a run's summary, read when they are asked for.

`records.jsonl`, `prompts.jsonl`, `features/*.json`, `plan.toml`, `manifest.json` and `explain.json` are optional. What
is missing or unreadable becomes a sentence in `notes`, which a report prints where the part would be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from clampdown.documents import parse_rows, read_json, read_lines, read_toml
from clampdown.errors import ClampdownError, StoreError
from clampdown.store import read_feature_set, read_records
from clampdown.types import FeatureSet, Message, Record

EXPLANATION_PAGE = "explain.html"
SOURCES = ("*.json", "*.jsonl", "*.toml", "features/*.json", "plans/*.toml")

Prompts = Mapping[tuple[str, str], tuple[Message, ...]]


@dataclass(frozen=True, slots=True)
class FileLine:
    """A file of the run directory, with its hash."""

    name: str
    size: int
    sha256: str


@dataclass
class RunDirectory:
    """What lies in a run's directory. `notes` says what is missing, by file, once all parts have been read."""

    path: Path
    _notes: dict[str, str] = field(default_factory=dict)

    @cached_property
    def records(self) -> tuple[Record, ...]:
        return self._optional("records.jsonl", read_records, ())

    @cached_property
    def prompts(self) -> Prompts:
        """(suite, prompt id) -> the prompt's turns."""
        return self._optional("prompts.jsonl", _read_prompts, {})

    @cached_property
    def plan(self) -> Mapping[str, Any] | None:
        """`plan.toml` as plain values."""
        return self._optional("plan.toml", read_toml, None)

    @cached_property
    def manifest(self) -> Mapping[str, Any]:
        """`manifest.json`: the key of everything that could have changed a result."""
        found = self._optional("manifest.json", read_json, {})
        return found if isinstance(found, Mapping) else {}

    @cached_property
    def feature_sets(self) -> tuple[FeatureSet, ...]:
        """Every finder's kept features, without the scores of the others."""
        paths = sorted((self.path / "features").glob("*.json"))
        if not paths:
            self._notes["features"] = "This run has no feature sets."
        found = (self._optional(f"features/{path.name}", _read_kept_features, None) for path in paths)
        return tuple(each for each in found if each is not None)

    @cached_property
    def explanation(self) -> Mapping[str, Any] | None:
        """`explain.json` when its page lies beside it."""
        path = self.path / "explain.json"
        if not path.is_file() or not (self.path / EXPLANATION_PAGE).is_file():
            return None
        try:
            found = read_json(path)
        except StoreError:
            return None
        return found if isinstance(found, Mapping) and found.get("kind") == "explanation" else None

    @cached_property
    def corrected(self) -> Mapping[str, Any] | None:
        """`corrected.json`: rates corrected for the judge's error, when replies of this run were labelled."""
        path = self.path / "corrected.json"
        try:
            found = read_json(path) if path.is_file() else None
        except StoreError:
            return None
        return found if isinstance(found, Mapping) and found.get("kind") == "corrected_refusals" else None

    @property
    def notes(self) -> Mapping[str, str]:
        """A sentence for each part that is missing or could not be read."""
        for name in ("records", "prompts", "feature_sets", "plan", "manifest"):
            getattr(self, name)
        return self._notes

    @property
    def files(self) -> tuple[FileLine, ...]:
        """Every file that results are read from, with its hash."""
        paths = sorted(path for pattern in SOURCES for path in self.path.glob(pattern))
        return tuple(
            FileLine(p.relative_to(self.path).as_posix(), p.stat().st_size, sha256(p.read_bytes()).hexdigest())
            for p in paths
        )

    def _optional(self, name: str, reader: Callable[[Path], Any], absent: Any) -> Any:
        path = self.path / name
        if not path.is_file():
            self._notes[name] = f"This run has no {name}."
            return absent
        try:
            return reader(path)
        except ClampdownError as error:
            self._notes[name] = f"{name} could not be read: {error.message}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._notes[name] = f"{name} could not be read: {error}"
        return absent


def _read_kept_features(path: Path) -> FeatureSet:
    return read_feature_set(path, with_columns=False)


def _read_prompts(path: Path) -> Prompts:
    whole, cut = read_lines(path)
    return dict(parse_rows(path, [line for line in (*whole, cut) if line.strip()], _prompt, "a prompt"))


def _prompt(row: Mapping[str, Any]) -> tuple[tuple[str, str], tuple[Message, ...]]:
    return (row["suite"], row["id"]), tuple(Message(m["role"], m["content"]) for m in row["messages"])
