"""A recipe: one published pipeline on one model, with everything that its numbers depend on. A TOML file.

Two kinds of pipeline, after the papers (docs/recipes.md):

    single-prompt-clamp   O'Brien et al., 2411.11296: candidates from one refusal, each clamped, the best kept
    contrast-refine       Bhargav & Zhu, 2511.00029: contrast score, strengths of both signs, refinement

Unknown keys are errors. What the authors did not publish stays open: `to_be_given` says what is missing and why, and
the user gives it with `--set`. `ours` lists what the paper leaves open and this file decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from clampdown.documents import parse_toml
from clampdown.documents import read_toml as read_document
from clampdown.errors import ClampdownError, RecipeError
from clampdown.evaluation.judges.table import DEFAULT
from clampdown.evaluation.multiturn import Rules
from clampdown.steering.operators import OPERATORS
from clampdown.steering.scopes import SCOPES
from clampdown.steering.units import Strength, Unit
from clampdown.study.recipes.sources import Source
from clampdown.types import Site

PUBLISHED = Path(__file__).parent / "published"
STUDIES = Path(__file__).parent / "studies"
"""Recipes of the two papers; studies of public models with everything that their numbers depend on."""
ROLES = ("discovery", "validation", "calibration", "test")
CLAMP_UNITS = (Unit.RAW, Unit.MAX, Unit.P99)
_Share = Annotated[float, Field(gt=0, lt=1)]


_T = TypeVar("_T")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


def _plainly(parse: Callable[[str], _T], text: str) -> _T:
    """What `parse` makes of a text; its own error as one that pydantic can put the field's path before."""
    try:
        return parse(text)
    except ClampdownError as error:
        raise ValueError(f"{error.message}{f' ({error.hint})' if error.hint else ''}") from error


class ModelPart(_Part):
    """The model by name, and the shape that its sites are checked against before it is there."""

    id: str
    type: str
    layers: PositiveInt
    width: PositiveInt


class SaePart(_Part):
    """The SAE: `id` as `--sae` takes it, or `to_be_given` when nobody published one. `features` is its width."""

    id: str | None = None
    to_be_given: str | None = None
    site: str
    features: PositiveInt

    @field_validator("site")
    @classmethod
    def _site_exists(cls, value: str) -> str:
        _plainly(Site.parse, value)
        return value

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.id is None and self.to_be_given is None:
            raise ValueError("give `id`, or say in `to_be_given` why there is none")
        return self


class JudgesPart(_Part):
    """`verdicts` judges every reply that is reported; `refusals` tells the refusal that finders read; `preference`
    (llm:MODEL@URL) says whose replies serve better on harmless prompts, the chosen arm's or the baseline's."""

    verdicts: str
    refusals: str = DEFAULT
    preference: str | None = None


class PromptsPart(_Part):
    """Sources of prompts by role and suite name. `harmful` and `benign` are what the pipelines look for; the test
    suite `benign` is also the text on which the cost in KL is measured."""

    discovery: dict[str, str]
    validation: dict[str, str]
    calibration: dict[str, str] = Field(default_factory=dict)
    test: dict[str, str]

    @field_validator(*ROLES)
    @classmethod
    def _readable(cls, value: dict[str, str]) -> dict[str, str]:
        for text in value.values():
            _plainly(Source.parse, text)
        return value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        for role in ("discovery", "validation"):
            missing = {"harmful", "benign"} - set(getattr(self, role))
            if missing:
                raise ValueError(f"{role} needs a suite called {' and one called '.join(sorted(missing))}")
        if "benign" not in self.test:
            raise ValueError("test needs a suite called benign: the cost in KL is measured on it")
        return self

    def sources(self, role: str) -> dict[str, Source]:
        return {name: Source.parse(text) for name, text in getattr(self, role).items()}


class _Steering(_Part):
    scope: str = "all"

    @field_validator("scope")
    @classmethod
    def _scope_exists(cls, value: str) -> str:
        if value not in SCOPES:
            raise ValueError(f"unknown scope '{value}', one of: {', '.join(SCOPES)}")
        return value


