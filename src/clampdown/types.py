"""The vocabulary shared by every stage: plain values, no torch.

A *prompt* belongs to a *suite*; a reply to it under one *arm* is a *record*; a *judge* gives it a *verdict*.
A *site* is a layer and a point of the residual stream, named as TransformerLens names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, Self

from clampdown.errors import SiteError

Role = Literal["system", "user", "assistant"]


class Verdict(StrEnum):
    """What a reply did. `DEGENERATE` is a failure on safe and on unsafe prompts alike."""

    REFUSED = "refused"
    COMPLIED = "complied"
    DEFLECTED = "deflected"
    DEGENERATE = "degenerate"
    UNSCORED = "unscored"


class Split(StrEnum):
    """Which decision a prompt may inform: features are found on `DISCOVERY`, strengths and features chosen on
    `VALIDATION`, gate thresholds set on `CALIBRATION`, and `TEST` is read once."""

    DISCOVERY = "discovery"
    VALIDATION = "validation"
    CALIBRATION = "calibration"
    TEST = "test"


class Point(StrEnum):
    """Where in a decoder block a site is."""

    RESID_PRE = "resid_pre"
    RESID_POST = "resid_post"
    MLP_OUT = "mlp_out"
    ATTN_OUT = "attn_out"


_SITE_NAME = re.compile(r"blocks\.(\d+)\.hook_(resid_pre|resid_post|mlp_out|attn_out)")


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """A place in the model: 0-based block index and point. `blocks.L.hook_resid_post` is the output of block L."""

    layer: int
    point: Point = Point.RESID_POST

    @property
    def name(self) -> str:
        return f"blocks.{self.layer}.hook_{self.point.value}"

    @classmethod
    def parse(cls, name: str) -> Self:
        """Read a TransformerLens-style name. Raises `SiteError` for anything else."""
        match = _SITE_NAME.fullmatch(name)
        if match is None:
            raise SiteError(
                f"'{name}' is not a site",
                hint="sites look like blocks.25.hook_resid_post (points: resid_pre, resid_post, mlp_out, attn_out)",
            )
        return cls(int(match[1]), Point(match[2]))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that ends with a user turn, and what is known about its right answer.

    `answer` is the exact expected answer of a capability item; `options` are the candidates (the answer among
    them) for scoring by likelihood. `meta` carries ground truth that a judge may read and a model never sees.
    """

    id: str
    messages: tuple[Message, ...]
    suite: str
    split: Split = Split.TEST
    category: str | None = None
    answer: str | None = None
    options: tuple[str, ...] = ()
    meta: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.messages[-1].content


class SuiteKind(StrEnum):
    """What a suite measures: whether replies refuse (`SAFETY`) or whether they are right (`CAPABILITY`)."""

    SAFETY = "safety"
    CAPABILITY = "capability"


@dataclass(frozen=True, slots=True)
class Suite:
    """A named list of prompts of one kind. `harmful` says whether refusing is the right thing to do."""

    name: str
    kind: SuiteKind
    harmful: bool
    prompts: tuple[Prompt, ...]

    def take(self, n: int) -> Suite:
        """The first `n` prompts; generators order prompts so that any prefix is balanced."""
        return Suite(self.name, self.kind, self.harmful, self.prompts[:n])


@dataclass(frozen=True, slots=True)
class Judgement:
    """A judge's finding on one reply. `correct` is None for prompts without an expected answer."""

    verdict: Verdict
    correct: bool | None = None
    detail: str = ""


Judge = Callable[[Prompt, str], Judgement]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval and sample size. With no data, `value` is None, never 0.0."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    def __format__(self, spec: str) -> str:
        if self.value is None or math.isnan(self.value):
            return "n/a"
        return format(self.value, spec or ".2f")


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where an artefact came from; written into every file that clampdown makes."""

    model: str
    model_revision: str
    sae: str | None
    prompts_hash: str
    code_version: str
    seed: int
    extra: Mapping[str, str] = field(default_factory=dict)


def balanced(groups: Sequence[Sequence[Prompt]]) -> tuple[Prompt, ...]:
    """Interleave groups so that every prefix holds about as many prompts of each."""
    longest = max((len(group) for group in groups), default=0)
    return tuple(group[i] for i in range(longest) for group in groups if i < len(group))


class ArmKind(StrEnum):
    """What a column of an experiment is."""

    BASELINE = "baseline"
    FEATURE = "feature"
    DIRECTION = "direction"
    CONTROL = "control"
    GATED = "gated"
    TUNED = "tuned"


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof of what steering did to one row: how many token positions it changed and by how much.

    `edit_norm` is the mean of ||x' - x|| / ||x|| over the touched positions (0.0 when none were).
    `gate_score` and `gate_fired` are None when the plan has no gate.
    """

    plan: str
    tokens_touched: int
    edit_norm: float
    gate_score: float | None = None
    gate_fired: bool | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt's outcome under one arm: a line of `records.jsonl`."""

    arm: str
    suite: str
    prompt_id: str
    split: Split
    category: str | None
    reply: str
    n_tokens: int
    verdict: Verdict
    correct: bool | None
    judge: str
    receipt: Receipt | None = None


@dataclass(frozen=True, slots=True)
class FeatureScore:
    """One feature with every score that finders and causal checks gave it (name -> value)."""

    feature: int
    scores: Mapping[str, float]
    top_prompts: tuple[str, ...] = ()
    promoted_tokens: tuple[str, ...] = ()
    demoted_tokens: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """What a finder found: features best first, every score, and where they came from."""

    finder: str
    site: str
    ranked_by: str
    features: tuple[FeatureScore, ...]
    provenance: Provenance
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranking(self) -> tuple[int, ...]:
        return tuple(score.feature for score in self.features)
