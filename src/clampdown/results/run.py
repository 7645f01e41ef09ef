"""A run: arms on suites, with everything that was measured. The one schema that is written and read.

1. `summary.json` is the run itself; what lies beside it (records, prompts, features, plans) is read when asked for.
2. Schema 2 added `suites` and `left_out`, and paired changes of broken replies; schema 1 is read as well.
3. A run shows itself: as a table in a notebook or a terminal, as a data frame, as a report. What draws it lives in
   packages above this one and is found by name when it is called (`views`), so that reading a run needs none of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError

from clampdown.documents import read_json
from clampdown.errors import StoreError
from clampdown.notebook import html_table
from clampdown.results import views
from clampdown.results.directory import FileLine, Prompts, RunDirectory
from clampdown.results.frames import frame_of
from clampdown.results.points import NOTHING, Frontier, Point, Sides, point, shown, sides_of
from clampdown.results.rows import (
    ArmResult,
    Chosen,
    ClaimLine,
    GateRow,
    LeftOut,
    MethodLine,
    Part,
    ScreenedRow,
    SuiteRow,
    Tuning,
)
from clampdown.store import to_jsonable, write_json
from clampdown.types import ArmKind, FeatureSet, Interval, Provenance, Record

SCHEMA = 2
READ_SCHEMAS = (1, 2)
SUMMARY = "summary.json"
HINT = "the directory must be one that clampdown wrote and finished, such as `clampdown demo --out DIR`"


class Run(Part):
    """Arms on suites. `strength_unit` says what the arms' strengths are in; `harmful_suites` names the suites where
    refusing is right; `left_out` is what too few prompts, or a role without prompts, could not show."""

    schema_version: Literal[1, 2] = Field(alias="schema")
    model: str = "none"
    sae: str | None = None
    suites: tuple[SuiteRow, ...] = ()
    harmful_suites: tuple[str, ...] | None = None
    arms: tuple[ArmResult, ...] = Field(min_length=1)
    timings: dict[str, float] = Field(default_factory=dict)
    provenance: Provenance | None = None
    left_out: tuple[LeftOut, ...] = ()
    split: str | None = None
    strength_unit: str | None = None
    chosen: Chosen = Field(default_factory=Chosen)
    gate: GateRow | None = None
    tune: Tuning | None = None
    controls: dict[str, Any] = Field(default_factory=dict)
    screening: tuple[ScreenedRow, ...] = ()
    methods: tuple[MethodLine, ...] = ()
    matched_kl: float | None = None
    claims: tuple[ClaimLine, ...] = ()
    recipe: dict[str, Any] = Field(default_factory=dict)

    _directory: RunDirectory | None = PrivateAttr(default=None)
    _records: tuple[Record, ...] = PrivateAttr(default=())

    @classmethod
    def parse(cls, raw: Any, source: str = "the summary") -> Run:
        """Check plain data against the schema. Raises `StoreError` naming the place."""
        if not isinstance(raw, Mapping) or raw.get("schema") not in READ_SCHEMAS:
            stated = raw.get("schema") if isinstance(raw, Mapping) else None
            raise StoreError(f"{source} is not a run's summary of schema 1 or 2 (it says {stated})", hint=HINT)
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "top level"
            raise StoreError(f"{source} is malformed: {place}: {first['msg']}", hint=HINT) from error

    @classmethod
    def read(cls, directory: Path | str) -> Run:
        """A finished run's directory. Raises `StoreError` when its summary is missing, malformed or of another kind."""
        path = Path(directory) / SUMMARY
        if not path.is_file():
            raise StoreError(f"{directory} has no {SUMMARY}", hint=HINT)
        return cls.parse(read_json(path), str(path)).at(Path(directory))

    def write(self, directory: Path | str) -> Run:
        """Write `summary.json`; returns the run as it lies there. Raises `StoreError`."""
        write_json(Path(directory) / SUMMARY, self.parse(self.to_json()).to_json())
        return self.at(Path(directory))

    def to_json(self) -> dict[str, Any]:
        """The content of `summary.json` as plain values."""
        return to_jsonable(self.model_dump(mode="json", by_alias=True, exclude_unset=True, warnings=False))

    def with_parts(self, **parts: Any) -> Run:
        """The same run with further parts (methods, claims, tune, ...), checked. Raises `StoreError`."""
        return self.parse({**self.to_json(), **to_jsonable(parts)})._beside(self)

    def at(self, directory: Path) -> Run:
        """The same run with what lies in a directory beside it."""
        found = self.model_copy()
        found._directory = RunDirectory(directory)
        return found

    def holding(self, records: Sequence[Record]) -> Run:
        """The same run with its records in memory, for runs that no directory keeps."""
        found = self.model_copy()
        found._records = tuple(records)
        return found

    def _beside(self, other: Run) -> Run:
        self._directory, self._records = other._directory, other._records
        return self

    # ---- what lies beside the summary -----------------------------------------------------------------

    @property
    def directory(self) -> Path | None:
        """Where the run lies; None while it is in memory only."""
        return self._directory.path if self._directory else None

    @property
    def records(self) -> tuple[Record, ...]:
        """Every judged reply."""
        return self._records or (self._directory.records if self._directory else ())

    @property
    def prompts(self) -> Prompts:
        return self._directory.prompts if self._directory else {}

    @property
    def feature_sets(self) -> tuple[FeatureSet, ...]:
        return self._directory.feature_sets if self._directory else ()

    @property
    def plan(self) -> Mapping[str, Any] | None:
        """`plan.toml` as plain values: the plan that the run settled on."""
        return self._directory.plan if self._directory else None

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The key of everything that could have changed a result."""
        return self._directory.manifest if self._directory else {}

    @property
    def explanation(self) -> Mapping[str, Any] | None:
        return self._directory.explanation if self._directory else None

    @property
    def corrected(self) -> Mapping[str, Any] | None:
        return self._directory.corrected if self._directory else None

    @property
    def files(self) -> tuple[FileLine, ...]:
        return self._directory.files if self._directory else ()

    @property
    def notes(self) -> Mapping[str, str]:
        """A sentence for each file that is missing or could not be read."""
        return self._directory.notes if self._directory else {}

    # ---- its arms -----------------------------------------------------------------------------------------

    def arm(self, which: Any) -> ArmResult:
        """The arm of that name, or of that plan (by its name, else by its digest). Raises `StoreError`."""
        name = which if isinstance(which, str) else getattr(which, "name", None)
        by_name = [arm for arm in self.arms if arm.name == name]
        digest = None if isinstance(which, str) else getattr(which, "digest", None)
        found = by_name or [arm for arm in self.arms if digest is not None and arm.plan == digest]
        if not found:
            raise StoreError(
                f"the run has no arm '{name or which}'", hint=f"arms: {', '.join(repr(arm.name) for arm in self.arms)}"
            )
        return found[0]

    @property
    def baseline(self) -> ArmResult | None:
        return next((arm for arm in self.arms if arm.kind is ArmKind.BASELINE), None)

    @property
    def sides(self) -> Sides:
        """The suites by what is right to do."""
        return sides_of(self.arms, self.harmful_suites)

    @property
    def points(self) -> tuple[Point, ...]:
        """Every arm's place in the trade-off."""
        sides = self.sides
        return tuple(point(arm, sides) for arm in self.arms)

    # ---- how it shows itself ---------------------------------------------------------------------------------

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`, a row per arm and suite. Raises `MissingPackageError` without pandas."""
        return frame_of(self.arms, self.sides)

    def frontier(self) -> Frontier:
        """The arms that no other beats on refusal and capability at once, with intervals; a figure in notebooks."""
        return Frontier(tuple(p for p in self.points if p.arm.frontier.pareto), self)

    def compare(self, first: Any, second: Any) -> Any:
        """Two arms (names or plans) on the same prompts, suite by suite: paired differences with intervals and exact
        McNemar's p, from the records. Raises `StoreError` for an arm that is not there, or when there are no records.
        """
        names = self.arm(first).name, self.arm(second).name
        if not self.records:
            raise StoreError("this run has no records to compare arms by", hint="records.jsonl belongs beside it")
        order = {suite: i for i, suite in enumerate(self.suite_names)}
        records = sorted(self.records, key=lambda record: order.get(record.suite, len(order)))
        return views.find("compare")(records, *names)

    def report(self, out: Path | str | None = None) -> Path:
        """Write `report.html`, into the run's directory or `out` (a directory, or a file that ends in .html)."""
        if out is None and self.directory is None:
            raise StoreError("this run lies in no directory", hint="say where: run.report(DIRECTORY)")
        target = Path(out) if out is not None else self.directory
        return views.find("report")(self, target)

    def __repr__(self) -> str:
        where = f" in {self.directory}" if self.directory else ""
        return f"Run({self.model}, {len(self.arms)} arms on {len(self.suite_names)} suites{where})"

    __str__ = __repr__

    @property
    def suite_names(self) -> tuple[str, ...]:
        sides = self.sides
        return (*sides.harmful, *sides.answerable, *sides.capability)

    def _repr_html_(self) -> str:
        sides = self.sides
        headings = ["arm", *(f"{s}\nrefused" for s in (*sides.harmful, *sides.answerable))]
        headings += [f"{s}\nright" for s in sides.capability]
        rows = ([arm.name, *map(shown, _rates(arm, sides))] for arm in self.arms)
        return html_table(headings, rows, f"{self!r}: per cent, [95 % interval], n")

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield views.find("terminal")(self, options.max_width)


def _rates(arm: ArmResult, sides: Sides) -> list[Interval]:
    refused = [arm.rate(suite) or NOTHING for suite in (*sides.harmful, *sides.answerable)]
    return [*refused, *(arm.capability.get(suite) or NOTHING for suite in sides.capability)]