class SinglePromptClamp(_Steering):
    """2411.11296. A feature is a candidate when it is active on `min_tokens` tokens of one refusal (of `prompt`, or of
    the first discovery prompt that is refused). Each is clamped at `value`; the `finalists` with the largest refusal
    log-odds answer the validation prompts, and the one that refuses most is kept. Test prompts see `clamps`. A
    `feature` that is named takes the candidates' place.
    """

    kind: Literal["single-prompt-clamp"]
    prompt: str | None = None
    feature: int | None = Field(None, ge=0)
    min_tokens: PositiveInt = 2
    candidates: PositiveInt = 100
    operator: str = "clamp"
    error_term: Literal["keep", "drop"] = "keep"
    value: str
    finalists: PositiveInt
    clamps: tuple[str, ...] = Field(min_length=1)

    @field_validator("operator")
    @classmethod
    def _operator_exists(cls, value: str) -> str:
        sparse = [name for name, operator in OPERATORS.items() if not operator.dense]
        if value not in sparse:
            raise ValueError(f"unknown operator '{value}', one of: {', '.join(sparse)}")
        return value

    @field_validator("value", "clamps")
    @classmethod
    def _strengths(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for text in (value,) if isinstance(value, str) else value:
            if _plainly(Strength.parse, text).unit not in CLAMP_UNITS:
                raise ValueError(f"'{text}': a clamp is a raw value such as 12, or 1.5max, or 1.5p99")
        return value

    @model_validator(mode="after")
    def _measured(self) -> Self:
        if self.value not in self.clamps:
            raise ValueError(f"clamps {list(self.clamps)} must hold {self.value}: what was chosen is measured")
        if self.feature is not None and any(Strength.parse(text).unit is not Unit.RAW for text in self.clamps):
            raise ValueError("a named `feature` is clamped at raw values: no finder has seen how large it gets")
        return self


class ContrastRefine(_Steering):
    """2511.00029. The `features` of the best contrast score are added at `multiples` of their own largest activation,
    measured by refusal log-odds and benign KL, and refined: dropped, joined and rescored for at most `rounds` rounds,
    to at most `set_size` features within `kl_budget` nats per token. `factors` of the refined set answer the validation
    prompts; the test prompts see the choice, its signs turned, and the best-scored feature at every multiple.
    """

    kind: Literal["contrast-refine"]
    pooling: Literal["assistant_start", "max", "mean", "mean_active", "last"] = "max"
    literal: bool = False
    min_firing_rate: float = Field(0.05, ge=0, le=1)
    w_diff: float = 0.5
    w_var: float = 0.5
    features: PositiveInt
    multiples: tuple[float, ...] = Field(min_length=2)
    kl_budget: float = Field(gt=0)
    min_gain: float = Field(0.1, gt=0)
    set_size: PositiveInt = 1
    rounds: PositiveInt = 4
    factors: tuple[float, ...] = Field(min_length=1)

    @field_validator("multiples", "factors")
    @classmethod
    def _not_zero(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if 0.0 in value:
            raise ValueError("0 is the unsteered model, which is measured anyway")
        if len(set(value)) < len(value):
            raise ValueError("the same strength twice")
        return value

    @property
    def sizes(self) -> tuple[float, ...]:
        """The multiples without their signs: both signs are tried."""
        return tuple(sorted({abs(multiple) for multiple in self.multiples}))


class ControlsPart(_Part):
    """Controls of the chosen plan, brought to its own edit size or KL on `texts` benign validation replies. `unrelated`
    names the unrelated feature; by default one is looked for."""

    random: int = Field(20, ge=0)
    match: Literal["edit", "kl"] = "edit"
    texts: PositiveInt = 16
    unrelated: int | None = Field(None, ge=0)


class GatePart(_Part):
    """The chosen plan behind a calibrated gate, which neither paper has, as one more column."""

    budget: _Share = 0.02
    confidence: _Share = 0.95
    max_features: PositiveInt = 40


class MeasurePart(_Part):
    """How replies are made: tokens at most, benign prompts for KL, rows per batch (default: what memory holds)."""

    max_new_tokens: PositiveInt = 256
    kl_prompts: PositiveInt = 60
    batch_rows: PositiveInt | None = None
    likelihood: bool = True


class MultiturnPart(_Part):
    """Multi-turn attacks on the chosen plan. Without an attacker (`to_be_given` says why) they are left out."""

    attacker: str | None = None
    to_be_given: str | None = None
    judge: str | None = None
    objectives: str
    limit: PositiveInt = 60
    attempts: PositiveInt = 1
    max_turns: PositiveInt = 10
    max_backtracks: int = Field(10, ge=0)
    success: float = Field(0.7, ge=0, le=1)
    max_new_tokens: PositiveInt = 256

    @property
    def rules(self) -> Rules:
        return Rules(self.max_turns, self.max_backtracks, self.success)

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.attacker is None and self.to_be_given is None:
            raise ValueError("give `attacker`, or say in `to_be_given` why there is none")
        return self


class OptionPart(_Part):
    """A variant of the pipeline by name: what it is, who says so (not the paper, or it would be the recipe), and the
    settings that it stands for."""

    about: str
    source: str
    set: tuple[str, ...] = Field(min_length=1)


class Recipe(_Part):
    """One file. `chosen` are the options that it was read with."""

    schema_version: Literal[1] = Field(alias="schema")
    name: str
    paper: str
    about: str
    ours: tuple[str, ...] = ()
    seed: int = 0
    model: ModelPart
    sae: SaePart
    judges: JudgesPart
    prompts: PromptsPart
    method: Annotated[SinglePromptClamp | ContrastRefine, Field(discriminator="kind")]
    controls: ControlsPart | None = None
    gate: GatePart | None = None
    measure: MeasurePart = MeasurePart()
    multiturn: MultiturnPart | None = None
    options: dict[str, OptionPart] = Field(default_factory=dict)
    chosen: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _gate_has_prompts(self) -> Self:
        if self.gate is not None and "benign" not in self.prompts.calibration:
            raise ValueError("a gate needs prompts.calibration.benign: its threshold is set on them")
        return self


def read_recipe(path: Path, settings: Sequence[str] = (), options: Sequence[str] = ()) -> Recipe:
    """Read a file or a name, with its own `options` by name, then `KEY=VALUE` settings (`sae.id=DIR`) over it.

    Raises `RecipeError` naming file and field.
    """
    data = read_toml(path)
    for setting in (*_settings_of(data, options, path), *settings):
        _put(data, setting)
    if options:
        data["chosen"] = list(options)
    return parse_recipe(data, str(path))


def _settings_of(data: Mapping[str, Any], options: Sequence[str], path: Path) -> list[str]:
    """What the options stand for. Raises `RecipeError` for one that the file does not have."""
    found: list[str] = []
    known = data.get("options", {})
    for name in options:
        if not isinstance(known, dict) or name not in known:
            hint = f"it has: {', '.join(known)}" if known else "it has none"
            raise RecipeError(f"{path}: no option '{name}'", hint=hint)
        found += OptionPart.model_validate(known[name]).set
    return found


def read_toml(path: Path) -> dict[str, Any]:
    """A study's or recipe's file, or a recipe of the package by its name, as plain data. Raises `RecipeError`."""
    found = located(path)
    if found.suffix in (".csv", ".jsonl", ".json", ".txt", ".parquet"):
        raise RecipeError(
            f"{path} is no study's file, which is TOML", hint="prompts are given by role: --harmful FILE --benign FILE"
        )
    return read_document(found, RecipeError)


def located(path: Path) -> Path:
    """A file that is there, else the recipe of the package that has this name. Raises `RecipeError`."""
    if path.exists():
        return path
    name = path.stem if str(path) == f"recipes/{path.stem}.toml" else str(path)
    for folder in (PUBLISHED, STUDIES):
        shipped = folder / f"{name}.toml"
        if shipped.parent == folder and shipped.is_file():
            return shipped
    known = [*published(), *sorted(each.stem for each in STUDIES.glob("*.toml"))]
    near = get_close_matches(path.stem, known, n=1)
    raise RecipeError(
        f"no recipe at {path}, and none that comes with clampdown has this name",
        hint=f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}",
    )


def published() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in PUBLISHED.glob("*.toml"))


def is_recipe(data: Mapping[str, Any]) -> bool:
    """Whether the file is a published pipeline, with a method in its paper's own settings."""
    return "method" in data


def parse_recipe(data: Mapping[str, Any], where: str = "the recipe") -> Recipe:
    """Plain data as a recipe. Raises `RecipeError` naming the field."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise field_error(error, where, "docs/recipes.md") from error


def field_error(error: ValidationError, where: str, page: str) -> RecipeError:
    """What is wrong with which field of a file, as one message."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "top level"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    return RecipeError(f"{where}: {place}: {message}{more}", hint=f"{page} lists every field")


def _put(data: dict[str, Any], setting: str) -> None:
    """Set one field by its dotted path; the value is TOML, or text when it is no TOML."""
    key, equals, text = setting.partition("=")
    *tables, last = [part.strip() for part in key.split(".")]
    if not equals or not last or not all(tables):
        raise RecipeError(f"'{setting}' is not KEY=VALUE", hint="for example --set sae.id=my/sae")
    for name in tables:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise RecipeError(f"'{setting}': '{name}' is no table of the recipe")
    try:
        data[last] = parse_toml(f"value = {text}", setting, RecipeError)["value"]
    except RecipeError:
        data[last] = text
