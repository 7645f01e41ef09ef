"""The plan: edits, an optional gate, and where they came from. The artefact that users keep, as `plan.toml`.

A two-sided plan has a second branch, `otherwise`: edits of its own behind a gate of its own, for conversations on which
the first gate stayed shut (steer up where harmful, else down where a second gate says borderline).

A plan is data. It names features by index, vectors by value, and the exact model and SAE it was made for; it never
says how its features were found. Strengths are stored as the raw values that act, with the calibration figures that
let them be shown as multiples of the feature's p99 activation and as a share of the residual's length (`units`).

A file carries the plan's digest. One that was changed by hand says so when it is read: a threshold's guarantee and a
measured strength belong to the plan that they were measured with.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self, runtime_checkable

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    computed_field,
    field_validator,
    model_validator,
)

from clampdown.config import embedded_plan
from clampdown.documents import read_toml
from clampdown.errors import PlanError, StrengthError
from clampdown.saes.sae import FeatureSource
from clampdown.steering.gate_kinds import COMBINATIONS, GATE_KINDS
from clampdown.steering.operators import OPERATORS
from clampdown.steering.scopes import SCOPES
from clampdown.store import content_hash, write_atomic
from clampdown.types import Site

SCHEMA_VERSIONS = (1, 2, 3, 4, 5)
"""2 added gates of other kinds than `probe`, and `otherwise`; 3 added gates that read turn by turn, and `sinks`; 4
added ensembles of gates; 5 added directions whose coordinate is set, strength that grows with a gate's score, and
corrected error terms. A plan is written in the oldest version that can say it."""

_OF_SCHEMA_5 = frozenset({"clamp_direction", "floor_direction"})

MAX_EDITS = 1000
"""Edits of one branch. A large set of features is one edit; checking this many takes a tenth of a second."""


def _unpack(value: Any) -> Any:
    """Vectors are written as base64 of little-endian float32: exact, and one line whatever the width."""
    if not isinstance(value, str):
        return value
    raw = base64.b64decode(value, validate=True)
    if len(raw) % 4:
        raise ValueError(f"{len(raw)} bytes are no float32 numbers: the text was cut or changed")
    return struct.unpack(f"<{len(raw) // 4}f", raw)


def _pack(value: tuple[float, ...]) -> str:
    return base64.b64encode(struct.pack(f"<{len(value)}f", *value)).decode()


Vector = Annotated[tuple[float, ...], BeforeValidator(_unpack), PlainSerializer(_pack)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)

    def changed(self, **changes: Any) -> Self:
        """A copy with other values, checked like a new one."""
        return type(self).model_validate({**dict(self), **changes})


@runtime_checkable
class Named(Protocol):
    """What a plan needs of a model to name it."""

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> str: ...


class ModelRef(_Part):
    """The model a plan was made for. `revision` is a hub commit or a content hash."""

    name: str
    revision: str

    @classmethod
    def of(cls, lm: Named) -> Self:
        """The reference of a loaded model."""
        return cls(name=lm.name, revision=lm.revision)


class SaeRef(_Part):
    """An SAE that a plan's features index into, and the site it reads."""

    site: str
    name: str
    revision: str

    @classmethod
    def of(cls, sae: FeatureSource) -> Self:
        """The reference of a loaded SAE."""
        return cls(site=sae.cfg.site.name, name=sae.name, revision=sae.revision)


