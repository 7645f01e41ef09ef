"""A run directory as typed values: everything that the report and the terminal tables read.

1. `summary.json` is required: without it there is nothing to report (`StoreError`).
2. `records.jsonl`, `prompts.jsonl`, `features/*.json`, `plan.toml` and `manifest.json` are optional. What is
   missing or unreadable becomes a sentence in `RunData.notes`, which the report prints where the part would be.
3. Unknown extra keys of the summary are ignored, so that a newer run can be read by an older report.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clampdown.errors import ClampdownError, StoreError
from clampdown.reports.optional_parts import (
    DECISIONS,
    ClaimLine,
    FileLine,
    MethodLine,
    claim_lines,
    files_of,
    method_lines,
    read_explanation,
)
from clampdown.store import SCHEMA, read_feature_set, read_json, read_records
from clampdown.types import ArmKind, FeatureSet, Interval, Record, Verdict

SUMMARY_HINT = "the directory must be one that `clampdown demo` or `clampdown sweep` wrote and finished"
VERDICTS = frozenset(verdict.value for verdict in Verdict)


@dataclass(frozen=True, slots=True)
class GateResult:
    """How a gate's threshold was set and how often it fires. Fields that the run did not state are None.

    The guarantee speaks of prompts that are `on` (benign, or harmful for a gate that turns refusals down). `scores` are
    what the gate scored by suite, lowest first.
    """

    kind: str
    features: tuple[int, ...]
    threshold: float | None
    budget: float | None
    confidence: float | None
    n_calibration: int | None
    bound: float | None
    trigger_rates: Mapping[str, Interval] = field(default_factory=dict)
    on: str = "benign"
    branch: str = "edits"
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Category:
    """What one arm did on one category of a suite."""

    refused: Interval | None
    correct: Interval | None


@dataclass(frozen=True, slots=True)
class ArmResult:
    """One arm of the summary. `suites` maps suite -> verdict -> share; `capability` maps suite -> share correct.

    `edit_norm` is the mean of ||x' - x|| / ||x|| over edited tokens; `kl_benign` is in nats per token. `gate_fired` and
    `p_values` (exact McNemar against the baseline) are by suite, as is `changes`: the paired difference to the baseline
    on the same prompts, of right answers in capability suites and of refusals elsewhere. `gates` are those of the
    arm's plan, the second for what a two-sided plan does otherwise; `likelihood` is capability by the options'
    likelihood; `categories` are by suite and category; `plan` is the digest of what steered.
    """

    name: str
    kind: ArmKind
    strength: float | None
    suites: Mapping[str, Mapping[Verdict, Interval]]
    capability: Mapping[str, Interval]
    refused_capability: Mapping[str, Interval]
    kl_benign: Interval | None
    edit_norm: float | None
    feature: str | None
    operator: str | None
    group: str | None
    gate_fired: Mapping[str, Interval] = field(default_factory=dict)
    p_values: Mapping[str, float | None] = field(default_factory=dict)
    changes: Mapping[str, Interval] = field(default_factory=dict)
    gates: tuple[GateResult, ...] = ()
    likelihood: Mapping[str, Interval] = field(default_factory=dict)
    categories: Mapping[str, Mapping[str, Category]] = field(default_factory=dict)
    plan: str | None = None

    def rate(self, suite: str, verdict: Verdict = Verdict.REFUSED) -> Interval | None:
        return self.suites.get(suite, {}).get(verdict)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The plan that the run settled on: the unconditional arm's name and the conditional one's."""

    arm: str | None = None
    gated_arm: str | None = None
    feature: str | None = None
    strength: float | None = None
    operator: str | None = None
    strength_note: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a prompt, for showing."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class RunData:
    """All that a report shows. `prompts` maps (suite, prompt id) -> turns; `notes` says what is missing, by part.

    `screening` holds the candidates that were read from prefills, with the reason for each that was not kept.
    `tune` is how a tuned plan was searched for, as `clampdown tune` writes it. `explanation` is `explain.json`, if it
    lies there. `decisions` is how the run chose its plan and matched its controls, as the summary words it.
    """

    arms: tuple[ArmResult, ...]
    model: str
    sae: str
    chosen: Chosen = field(default_factory=Chosen)
    gate: GateResult | None = None
    strength_unit: str | None = None
    harmful_suites: tuple[str, ...] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    decisions: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    records: tuple[Record, ...] = ()
    prompts: Mapping[tuple[str, str], tuple[Turn, ...]] = field(default_factory=dict)
    feature_sets: tuple[FeatureSet, ...] = ()
    plan: Mapping[str, Any] | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    screening: tuple[Mapping[str, Any], ...] = ()
    tune: Mapping[str, Any] | None = None
    methods: tuple[MethodLine, ...] = ()
    claims: tuple[ClaimLine, ...] = ()
    matched_kl: float | None = None
    explanation: Mapping[str, Any] | None = None
    files: tuple[FileLine, ...] = ()


