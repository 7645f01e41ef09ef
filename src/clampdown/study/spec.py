"""A study as a TOML file: what the options of `clampdown study` say, to be kept and repeated.

    schema = 1
    name = "mine"
    model = "DIRECTORY or hub id"
    sae = "DIRECTORY or release:id"
    judge = "learned"
    size = "small"          # quick, small, medium, full; or minutes = 30

    [prompts]               # by role: a file, a public set by name, or several
    harmful = ["advbench=harmful.csv"]
    benign = "benign.jsonl"

    [placing]               # optional: device, device_map, quantise, offload
    device_map = "auto"

A file with a `method` table is a recipe: a published pipeline with everything its numbers depend on (docs/recipes.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError, field_validator

from clampdown.config import ORGANISM
from clampdown.models.placing import Placing
from clampdown.study.comparing import MatchingRequest
from clampdown.study.gating import GateChoice
from clampdown.study.methods.table import METHODS
from clampdown.study.prompts import HELD_OUT_SHARE, Composed, StudyPrompts, prompts_from
from clampdown.study.recipes.schema import field_error
from clampdown.study.run import StudyRequest
from clampdown.study.sizes import SIZES, size_named
from clampdown.study.study import Study, make_study
from clampdown.types import PromptRole, Split

Sources = tuple[str, ...]
SOURCES = (*(role.value for role in PromptRole), "mixed")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PromptsPart(_Part):
    """Prompts by role; nothing for a model that knows the embedded corpus. `hold_out` names attack families that are
    tested only; the rest is what is made of the prompts (`Composed`)."""

    harmful: Sources = ()
    jailbroken: Sources = ()
    multi_turn: Sources = ()
    borderline: Sources = ()
    benign: Sources = ()
    capability: Sources = ()
    mixed: Sources = ()
    hold_out: Sources | None = None
    folder: str | None = None
    pool: bool = False
    templates: str | None = None
    longest_template: int | None = Field(None, ge=1)
    held_out_share: float = Field(HELD_OUT_SHARE, gt=0, lt=1)
    escalate: bool = False
    wrap_benign: bool = False
    at_most: dict[str, int] = Field(default_factory=dict)
    test_at_most: dict[str, int] = Field(default_factory=dict)

    @field_validator(*SOURCES, "hold_out", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @property
    def given(self) -> bool:
        return any(getattr(self, name) for name in SOURCES)

    def load(self, name: str) -> StudyPrompts | None:
        """The prompts; None when no role has any. Raises `PromptSetError`."""
        if not self.given:
            return None
        given = {name: getattr(self, name) or None for name in SOURCES}
        folder = Path(self.folder) if self.folder else None
        composed = Composed(
            folder, self.pool, self.templates, self.longest_template, self.held_out_share, self.escalate,
            self.wrap_benign,
        )  # fmt: skip
        found = prompts_from(**given, name=name, hold_out=self.hold_out, composed=composed)
        return found.at_most(self.at_most).at_most(self.test_at_most, Split.TEST)


class GatePart(_Part):
    """What the gate promises: at most `budget` of benign prompts, at `confidence`; and how many copies of each
    prompt in random wrappers it learns from."""

    budget: float = Field(GateChoice().budget, gt=0, lt=1)
    confidence: float = Field(GateChoice().confidence, gt=0, lt=1)
    max_features: int = Field(GateChoice().max_features, ge=1)
    wrapped: int = Field(GateChoice().wrapped, ge=0)


class StudySpec(_Part):
    """One file. `methods` names what is compared (default: as the size says); `sweep` whether the found clamp is."""

    schema_version: Literal[1] = Field(1, alias="schema")
    name: str = "study"
    model: str = ORGANISM
    sae: str = ORGANISM
    dtype: str = "auto"
    judge: str | None = None
    size: str = "small"
    minutes: PositiveFloat | None = None
    seed: int = 0
    methods: tuple[str, ...] | None = None
    sweep: bool = True
    kl: float = Field(MatchingRequest().kl, gt=0)
    n_random: int | None = Field(None, ge=0)
    max_new_tokens: int | None = Field(None, ge=1)
    batch_rows: int | None = Field(None, ge=1)
    test_prompts: int | None = Field(None, ge=1)
    control_prompts: int | None = Field(None, ge=1)
    compared_prompts: int | None = Field(None, ge=1)
    validation_prompts: int | None = Field(None, ge=1)
    causal_prompts: int | None = Field(None, ge=1)
    discovery_prompts: int | None = Field(None, ge=2)
    kl_prompts: int | None = Field(None, ge=1)
    match_texts: int = Field(MatchingRequest().texts, ge=1)
    matched: tuple[str, ...] | None = None
    prompts: PromptsPart = Field(default_factory=lambda: PromptsPart.model_validate({}))
    placing: Placing = Placing()
    gate: GatePart = Field(default_factory=lambda: GatePart.model_validate({}))

    @field_validator("size")
    @classmethod
    def _size_exists(cls, value: str) -> str:
        if value not in SIZES:
            raise ValueError(f"'{value}' is not a size of study, one of: {', '.join(SIZES)}")
        return value

    @field_validator("methods", "matched")
    @classmethod
    def _methods_exist(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in value or ():
            if name not in METHODS:
                raise ValueError(f"no method is called '{name}', one of: {', '.join(METHODS)}")
        return value

    def in_folder(self, folder: Path | None) -> StudySpec:
        """With local copies of public sets in that folder, if one is given."""
        if folder is None:
            return self
        prompts = self.prompts.model_dump() | {"folder": str(folder)}
        return self.model_copy(update={"prompts": PromptsPart.model_validate(prompts)})

    def load(self) -> Study:
        """The study: model, SAE, prompts, judge. Raises whatever does not fit together."""
        data = self.prompts.load(self.name)
        placing = replace(self.placing, dtype=self.dtype) if self.placing.dtype == "auto" else self.placing
        return make_study(self.model, self.sae, data, judge=self.judge, seed=self.seed, placing=placing)

    @property
    def request(self) -> StudyRequest:
        """What is to be done."""
        sizes = size_named(self.size)
        answering = {
            "max_new_tokens": self.max_new_tokens,
            "batch_rows": self.batch_rows,
            "per_suite": self.test_prompts,
            "control_prompts": self.control_prompts,
            "compared_prompts": self.compared_prompts,
            "kl_prompts": self.kl_prompts,
        }
        stages = {
            "discovery": self.discovery_prompts,
            "validation": self.validation_prompts,
            "causal_prompts": self.causal_prompts,
            "n_random": self.n_random,
        }
        sizes = replace(sizes, **_given(stages), answering=replace(sizes.answering, **_given(answering)))
        gate = GateChoice(self.gate.budget, self.gate.confidence, self.gate.max_features, wrapped=self.gate.wrapped)
        matching = MatchingRequest(self.kl, self.match_texts, self.matched)
        return StudyRequest(sizes, self.methods, self.sweep, gate=gate, matching=matching)


def _given(values: Mapping[str, int | None]) -> dict[str, int]:
    return {name: value for name, value in values.items() if value is not None}


def parse_spec(data: Mapping[str, Any], where: str = "the study") -> StudySpec:
    """Plain data as a study. Raises `RecipeError` naming the field."""
    try:
        return StudySpec.model_validate(data)
    except ValidationError as error:
        raise field_error(error, where, "docs/study.md") from error