class Edit(_Part):
    """One change at one site.

    For feature operators: `features[i]` gets `strengths[i]` (raw activation units; for `scale`, the factor).
    For dense operators: `vector` names an entry of the plan's `vectors` and `strengths` has one number.
    `p99` are the features' 99th-percentile activations on the calibration prompts, and `edit_norm` this edit's mean
    ||x'-x|| / ||x|| there: for display only.
    With `error_term = "correct"` the SAE's error is passed on within the span of the orthonormal vectors that
    `correction` names, and nowhere else.
    """

    site: str
    operator: str
    strengths: tuple[float, ...]
    features: tuple[int, ...] = ()
    vector: str | None = None
    scope: str = "all"
    error_term: Literal["keep", "drop", "correct"] = "keep"
    correction: tuple[str, ...] = ()
    p99: tuple[float, ...] | None = None
    edit_norm: float | None = None

    @field_validator("site")
    @classmethod
    def _site_exists(cls, value: str) -> str:
        Site.parse(value)
        return value

    @field_validator("strengths")
    @classmethod
    def _finite(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        for strength in value:
            if not math.isfinite(strength):
                raise StrengthError(f"strength {strength} is not a finite number")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        operator = OPERATORS.get(self.operator)
        if operator is None:
            raise PlanError(f"unknown operator '{self.operator}'", hint=f"one of: {', '.join(OPERATORS)}")
        if self.scope not in SCOPES:
            raise PlanError(f"unknown scope '{self.scope}'", hint=f"one of: {', '.join(SCOPES)}")
        if (self.error_term == "correct") != bool(self.correction):
            raise PlanError("error_term 'correct' needs the names of vectors in `correction`, and no other has any")
        if operator.dense:
            self._check_dense()
        else:
            self._check_features()
        return self

    def keeping_error(self) -> Self:
        """The same with the SAE's error passed on whole."""
        return self.changed(error_term="keep", correction=())

    def _check_dense(self) -> None:
        if self.vector is None or self.features or len(self.strengths) != 1:
            raise PlanError(f"'{self.operator}' needs `vector`, exactly one strength, and no `features`")
        if self.error_term != "keep":
            raise PlanError(f"'{self.operator}' does not pass through an SAE: error_term must be 'keep'")

    def _check_features(self) -> None:
        if self.vector is not None or not self.features:
            raise PlanError(f"'{self.operator}' needs `features` and no `vector`")
        if len(self.features) != len(self.strengths):
            raise PlanError(f"{len(self.features)} features but {len(self.strengths)} strengths")
        if len(set(self.features)) != len(self.features):
            raise PlanError(f"a feature is listed twice in one edit: {list(self.features)}")
        if min(self.features) < 0:
            raise PlanError(f"feature indices start at 0, got {min(self.features)}")


class Guarantee(_Part):
    """What a gate's threshold promises: with `confidence`, at most `budget` of such prompts trigger it.

    `on` says of which prompts: benign ones, or, for a gate that turns refusals down, harmful ones.
    """

    budget: float
    confidence: float
    n: int
    triggered: int
    bound: float
    on: Literal["benign", "harmful"] = "benign"


class Gate(_Part):
    """Whether a conversation is steered at all: score = bias + sum_i weights[i] * channel_i > threshold.

    What a channel is, `kind` says (`gate_kinds.py`): feature `features[i]` under `poolings[i]`, or the plan's vector
    `vectors[i]` against the residual under `poolings[i]`. A feature or vector may appear under several poolings. An
    `external` gate has none of these and no site: its score comes from the scorer registered as `scorer`.

    With a `window` every user turn is read alone, in windows of at most so many tokens (`windows.py`); 0: the prompt as
    it stands. `turns` says which turns count, `turns_calibrated` how many windows the guarantee's conversations had,
    and `when_in_doubt` what to do with a conversation of more.

    An `ensemble` reads through its `members`, each a gate with a site of its own whose threshold counts for nothing;
    `combine` makes one score of theirs (`COMBINATIONS`). It reads turn by turn, ahead of the prompt's own pass.

    With `least` below 1 the edits behind the gate grow with its score: every change is multiplied with `factor`, which
    is `least` at the threshold and 1 from the score `full` on.
    """

    kind: Literal["feature", "probe", "dense", "cosine", "external", "ensemble"] = "probe"
    site: str = ""
    features: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    bias: float = 0.0
    threshold: float
    poolings: tuple[Literal["max", "mean", "assistant_start"], ...] = ()
    guarantee: Guarantee | None = None
    vectors: tuple[str, ...] = ()
    scorer: str | None = None
    window: int = Field(default=0, ge=0)
    turns: Literal["worst", "last"] = "worst"
    turns_calibrated: int = Field(default=0, ge=0)
    when_in_doubt: Literal["read", "steer"] = "read"
    members: tuple[Gate, ...] = ()
    combine: str = "mean"
    least: float = 1.0
    full: float | None = None

    def factor(self, score: float) -> float:
        """What the changes of edits behind this gate are multiplied with where it fires with that score."""
        if self.full is None:
            return 1.0
        share = (score - self.threshold) / (self.full - self.threshold)
        return min(max(self.least + (1 - self.least) * share, self.least), 1.0)

    @property
    def readers(self) -> tuple[Gate, ...]:
        """The gates that read the model for this one: itself, or an ensemble's members."""
        return self.members or (self,)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not all(map(math.isfinite, (*self.weights, self.bias, self.threshold))):
            raise PlanError("a gate's weights, bias and threshold must be finite")
        self._check_window()
        self._check_growth()
        self._check_members()
        if GATE_KINDS[self.kind].reads == "gates":
            self._check_ensemble()
        elif GATE_KINDS[self.kind].reads == "text":
            self._check_text()
        else:
            self._check_channels()
        return self

    def _check_window(self) -> None:
        if not self.window and (self.turns != "worst" or self.turns_calibrated or self.when_in_doubt != "read"):
            raise PlanError("`turns`, `turns_calibrated` and `when_in_doubt` are for gates with a `window`")
        if self.when_in_doubt == "steer" and not self.turns_calibrated:
            raise PlanError("when in doubt about what? `turns_calibrated` says how long a conversation may be")

    def _check_growth(self) -> None:
        if (self.full is None) != (self.least == 1.0) or not 0 <= self.least <= 1:
            raise PlanError("strength that grows with the score needs `full` and a `least` from 0 to below 1")
        if self.full is not None and not (math.isfinite(self.full) and self.full > self.threshold):
            raise PlanError(f"`full` must be a finite score above the threshold {self.threshold:g}, got {self.full:g}")

    def _check_members(self) -> None:
        if GATE_KINDS[self.kind].reads != "gates" and (self.members or self.combine != "mean"):
            raise PlanError(f"a gate of kind '{self.kind}' has no members", hint='kind = "ensemble"')
        if self.combine not in COMBINATIONS:
            raise PlanError(
                f"members cannot be combined by '{self.combine}'", hint=f"one of: {', '.join(COMBINATIONS)}"
            )
        if any(not m.site or m.window or m.guarantee or m.full is not None for m in self.members):
            raise PlanError("an ensemble's members read sites; its window, guarantee and `full` are its own")

    def _check_ensemble(self) -> None:
        own = (self.site, self.features, self.vectors, self.weights, self.poolings, self.scorer, self.bias)
        if len(self.members) < 2 or any(own) or not self.window:
            raise PlanError(
                "a gate of kind 'ensemble' needs two or more `members` and a `window`, and reads nothing else"
            )

    def _check_text(self) -> None:
        if not self.scorer or self.site or self.features or self.vectors or self.weights or self.poolings:
            raise PlanError(f"a gate of kind '{self.kind}' needs `scorer` and a threshold, and reads nothing else")

    def _check_channels(self) -> None:
        kind, on_residual = GATE_KINDS[self.kind], GATE_KINDS[self.kind].reads == "residual"
        Site.parse(self.site)
        read, unread, what = (
            (self.vectors, self.features, "vector") if on_residual else (self.features, self.vectors, "feature")
        )
        if not read or len({len(read), len(self.weights), len(self.poolings)}) != 1:
            raise PlanError(
                f"a gate needs one weight and one pooling per {what}, got {len(read)} {what}s, "
                f"{len(self.weights)} weights and {len(self.poolings)} poolings"
            )
        if unread or self.scorer:
            raise PlanError(f"a gate of kind '{self.kind}' reads {what}s and nothing else")
        if kind.single and len(read) != 1:
            raise PlanError(f"a gate of kind '{self.kind}' reads one {what}, got {len(read)}")
        for pooling in self.poolings:
            if pooling not in kind.poolings:
                raise PlanError(
                    f"a gate of kind '{self.kind}' cannot pool by '{pooling}'",
                    hint=f"one of: {', '.join(kind.poolings)}",
                )


_ADDED_TO_GATES = {
    "vectors": [],
    "scorer": None,
    "window": 0,
    "turns": "worst",
    "turns_calibrated": 0,
    "when_in_doubt": "read",
    "members": [],
    "combine": "mean",
    "least": 1.0,
    "full": None,
}
"""Fields of later schemas with the values that mean what schema 1 meant, as JSON."""


@runtime_checkable
class GatedBy(Protocol):
    """A gate with the dense vectors that it reads, which belong into the plan."""

    @property
    def gate(self) -> Gate: ...

    @property
    def vectors(self) -> Mapping[str, Sequence[float]]: ...


class Branch(_Part):
    """Edits behind a gate of their own."""

    gate: Gate
    edits: tuple[Edit, ...] = Field(max_length=MAX_EDITS)


class Plan(_Part):
    """Edits + gate + provenance. Frozen; `digest` identifies what it does.

    `otherwise` acts on a conversation whose `gate` stayed shut and whose own gate fires; never both. Attention sinks
    are neither edited nor read, unless they are to be included, as published forms do (`activations/sinks.py`).
    """

    name: str
    model: ModelRef
    saes: tuple[SaeRef, ...] = ()
    edits: tuple[Edit, ...] = Field(max_length=MAX_EDITS)
    gate: Gate | None = None
    otherwise: Branch | None = None
    vectors: dict[str, Vector] = Field(default_factory=dict)
    provenance: dict[str, str] = Field(default_factory=dict)
    sinks: Literal["leave_out", "include"] = "leave_out"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.otherwise and not self.gate:
            raise PlanError(
                "`otherwise` acts where the plan's gate stays shut: a plan without a gate has no use for it"
            )
        sites = {ref.site for ref in self.saes}
        reading = [reader for gate in self.gates for reader in gate.readers]
        readers: list[Edit | Gate] = [*self.all_edits, *reading]
        for site, features in ((reader.site, reader.features) for reader in readers):
            if features and site not in sites:
                raise PlanError(f"features at {site} need an entry of `saes` for that site")
        named = [edit.vector for edit in self.all_edits if edit.vector is not None]
        named += [name for edit in self.all_edits for name in edit.correction]
        for vector in (*named, *(name for reader in reading for name in reader.vectors)):
            if vector not in self.vectors:
                raise PlanError(f"vector '{vector}' is not among the plan's vectors {sorted(self.vectors)}")
        for reader in reading:
            if reader.site:
                self._gate_below_edits(Site.parse(reader.site))
        return self

    def _gate_below_edits(self, gate_site: Site) -> None:
        """One pass must decide before it edits, from activations that no edit has changed."""
        order = ("resid_pre", "attn_out", "mlp_out", "resid_post")
        for edit in self.all_edits:
            site = Site.parse(edit.site)
            if (gate_site.layer, order.index(gate_site.point)) > (site.layer, order.index(site.point)):
                raise PlanError(f"the gate reads {gate_site}, above the edit at {site}: it would decide too late")

    @classmethod
    def of(cls, lm: Named, saes: Sequence[FeatureSource], edits: Sequence[Edit], name: str, **more: Any) -> Self:
        """A plan for a loaded model and SAEs."""
        refs = tuple(SaeRef.of(sae) for sae in saes)
        return cls(name=name, model=ModelRef.of(lm), saes=refs, edits=tuple(edits), **more)

    def named(self, name: str) -> Self:
        """The same under another name."""
        return self.changed(name=name)

    def ungated(self) -> Self:
        """What the plan does where its gate fires, done everywhere. A second branch acts where these edits do not, and
        is left out."""
        return self.changed(gate=None, otherwise=None)

    def behind(self, gate: Gate | GatedBy, name: str | None = None) -> Self:
        """The plan's edits behind a gate, in place of its own."""
        found, vectors = (gate, {}) if isinstance(gate, Gate) else (gate.gate, gate.vectors)
        return self.changed(
            name=name or f"{self.name} gated",
            gate=found,
            otherwise=None,
            vectors={**self.vectors, **{key: tuple(value) for key, value in vectors.items()}},
        )

    @property
    def up_first(self) -> bool:
        """Whether the side that raises refusals is asked first. A gate of the other side reads the last turn."""
        return self.gate is None or self.gate.turns == "worst"

    def raising(self) -> Self:
        """The side that raises refusals alone, behind its own gate."""
        if self.otherwise is None or self.up_first:
            return self.changed(otherwise=None)
        return self.changed(edits=self.otherwise.edits, gate=self.otherwise.gate, otherwise=None)

    @property
    def all_edits(self) -> tuple[Edit, ...]:
        """The edits of every branch."""
        return self.edits + (self.otherwise.edits if self.otherwise else ())

    @property
    def gates(self) -> tuple[Gate, ...]:
        """The gates of every branch, in the branches' order; none for a plan that always steers."""
        own = (self.gate,) if self.gate else ()
        return own + ((self.otherwise.gate,) if self.otherwise else ())

    @property
    def sites(self) -> frozenset[str]:
        """Where the plan edits, and where its gates read."""
        read = (reader.site for gate in self.gates for reader in gate.readers)
        return frozenset(e.site for e in self.all_edits) | frozenset(site for site in read if site)

    @property
    def branches(self) -> tuple[tuple[Edit, ...], ...]:
        """The edits of each branch: one for most plans, two for a two-sided one."""
        return (self.edits, self.otherwise.edits) if self.otherwise else (self.edits,)

    @computed_field
    @property
    def schema_version(self) -> int:
        """The oldest version of the format that can say what this plan says."""
        if any(e.operator in _OF_SCHEMA_5 or e.correction for e in self.all_edits):
            return 5
        if any(gate.full is not None for gate in self.gates):
            return 5
        if any(gate.members for gate in self.gates):
            return 4
        if self.sinks != "leave_out" or any(gate.window for gate in self.gates):
            return 3
        added = self.otherwise or any(g.kind != "probe" or g.vectors or g.scorer for g in self.gates)
        return 2 if added else 1

    @property
    def is_identity(self) -> bool:
        """Whether every edit is neutral, so that this plan leaves every input as it is."""
        return all(
            edit.error_term == "keep" and all(s == OPERATORS[edit.operator].neutral for s in edit.strengths)
            for edit in self.all_edits
        )

    @property
    def digest(self) -> str:
        """Hash of everything that changes what the plan does (not its name, its provenance or what is for display)."""
        shown = {"__all__": {"p99", "edit_norm"}}
        hidden: Any = {"name": True, "provenance": True, "edits": shown, "otherwise": {"edits": shown}}
        return content_hash(_as_of(self.schema_version, self.model_dump(mode="json", exclude=hidden)))


def _as_of(version: int, data: dict[str, Any]) -> dict[str, Any]:
    """A plan's plain data as that version of the format has it, so that a digest outlives later versions."""
    whole = list(filter(None, [data["gate"], data["otherwise"] and data["otherwise"]["gate"]]))
    for gate in [*whole, *(member for each in whole for member in each["members"])]:
        for key, neutral in _ADDED_TO_GATES.items():
            if gate.get(key) == neutral:
                gate.pop(key)
        if (gate.get("guarantee") or {}).get("on") == "benign":
            gate["guarantee"].pop("on")
    for edit in [*data["edits"], *(data["otherwise"] or {"edits": []})["edits"]]:
        if not edit["correction"]:
            del edit["correction"]
    if data["sinks"] == "leave_out":
        del data["sinks"]
    if data["otherwise"] is None:
        del data["otherwise"]
    return {**data, "schema_version": version}


_SHOWN = 10
"""Faults of one plan in a message."""


def parse_plan(data: dict[str, Any], source: str = "plan") -> Plan:
    """Validate plain data; a `digest` in it must be the plan's. Every way to be wrong is a `PlanError` that says
    where."""
    stated = data.get("digest")
    plan = _validated({key: value for key, value in data.items() if key != "digest"}, source)
    if stated is not None and stated != plan.digest:
        raise PlanError(
            f"{source} was changed after it was made: its digest is {plan.digest}, it says {stated}",
            hint="delete its `digest` line to use it as it is now; what was measured with the old plan is not about it",
        )
    return plan


def _validated(data: dict[str, Any], source: str) -> Plan:
    version = data.get("schema_version")
    if not isinstance(version, int) or version not in SCHEMA_VERSIONS:
        known = " and ".join(map(str, SCHEMA_VERSIONS))
        raise PlanError(f"{source}: schema_version is {version!r}, this clampdown reads {known}")
    try:
        return Plan.model_validate({key: value for key, value in data.items() if key != "schema_version"})
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'plan'}: {e['msg']}" for e in error.errors()[:_SHOWN]]
        lines += [f"and {error.error_count() - _SHOWN} more"] if error.error_count() > _SHOWN else []
        raise PlanError(f"{source} is not a valid plan:\n  " + "\n  ".join(lines)) from error
    except PlanError as error:
        raise type(error)(f"{source}: {error.message}", hint=error.hint) from error


def read_plan(path: Path) -> Plan:
    """Read a `plan.toml`, or a plan of the embedded model by its name. Raises `PlanError`."""
    found = path if path.exists() else embedded_plan(str(path)) or path
    return parse_plan(read_toml(found, PlanError), str(path))


def write_plan(path: Path, plan: Plan) -> None:
    """Write a `plan.toml` that reads back equal, with its digest."""
    data = _as_of(plan.schema_version, plan.model_dump(mode="json"))
    version = data.pop("schema_version")
    write_atomic(path, tomli_w.dumps({"schema_version": version, "digest": plan.digest, **_stated(data)}))


def _stated(data: Any) -> Any:
    """Without what is None: TOML has no word for it."""
    if isinstance(data, dict):
        return {key: _stated(value) for key, value in data.items() if value is not None}
    return [_stated(item) for item in data] if isinstance(data, list) else data
