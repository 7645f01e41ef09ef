"""The vocabulary shared by every stage: plain values, no torch.

A *prompt* belongs to a *suite*; a reply to it under one *arm* is a *record*; a *judge* gives it a *verdict*.
A *site* is a layer and a point of the residual stream, named as TransformerLens names it.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from statistics import NormalDist
from typing import Any, Literal, Self

from clampdown.errors import SiteError
from clampdown.notebook import html_table, pandas

Role = Literal["system", "user", "assistant"]


class Verdict(StrEnum):
    """What a reply did. `DEGENERATE` is a failure on safe and on unsafe prompts alike."""

    REFUSED = "refused"
    COMPLIED = "complied"
    DEFLECTED = "deflected"
    DEGENERATE = "degenerate"
    UNSCORED = "unscored"


class Refusal(StrEnum):
    """Whether a reply refused: nothing given, something held back, or no."""

    FULL = "full"
    PARTIAL = "partial"
    NO = "no"


class Ground(StrEnum):
    """Why a reply refused: it ought not to (`SAFETY`) or it is not able to (`CAPABILITY`: no browser, no data)."""

    SAFETY = "safety"
    CAPABILITY = "capability"


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


class PromptRole(StrEnum):
    """What a prompt is for in a study.

    Refusing is right for `HARMFUL` (asked plainly), `JAILBROKEN` (inside an attack's wrapper) and `MULTI_TURN`
    (escalated over turns), wrong for `BORDERLINE` (harmless, but close to harm) and `BENIGN`. `CAPABILITY` prompts have
    a right answer.
    """

    HARMFUL = "harmful"
    JAILBROKEN = "jailbroken"
    MULTI_TURN = "multi_turn"
    BORDERLINE = "borderline"
    BENIGN = "benign"
    CAPABILITY = "capability"

    @property
    def harmful(self) -> bool:
        """Whether refusing is the right thing to do."""
        return self in ATTACKS


ATTACKS = (PromptRole.HARMFUL, PromptRole.JAILBROKEN, PromptRole.MULTI_TURN)
SAFE = (PromptRole.BORDERLINE, PromptRole.BENIGN)


_SITE_NAME = re.compile(r"blocks\.(\d{1,6})\.hook_(resid_pre|resid_post|mlp_out|attn_out)")


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
                f"'{name[:80]}' is not a site",
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


OBJECTIVE = "objective"
"""Name of the entry of a prompt's `meta` that says what it is after; see `Record`."""


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
    """A judge's finding on one reply. `correct` is None for prompts without an expected answer.

    `score` is what a graded rubric gave: 0 is no harm done, 1 the most (None: the judge does not grade).
    `refusal` and `helped` are what people are asked about a reply: did it refuse, and did it help with what was asked.
    `ground` is why it refused. `p_refused` (a full refusal) and `p_helped` are the judge's probabilities. None: the
    judge does not say.
    """

    verdict: Verdict
    correct: bool | None = None
    detail: str = ""
    score: float | None = None
    refusal: Refusal | None = None
    helped: bool | None = None
    ground: Ground | None = None
    p_refused: float | None = None
    p_helped: float | None = None


Judge = Callable[[Prompt, str], Judgement]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval and sample size. With no data, `value` is None, never 0.0."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of_rate(cls, successes: int, n: int, confidence: float = 0.95, *, effective: float | None = None) -> Self:
        """A proportion with its Wilson score interval (Wilson 1927); no data when `n` is 0. Raises `ValueError` for
        impossible counts.

        `effective` is how many independent observations the `n` are worth (None: all); `n` is what is reported.
        """
        if not 0 <= successes <= n:
            raise ValueError(f"{successes} successes out of {n}")
        if n == 0:
            return cls(None, None, None, 0)
        z = NormalDist().inv_cdf((1 + confidence) / 2)
        worth = n if effective is None else effective
        rate, weight = successes / n, z * z / worth
        centre = (rate + weight / 2) / (1 + weight)
        half = z * math.sqrt(rate * (1 - rate) / worth + weight / (4 * worth)) / (1 + weight)
        # At 0 and n the bound equals the estimate in exact arithmetic; say so in floating point too.
        return cls(rate, 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half, n)

    @property
    def signed(self) -> str:
        """A difference with its bounds: -0.12 [-0.30, +0.06]."""
        if self.value is None:
            return "n/a"
        bounds = "" if self.low is None or self.high is None else f" [{self.low:+.2f}, {self.high:+.2f}]"
        return f"{self.value:+.2f}{bounds}"

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


BRANCHES = ("edits", "otherwise")
"""The branches of a plan by their names in its file: what its gate lets through, and what it does otherwise."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof of what steering did to one row: how many token positions it changed and by how much.

    `edit_norm` is the mean of ||x' - x|| / ||x|| over the touched positions (0.0 when none were).
    `gate_score` and `gate_fired` are None when the plan has no gate; `gate_fired` says whether any branch acted.
    `branch` ("edits", "otherwise" or "none") and `otherwise_score` are for two-sided plans: which branch acted, and
    what the second gate scored.
    `turns_read`, `worst_turn` (from 0) and `beyond_calibration` are for gates that read turn by turn: how many user
    turns, which of them decided, and whether the conversation was longer than any that the guarantee is about.
    `factor` is what the edits of the branch that acted were multiplied with, for plans whose strength grows with a
    gate's score.
    """

    plan: str
    tokens_touched: int
    edit_norm: float
    gate_score: float | None = None
    gate_fired: bool | None = None
    branch: str | None = None
    otherwise_score: float | None = None
    turns_read: int | None = None
    worst_turn: int | None = None
    beyond_calibration: bool | None = None
    factor: float | None = None


@dataclass(frozen=True, slots=True)
class StoredReply:
    """What one arm answered to one prompt, before it is judged: a line of `replies.jsonl`."""

    arm: str
    suite: str
    prompt_id: str
    reply: str
    n_tokens: int
    receipt: Receipt | None = None
    same_as: str = ""


@dataclass(frozen=True, slots=True)
class OptionChoice:
    """One multiple-choice item under one arm: log-likelihood of every option in nats, and the likeliest.

    `chosen` is empty, and the item wrong, when no likelihood is finite: the model was broken. `mass` is the share of
    probability on the true options, for suites that are scored by it (0 for a broken model); None for others.
    """

    arm: str
    suite: str
    prompt_id: str
    log_likelihoods: tuple[float, ...]
    chosen: str
    correct: bool
    mass: float | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt's outcome under one arm: a line of `records.jsonl`.

    `objective` names what the prompt is after, for prompts that share one (attempts at one goal, a request and its
    harmless twin): their outcomes are not independent, and intervals are clustered by it. `same_as` names the arm whose
    reply this is when it was not computed again, because the two could not differ. `refusal`, `helped` and `ground` are
    the judge's answers that the verdict follows from (`Judgement`); None in records of judges that do not say.
    """

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
    score: float | None = None
    objective: str | None = None
    same_as: str = ""
    refusal: Refusal | None = None
    helped: bool | None = None
    ground: Ground | None = None


@dataclass(frozen=True, slots=True)
class FeatureScore:
    """One feature with every score that finders and causal checks gave it (name -> value)."""

    feature: int
    scores: Mapping[str, float]
    top_prompts: tuple[str, ...] = ()
    promoted_tokens: tuple[str, ...] = ()
    demoted_tokens: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ScoreSource:
    """Where one score came from: who computed it, at which site, from how many prompts and how those were pooled.

    `pooling` and `n` are None where they mean nothing: a score of the weights alone reads no prompts.
    """

    finder: str
    site: str
    provenance: Provenance
    pooling: str | None = None
    n: int | None = None


class ScoreColumns(Mapping[str, array]):
    """Scores of every feature of an SAE: name -> float64 `array`, one value per feature, NaN where there is none.

    Standard-library arrays keep this module light; `numpy.asarray(columns[name])` shares their memory. Columns that
    hold the same bits are equal, so NaN equals NaN. Raises `ValueError` when lengths differ.
    """

    __slots__ = ("_arrays",)

    def __init__(self, columns: Mapping[str, Iterable[Any]] | None = None) -> None:
        self._arrays = {name: _float64(values) for name, values in (columns or {}).items()}
        if len(lengths := {len(values) for values in self._arrays.values()}) > 1:
            raise ValueError(f"score columns of different lengths: {sorted(lengths)}")

    def __getitem__(self, name: str) -> array:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ScoreColumns):
            return NotImplemented
        return {n: a.tobytes() for n, a in self.items()} == {n: a.tobytes() for n, a in other.items()}

    __hash__ = None

    @property
    def n_features(self) -> int:
        """Features per column; 0 without columns."""
        return len(next(iter(self._arrays.values()), ()))


def _float64(values: Iterable[Any]) -> array:
    """A copy as an array of doubles; what is one already (numpy's float64 too) is copied as a block."""
    try:
        view = memoryview(values)  # type: ignore[arg-type]
    except TypeError:
        return array("d", values)
    if view.format != "d" or not view.c_contiguous:
        return array("d", values)
    return array("d", view.tobytes())


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """What finders found at one site of one SAE: the features that they keep, best first, with every score.

    `columns` has the scores of all features of the SAE; the kept features' own `scores` may have more (a causal check
    measures finalists only) and win where both have a value. `sources` names where single scores came from; a score
    without an entry came from this set's own `finder` and `provenance`.
    """

    finder: str
    site: str
    ranked_by: str
    features: tuple[FeatureScore, ...]
    provenance: Provenance
    settings: Mapping[str, str] = field(default_factory=dict)
    columns: ScoreColumns = field(default_factory=ScoreColumns)
    sources: Mapping[str, ScoreSource] = field(default_factory=dict)

    @property
    def ranking(self) -> tuple[int, ...]:
        return tuple(score.feature for score in self.features)

    @property
    def sae_revision(self) -> str | None:
        """Hash of the SAE that the features index into; None when it was not recorded."""
        return self.provenance.extra.get("sae_revision")

    @property
    def score_names(self) -> tuple[str, ...]:
        """Every score that any feature has: the one that ranks first, then as they were added."""
        kept = (name for feature in self.features for name in feature.scores)
        names = tuple(dict.fromkeys((*kept, *self.columns)))
        return tuple(sorted(names, key=lambda name: name != self.ranked_by))

    @property
    def d_sae(self) -> int | None:
        """Width of the SAE; None when it is not known, because the set has neither columns nor a recorded width."""
        return self.columns.n_features or (int(self.provenance.extra.get("d_sae", 0)) or None)

    def column(self, score: str) -> array:
        """One score of every feature, float64, NaN where a feature has none; ends with the last known feature when the
        SAE's width is not known. Raises `KeyError` for a score that no feature has."""
        if score not in self.score_names:
            raise KeyError(score)
        width = self.d_sae or max(self.ranking, default=-1) + 1
        values = array("d", self.columns[score]) if score in self.columns else array("d", [math.nan]) * width
        for feature in self.features:
            if score in feature.scores:
                values[feature.feature] = feature.scores[score]
        return values

    def source(self, score: str) -> ScoreSource:
        """Where a score came from."""
        n = self.provenance.extra.get("n_prompts")
        own = ScoreSource(
            self.finder, self.site, self.provenance, self.settings.get("pooling"), None if n is None else int(n)
        )
        return self.sources.get(score, own)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, place: int) -> FeatureScore:
        """The feature at that place, best first."""
        return self.features[place]

    def __iter__(self) -> Iterator[FeatureScore]:
        return iter(self.features)

    def __repr__(self) -> str:
        first = ", ".join(map(str, self.ranking[:5])) + (", ..." if len(self.features) > 5 else "")
        return f"FeatureSet({self.finder} at {self.site}: {len(self.features)} features, {first})"

    def _repr_html_(self) -> str:
        names = [name for name in self.score_names if any(name in each.scores for each in self.features)]
        rows = (
            [str(f.feature), *(_score(f.scores.get(name)) for name in names), " ".join(f.promoted_tokens[:6])]
            for f in self.features
        )
        headings = ["feature", *(name.replace("_", " ") for name in names), "promotes"]
        return html_table(headings, rows, f"{self.finder} at {self.site}, ranked by {self.ranked_by.replace('_', ' ')}")

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`: a row per feature (all of the SAE when the columns are there, else the kept ones), a
        column per score, and `rank` (1 is best, <NA> for features that were not kept). Provenance is in `.attrs`.

        Raises `MissingPackageError` without pandas.
        """
        frames = pandas()
        index = range(self.columns.n_features) if self.columns else self.ranking
        scores = {name: self.column(name) for name in self.score_names}
        frame = frames.DataFrame({n: [c[f] for f in index] for n, c in scores.items()}, index=list(index), dtype=float)
        frame.index.name = "feature"
        ranks = frames.Series({feature: rank for rank, feature in enumerate(self.ranking, 1)}, dtype="Int64")
        frame.insert(0, "rank", ranks.reindex(frame.index))
        frame.attrs = {"finder": self.finder, "site": self.site, "ranked_by": self.ranked_by} | {
            "provenance": asdict(self.provenance)
        }
        return frame


def _score(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3g}"
