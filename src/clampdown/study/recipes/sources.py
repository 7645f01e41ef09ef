"""Which prompts a recipe reads: NAME, NAME=FILE or FILE, and a slice of it, such as `xstest-unsafe[:100]`.

    organism:harmful[:24]            a suite of the embedded corpus, on the split of the role that it serves
    wildguardtest-harmful-plain      a suite of the table (clampdown suites list); the end names a part of the set
    gsm8k=data/test.jsonl[::4]       the same set from a local copy, every fourth row
    mine.jsonl                       a file of our own columns that holds one suite

Slices of one set are how validation prompts stay apart from test prompts, so roles are compared by what they slice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from clampdown.config import ORGANISM
from clampdown.errors import PromptSetError
from clampdown.evaluation.catalog import ENTRIES, SuiteEntry, entry, load_suites
from clampdown.evaluation.rows import READERS
from clampdown.types import Split, Suite

UNBOUNDED = 1_000_000
"""Stands for the end of a set whose size is not known."""
_SOURCE = re.compile(r"(?P<spec>[^\[\]]+)(\[(?P<slice>\d*:\d*(:[1-9]\d*)?)\])?")


@dataclass(frozen=True, slots=True)
class Source:
    """A set and the slice of it that is read."""

    spec: str
    start: int = 0
    stop: int | None = None
    step: int = 1

    @classmethod
    def parse(cls, text: str) -> Source:
        """Raises `PromptSetError` for text of another form, and for a slice that is empty."""
        match = _SOURCE.fullmatch(text.strip())
        if match is None:
            raise PromptSetError(f"'{text}' is no source of prompts", hint="NAME, NAME=FILE or FILE, with [start:stop]")
        start, stop, step = [int(part) if part else None for part in f"{match['slice'] or ':'}:".split(":")[:3]]
        found = cls(match["spec"].strip(), start or 0, stop, step or 1)
        if stop is not None and found.start >= stop:
            raise PromptSetError(f"'{text}' reads no prompts", hint="a slice is [start:stop], counted from 0")
        return found

    @property
    def name(self) -> str:
        """What the set is called, wherever its copy lies."""
        return self.spec.partition("=")[0]

    @property
    def path(self) -> Path | None:
        """The local copy, if one was given."""
        name, given, path = self.spec.partition("=")
        if given:
            return Path(path)
        return Path(name) if Path(name).suffix.lower() in READERS else None

    @property
    def embedded(self) -> str | None:
        """The suite of the embedded corpus, if it is one."""
        corpus, colon, suite = self.name.partition(":")
        return suite if colon and corpus == ORGANISM else None

    def positions(self, n: int | None) -> range:
        """The rows that are read of a set of `n` (None: not known)."""
        end = n if n is not None else UNBOUNDED
        return range(self.start, min(self.stop if self.stop is not None else end, end), self.step)

    def count(self, n: int | None) -> int | None:
        """How many prompts that is; None when nothing bounds it."""
        return None if n is None and self.stop is None else len(self.positions(n))

    def overlaps(self, other: Source) -> bool:
        """Whether both read a row of the same set. Splits of the embedded corpus have no prompt in common."""
        if self.name != other.name or self.embedded:
            return False
        return bool(set(self.positions(None)) & set(other.positions(None)))

    def __str__(self) -> str:
        stop = "" if self.stop is None else str(self.stop)
        cut = f"[{self.start or ''}:{stop}{f':{self.step}' if self.step > 1 else ''}]"
        return self.spec if cut == "[:]" else self.spec + cut


def entry_of(source: Source) -> SuiteEntry:
    """The table's row for a public set or a part of one. Raises `PromptSetError` for one that is not there."""
    fitting = [e for e in ENTRIES if source.name == e.name or source.name.startswith(f"{e.name}-")]
    if not fitting:
        return entry(source.name)
    found = max(fitting, key=lambda e: len(e.name))
    part = source.name.removeprefix(found.name).removeprefix("-")
    if part not in (found.parts or ("",)):
        known = ", ".join(f"{found.name}-{name}" for name in found.parts) or f"{found.name} itself"
        raise PromptSetError(f"'{found.name}' has no part '{part}'", hint=f"one of: {known}")
    return found


def embedded_names() -> tuple[str, ...]:
    """The suites of the embedded corpus."""
    from clampdown.organism.suites import RECIPES

    return tuple(recipe.name for recipe in RECIPES)


def check(source: Source) -> str:
    """What the source is, in words, from what can be known offline. Raises `PromptSetError`."""
    if source.embedded is not None:
        if source.embedded not in embedded_names():
            raise PromptSetError(
                f"no embedded suite '{source.embedded}'", hint=f"one of: {', '.join(embedded_names())}"
            )
        return "embedded corpus"
    if source.path is not None and source.path.exists():
        return f"local file, {len(_from_set(source).prompts):,} prompts"
    if source.path is not None and "=" not in source.spec:
        raise PromptSetError(f"no file {source.path}", hint="give a path that exists, or a suite by name")
    found = entry_of(source)
    if source.path is not None:
        raise PromptSetError(f"no file {source.path} for '{found.name}'", hint="leave =FILE out to get it from the hub")
    if found.in_package is not None:
        return f"data of the package {found.in_package.package}"
    return " ".join(filter(None, (found.hub, found.config, found.split, "(gated)" if found.gated else "")))


def size(source: Source) -> int | None:
    """How many prompts will be read, as far as known offline; of a part of a set, at most this many."""
    if source.embedded is not None:
        return source.count(None)
    if source.path is not None:
        return source.count(len(_from_set(source).prompts))
    return source.count(entry_of(source).rows)


@dataclass(frozen=True, slots=True)
class Whole:
    """The set that a source is a part of, and its size if that is known."""

    name: str
    rows: int | None


def whole(source: Source) -> Whole:
    """Raises `PromptSetError` for a set that is not in the table."""
    if source.embedded is not None or source.path is not None:
        return Whole(source.spec, None)
    found = entry_of(source)
    return Whole(found.name, found.rows)


def load(source: Source, name: str, split: Split, seed: int) -> Suite:
    """The prompts as a suite called `name`. Raises `PromptSetError` when there are none."""
    embedded = source.embedded
    found = _from_set(source) if embedded is None else _embedded(embedded, source, split, seed)
    kept = [found.prompts[i] for i in source.positions(len(found.prompts))]
    if not kept:
        raise PromptSetError(f"'{source}' reads no prompts: the set has {len(found.prompts)}", hint="mend its slice")
    return Suite(name, found.kind, found.harmful, tuple(replace(p, suite=name, split=split) for p in kept))


def _embedded(name: str, source: Source, split: Split, seed: int) -> Suite:
    from clampdown.organism.suites import one_suite

    return one_suite(name, split, source.stop, seed)


def _from_set(source: Source) -> Suite:
    """The suite of that name among those of its set, which is read once however many parts of it are asked for."""
    if source.path is not None and "=" not in source.spec:
        first, *others = _loaded(str(source.path))
        if others:
            raise PromptSetError(f"{source.path} holds {1 + len(others)} suites", hint="give a file of one suite")
        return first
    base = entry_of(source).name
    suites = _loaded(base if source.path is None else f"{base}={source.path}")
    found = {suite.name: suite for suite in suites}
    if source.name not in found:
        raise PromptSetError(f"'{source.spec}' holds no prompts of '{source.name}'", hint=f"it has: {', '.join(found)}")
    return found[source.name]


_loaded: Callable[[str], tuple[Suite, ...]] = cache(load_suites)
