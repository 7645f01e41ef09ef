"""What only some runs have: methods side by side, claims, an explanation; and the files it all came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from clampdown.errors import StoreError
from clampdown.store import read_json

EXPLANATION_PAGE = "explain.html"
DECISIONS = ("recipe", "chosen", "controls")
SOURCES = ("*.json", "*.jsonl", "*.toml", "features/*.json", "plans/*.toml")


@dataclass(frozen=True, slots=True)
class MethodLine:
    """A method's arms: its own best, and the same at equal benign KL (None: it cannot be brought there)."""

    method: str
    best: str
    matched: str | None
    note: str


@dataclass(frozen=True, slots=True)
class ClaimLine:
    """A claim of a paper tested on this run; `reproduced` is None without data."""

    paper: str
    claim: str
    reproduced: bool | None
    evidence: str


@dataclass(frozen=True, slots=True)
class FileLine:
    """A file of the run directory that the report was made from."""

    name: str
    size: int
    sha256: str


def method_lines(raw: Mapping[str, Any]) -> tuple[MethodLine, ...]:
    """The methods that the run compared."""
    rows = raw.get("methods") or ()
    return tuple(MethodLine(row["method"], row["best"], row.get("matched"), row.get("note") or "") for row in rows)


def claim_lines(raw: Mapping[str, Any]) -> tuple[ClaimLine, ...]:
    """The papers' claims that the run tested."""
    rows = raw.get("claims") or ()
    return tuple(
        ClaimLine(row["paper"], row["claim"], row.get("reproduced"), row.get("evidence") or "") for row in rows
    )


def read_explanation(directory: Path) -> dict[str, Any] | None:
    """`explain.json` when its page lies beside it."""
    path = directory / "explain.json"
    if not path.is_file() or not (directory / EXPLANATION_PAGE).is_file():
        return None
    try:
        found = read_json(path)
    except StoreError:
        return None
    return found if isinstance(found, dict) and found.get("kind") == "explanation" else None


def files_of(directory: Path) -> tuple[FileLine, ...]:
    """Every file that the report may draw on, with its hash."""
    paths = sorted(path for pattern in SOURCES for path in directory.glob(pattern))
    return tuple(
        FileLine(path.relative_to(directory).as_posix(), path.stat().st_size, sha256(path.read_bytes()).hexdigest())
        for path in paths
    )
