"""What else moved, as data: one row per measure and plan, what was not measured and why. No torch.

A row says "moved" when the paired test holds after Holm's correction over all of the plan's measures, "did not move"
when the whole interval lies within the margin, "same" when no item differed at all, and else "unclear". What was not
measured has a row too, and no sentence here or anywhere says anything about it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from clampdown.documents import from_json, read_object
from clampdown.errors import StoreError
from clampdown.notebook import html_table, pandas
from clampdown.store import to_jsonable, write_json
from clampdown.types import Interval

SCHEMA, KIND, FILE = 1, "side-effects", "summary.json"
ALPHA, MARGIN = 0.05, 0.1
"""A moved measure's adjusted p-value at most, and how far what did not move may be from the baseline at most."""


class Unit(StrEnum):
    """What a measure counts."""

    SHARE = "share"  # of items with the outcome: yes or no each
    SCORE = "score"  # between 0 and 1, or about so
    NATS = "nats"
    TOKENS = "tokens"


class Mark(StrEnum):
    """What a measure showed."""

    MOVED = "moved"
    HELD = "did not move"
    SAME = "same"
    UNCLEAR = "unclear"


@dataclass(frozen=True, slots=True)
class Effect:
    """One measure under one plan. `difference` is steered minus baseline on the same items; `p_holm` is adjusted over
    all measures of the plan (None: no item differed). `worse` says which way is worse: "up", "down", or neither."""

    arm: str
    kind: str
    aspect: str
    measure: str
    unit: Unit
    worse: str
    baseline: Interval
    steered: Interval
    difference: Interval
    p_value: float | None
    p_holm: float | None
    mark: Mark

    @property
    def worsened(self) -> bool:
        """Whether it moved, and the worse way."""
        up = (self.difference.value or 0.0) > 0
        return self.mark is Mark.MOVED and self.worse == ("up" if up else "down")


@dataclass(frozen=True, slots=True)
class NotMeasured:
    """Something that nothing is known about, and why. `arm` is empty where it is so for every plan."""

    kind: str
    aspect: str
    why: str
    arm: str = ""


@dataclass(frozen=True, slots=True)
class Steered:
    """A plan that was measured. `fired` is the share of generated replies on which its gate fired."""

    name: str
    digest: str
    fired: Interval | None = None


@dataclass(frozen=True, slots=True)
class SideEffects:
    """What `clampdown side-effects` found. `first_words` counts how replies begin: arm -> word -> replies."""

    model: str
    revision: str
    judge: str
    seed: int
    margin: float
    arms: tuple[Steered, ...]
    effects: tuple[Effect, ...]
    not_measured: tuple[NotMeasured, ...]
    code: str = ""
    prompts_hash: str = ""
    first_words: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def of(self, arm: str) -> tuple[Effect, ...]:
        """The rows of one plan."""
        return tuple(effect for effect in self.effects if effect.arm == arm)

    def missing(self, arm: str) -> tuple[NotMeasured, ...]:
        """What was not measured on one plan."""
        return tuple(row for row in self.not_measured if row.arm in ("", arm))

    def sentence(self, arm: str) -> str:
        """What was seen of one plan, and how much was not looked at."""
        rows, missing = self.of(arm), self.missing(arm)
        counts = Counter(row.mark for row in rows)
        worse = sum(row.worsened for row in rows)
        notes = {Mark.MOVED: f" ({worse} for the worse)" if worse else ""}
        said = [f"{counts[mark]} {mark.value}{notes.get(mark, '')}" for mark in Mark if counts[mark]]
        text = f"Of {len(rows)} measures {', '.join(said)}." if rows else "Nothing was measured."
        names = ", ".join(dict.fromkeys(row.aspect for row in missing))
        return text + (f" Not measured, so nothing is known of it: {names}." if missing else "")

    def __repr__(self) -> str:
        return "SideEffects(" + " | ".join(f"{arm.name}: {self.sentence(arm.name)}" for arm in self.arms) + ")"

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`, a row per plan and measure. Raises `MissingPackageError` without pandas."""
        return pandas().DataFrame([_flat(effect) for effect in self.effects])

    def _repr_html_(self) -> str:
        headings = ("plan", "aspect", "measure", "n", "baseline", "steered", "difference [95 %]", "p (Holm)", "")
        rows = [
            (e.arm, e.aspect, e.measure, str(e.difference.n), f"{e.baseline:.2f}", f"{e.steered:.2f}",
             e.difference.signed, "" if e.p_holm is None else f"{e.p_holm:.3f}", e.mark.value)
            for e in self.effects
        ]  # fmt: skip
        caption = " ".join(f"{arm.name}: {self.sentence(arm.name)}" for arm in self.arms)
        return html_table(headings, rows, caption)

    def to_json(self) -> dict[str, Any]:
        """As its file holds it."""
        return {"schema": SCHEMA, "kind": KIND, **to_jsonable(self)}

    def write(self, directory: Path) -> Path:
        """Into `summary.json` of a directory."""
        write_json(directory / FILE, self.to_json())
        return directory / FILE

    @classmethod
    def read(cls, path: Path) -> SideEffects:
        """From a directory or a file. Raises `StoreError` for other files and other schema versions."""
        file = path / FILE if path.is_dir() else path
        raw = read_object(file)
        if raw.get("kind") != KIND or raw.get("schema") != SCHEMA:
            raise StoreError(f"{file} is no summary of side effects of schema {SCHEMA}", hint="run it again")
        fields = {name: value for name, value in raw.items() if name not in ("kind", "schema")}
        try:
            return from_json(cls, fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(f"{file} is no summary of side effects: {error!r}") from error


def _flat(effect: Effect) -> dict[str, Any]:
    """One row of the frame; what is not known is NaN, never 0."""
    bounds = {"difference": effect.difference.value, "low": effect.difference.low, "high": effect.difference.high}
    numbers = {"baseline": effect.baseline.value, "steered": effect.steered.value, **bounds,
               "p_value": effect.p_value, "p_holm": effect.p_holm}  # fmt: skip
    return {
        "arm": effect.arm, "kind": effect.kind, "aspect": effect.aspect, "measure": effect.measure,
        "unit": effect.unit.value, "n": effect.difference.n,
        **{name: float("nan") if value is None else value for name, value in numbers.items()},
        "mark": effect.mark.value, "worse": effect.worse,
    }  # fmt: skip


def marked(unit: Unit, baseline: Interval, difference: Interval, p_holm: float | None, margin: float) -> Mark:
    """What a measure showed. The margin is absolute for shares and scores, a part of the baseline for other units."""
    if p_holm is not None and p_holm <= ALPHA:
        return Mark.MOVED
    if p_holm is None and difference.n:
        return Mark.SAME
    if difference.low is None or difference.high is None:
        return Mark.UNCLEAR
    room = margin if unit in (Unit.SHARE, Unit.SCORE) else margin * abs(baseline.value or 0.0)
    return Mark.HELD if -room <= difference.low and difference.high <= room else Mark.UNCLEAR


def kinds_of(effects: Sequence[Effect]) -> tuple[str, ...]:
    """The kinds in their order."""
    return tuple(dict.fromkeys(effect.kind for effect in effects))