def read_run(directory: Path) -> RunData:
    """Read a run directory. Raises `StoreError` when `summary.json` is missing or not of this schema."""
    path = directory / "summary.json"
    if not path.is_file():
        raise StoreError(f"{directory} has no summary.json", hint=SUMMARY_HINT)
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        raise StoreError(f"{path} is not a summary of schema {SCHEMA}", hint=SUMMARY_HINT)
    optional = _Optional(directory)
    manifest = optional.read("manifest.json", read_json, None)
    try:
        return RunData(
            **_summary_fields(raw, manifest),
            records=optional.read("records.jsonl", read_records, ()),
            prompts=optional.read("prompts.jsonl", _read_prompts, {}),
            feature_sets=optional.feature_sets(),
            plan=optional.read("plan.toml", _read_toml, None),
            explanation=read_explanation(directory),
            files=files_of(directory),
            notes=optional.notes,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StoreError(f"{path} is malformed: {type(error).__name__}: {error}", hint=SUMMARY_HINT) from error


class _Optional:
    """Reads what a run may lack, and collects a sentence for each part that is missing or unreadable."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.notes: dict[str, str] = {}

    def read(self, name: str, reader: Callable[[Path], Any], absent: Any) -> Any:
        path = self._directory / name
        if not path.is_file():
            self.notes[name] = f"This run has no {name}."
            return absent
        try:
            return reader(path)
        except ClampdownError as error:
            self.notes[name] = f"{name} could not be read: {error.message}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.notes[name] = f"{name} could not be read: {error}"
        return absent

    def feature_sets(self) -> tuple[FeatureSet, ...]:
        paths = sorted((self._directory / "features").glob("*.json"))
        if not paths:
            self.notes["features"] = "This run has no feature sets."
        found = (self.read(f"features/{path.name}", _read_kept_features, None) for path in paths)
        return tuple(each for each in found if each is not None)


def _read_kept_features(path: Path) -> FeatureSet:
    return read_feature_set(path, with_columns=False)


def _read_toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _read_prompts(path: Path) -> dict[tuple[str, str], tuple[Turn, ...]]:
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
    return {(row["suite"], row["id"]): tuple(Turn(m["role"], m["content"]) for m in row["messages"]) for row in rows}


def _summary_fields(raw: Mapping[str, Any], manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    arms = tuple(_arm(row) for row in raw["arms"])
    if not arms:
        raise ValueError("it has no arms")
    chosen = raw.get("chosen") or {}
    provenance = dict(raw.get("provenance") or {})
    if manifest and "resume_key" in manifest:
        provenance.setdefault("resume_key", manifest["resume_key"])
    harmful = raw.get("harmful_suites")
    return {
        "arms": arms,
        "model": _label(raw.get("model")),
        "sae": _label(raw.get("sae")),
        "chosen": Chosen(
            chosen.get("arm"),
            chosen.get("gated_arm"),
            _name(chosen.get("feature")),
            chosen.get("strength"),
            chosen.get("operator"),
            chosen.get("strength_note") or "",
        ),
        "gate": _gate(raw.get("gate")),
        "strength_unit": raw.get("strength_unit"),
        "harmful_suites": None if harmful is None else tuple(harmful),
        "provenance": provenance,
        "decisions": {key: raw[key] for key in DECISIONS if isinstance(raw.get(key), Mapping)},
        "methods": method_lines(raw),
        "claims": claim_lines(raw),
        "matched_kl": raw.get("matched_kl"),
        "screening": tuple(raw.get("screening") or ()),
        "tune": raw["tune"] if isinstance(raw.get("tune"), Mapping) else None,
        "timings": {str(k): float(v) for k, v in (raw.get("timings") or {}).items() if _is_number(v)},
    }  # fmt: skip


def _arm(row: Mapping[str, Any]) -> ArmResult:
    try:
        kind = ArmKind(row["kind"])
    except ValueError as error:
        raise ValueError(f"arm '{row['name']}' has unknown kind '{row['kind']}'") from error
    suites = {
        suite: {Verdict(v): _interval(i) for v, i in rates.items() if v in VERDICTS and isinstance(i, Mapping)}
        for suite, rates in (row.get("suites") or {}).items()
    }
    return ArmResult(
        name=str(row["name"]),
        kind=kind,
        strength=row.get("strength"),
        suites=suites,
        capability=_intervals(row.get("capability")),
        refused_capability=_intervals(row.get("refused_capability")),
        kl_benign=_optional_interval(row.get("kl_benign")),
        edit_norm=_number(row.get("edit_norm")),
        feature=_name(row.get("feature", row.get("features"))),
        operator=row.get("operator"),
        group=row.get("group"),
        gate_fired=_intervals(row.get("gate_fired")),
        p_values={suite: pair.get("p_value") for suite, pair in (row.get("against_baseline") or {}).items()},
        changes={suite: _interval({**pair, "value": pair["difference"]})
                 for suite, pair in (row.get("against_baseline") or {}).items() if "low" in pair},
        gates=tuple(found for found in map(_gate, row.get("gates") or ()) if found is not None),
        likelihood=_intervals(row.get("capability_by_likelihood")),
        categories={suite: {name: _category(found) for name, found in rows.items()}
                    for suite, rows in (row.get("categories") or {}).items()},
        plan=row.get("plan"),
    )  # fmt: skip


def _category(raw: Mapping[str, Any]) -> Category:
    return Category(_optional_interval(raw.get("refused")), _optional_interval(raw.get("correct")))


def _interval(raw: Mapping[str, Any]) -> Interval:
    return Interval(raw["value"], raw.get("low"), raw.get("high"), int(raw.get("n") or 0))


def _intervals(raw: Mapping[str, Any] | None) -> dict[str, Interval]:
    return {name: _interval(value) for name, value in (raw or {}).items()}


def _optional_interval(raw: object) -> Interval | None:
    """A measure that is written as an interval, as a bare number, or not at all."""
    if isinstance(raw, Mapping):
        return _interval(raw)
    return Interval(float(raw), None, None, 0) if isinstance(raw, int | float) else None


def _gate(raw: Mapping[str, Any] | None) -> GateResult | None:
    if not raw:
        return None
    promised = raw.get("guarantee") or raw
    return GateResult(
        kind=str(raw.get("kind", "gate")),
        features=tuple(raw.get("features") or ()),
        threshold=raw.get("threshold"),
        budget=promised.get("budget"),
        confidence=promised.get("confidence"),
        n_calibration=promised.get("n", raw.get("n_calibration")),
        bound=promised.get("bound"),
        trigger_rates=_intervals(raw.get("trigger_rates")),
        on=str(promised.get("on") or raw.get("calibrated_on") or "benign"),
        branch=str(raw.get("branch") or "edits"),
        scores={suite: tuple(map(float, scores)) for suite, scores in (raw.get("scores") or {}).items()},
    )


def _number(raw: object) -> float | None:
    found = _optional_interval(raw)
    return None if found is None else found.value


def _name(raw: object) -> str | None:
    """One or several features as a label: 312, or 312 + 90."""
    if raw is None:
        return None
    return " + ".join(map(str, raw)) if isinstance(raw, list | tuple) else str(raw)


def _label(raw: object) -> str:
    """The model's or SAE's name, which a summary gives as a string or as a table with a name."""
    if isinstance(raw, Mapping):
        return str(raw.get("name", "unnamed"))
    return "none" if raw is None else str(raw)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
