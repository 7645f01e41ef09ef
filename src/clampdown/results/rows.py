"""The parts of `summary.json`: arms, suites, gates, and what only some commands add.

1. Unknown keys are kept: later versions add some, and an older reader must neither choke on them nor lose them.
2. Nothing that is not finite is ever read or written; what was not measured is None.
3. Interval maps go from suite (and verdict) to the estimate, so a measure of no prompts is an entry without a value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from clampdown.types import BRANCHES, ArmKind, Interval, SuiteKind, Verdict


class Part(BaseModel):
    """A frozen piece of a run."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, populate_by_name=True)


def _finite(found: Interval) -> Interval:
    if found.n < 0 or not all(math.isfinite(x) for x in (found.value, found.low, found.high) if x is not None):
        raise ValueError(f"not an interval: {found.value} [{found.low}, {found.high}], n = {found.n}")
    return found


Estimate = Annotated[Interval, AfterValidator(_finite)]
BySuite = dict[str, Estimate]


class SuiteRow(Part):
    """One suite that was asked. `role` is what its prompts are for, where the study says so."""

    name: str
    kind: SuiteKind
    harmful: bool
    n: int = Field(ge=0)
    role: str | None = None


class Promise(Part):
    """With `confidence` at most `bound` of prompts that are `on` (benign, or harmful for a gate that turns refusals
    down) make a gate fire, as `n` calibration prompts showed; `budget` is what the bound had to stay within."""

    budget: float | None = None
    confidence: float | None = None
    n: int | None = None
    bound: float | None = None
    on: str = "benign"


class GateRow(Part):
    """One gate: what it reads, where it fires, what was promised, and what it scored by suite, lowest first.

    `branch` is which branch of the plan it opens. `trigger_rates` is how often it fired, where no scores say it.
    """

    branch: str = BRANCHES[0]
    kind: str = "gate"
    site: str | None = None
    features: tuple[int, ...] | None = None
    threshold: float | None = None
    guarantee: Promise | None = None
    scores: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    trigger_rates: BySuite = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _flat(cls, raw: Any) -> Any:
        """A summary's own `gate` has its promise flat beside the other keys."""
        if not isinstance(raw, Mapping) or raw.get("guarantee") or raw.get("bound") is None:
            return raw
        promise = {name: raw.get(name) for name in ("budget", "confidence", "bound")}
        on = raw.get("calibrated_on") or "benign"
        return {**raw, "guarantee": {**promise, "n": raw.get("n_calibration"), "on": on}}

    @property
    def promise(self) -> Promise:
        """What was promised; an empty promise when nothing was."""
        return self.guarantee or Promise()


class Category(Part):
    """What one arm did on one category of a suite; no estimate where there are too few prompts."""

    refused: Estimate | None = None
    correct: Estimate | None = None


class Paired(Part):
    """A suite under an arm and under the baseline, prompt by prompt: arm minus baseline of the outcome (right answers
    in capability suites, refusals elsewhere), how many prompts gained and lost it, exact McNemar's p."""

    outcome: str = "refused"
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    gained: int = 0
    lost: int = 0
    n: int = Field(default=0, ge=0)
    p_value: float | None = None
    degenerate: Estimate | None = None

    @property
    def interval(self) -> Interval:
        return Interval(self.difference, self.low, self.high, self.n)


class FrontierRow(Part):
    """An arm in the coordinates people decide by: means over suites of one side, None without data.

    `refusal` and `degenerate` are over harmful suites, `over_refusal` over harmless safety suites, `capability` is the
    mean accuracy over capability suites. `pareto`: no other arm is at least as good on both refusal and capability and
    better on one.
    """

    refusal: float | None = None
    over_refusal: float | None = None
    degenerate: float | None = None
    capability: float | None = None
    pareto: bool = False


class EditRow(Part):
    """One edit of an arm's plan."""

    site: str
    operator: str
    scope: str
    features: tuple[int, ...] = ()
    strengths: tuple[float, ...] = ()


class ArmResult(Part):
    """One arm: what it is, and everything that was measured of it.

    `suites` maps suite -> verdict -> share (safety suites), `capability` suite -> share right. `kl_benign` is in nats
    per token of benign text, `edit_norm` the mean of ||x' - x|| / ||x|| over edited tokens, `touched` their share.
    `plan` is the digest of what steered. `gates` are those of the plan, the second for what a two-sided plan does
    otherwise. `capability_by_likelihood` chooses among the options instead of generating.
    `against_baseline` and `likelihood_against_baseline` compare with the unsteered model prompt by prompt, by suite.
    """

    name: str
    kind: ArmKind
    group: str | None = None
    strength: float | None = None
    features: tuple[int, ...] | None = None
    operator: str | None = None
    plan: str | None = None
    system_prompt: str | None = None
    edits: tuple[EditRow, ...] = ()
    suites: dict[str, dict[str, Estimate]] = Field(default_factory=dict)
    capability: BySuite = Field(default_factory=dict)
    refused_capability: BySuite = Field(default_factory=dict)
    degenerate_capability: BySuite = Field(default_factory=dict)
    attack_success: BySuite = Field(default_factory=dict)
    selective_refusal: Estimate | None = None
    categories: dict[str, dict[str, Category]] = Field(default_factory=dict)
    reply_tokens: dict[str, float | None] = Field(default_factory=dict)
    capability_by_likelihood: BySuite = Field(default_factory=dict)
    kl_benign: float | None = None
    perplexity_benign: float | None = None
    top1_agreement: float | None = None
    edit_norm: float | None = None
    touched: float | None = None
    frontier: FrontierRow = Field(default_factory=FrontierRow)
    gate_fired: BySuite = Field(default_factory=dict)
    gates: tuple[GateRow, ...] = ()
    against_baseline: dict[str, Paired] = Field(default_factory=dict)
    likelihood_against_baseline: dict[str, Paired] = Field(default_factory=dict)

    @property
    def feature(self) -> str | None:
        """The features as one label, such as 312 or 312 + 90."""
        return " + ".join(map(str, self.features)) if self.features else None

    def rate(self, suite: str, verdict: Verdict = Verdict.REFUSED) -> Interval | None:
        return self.suites.get(suite, {}).get(verdict)


class Chosen(Part):
    """What the run settled on: the arm that always steers, the one behind a gate, and by which rule."""

    arm: str | None = None
    gated_arm: str | None = None
    feature: int | str | None = None
    strength: float | None = None
    strength_note: str = ""
    operator: str | None = None
    rule: str | None = None


class MethodLine(Part):
    """A method's arms: its own best, and the same at equal benign KL (None: it cannot be brought there)."""

    method: str
    best: str
    matched: str | None = None
    note: str | None = ""


class ClaimLine(Part):
    """A claim of a paper tested on this run; `reproduced` is None without data."""

    paper: str
    claim: str
    reproduced: bool | None = None
    evidence: str | None = ""


class ScreenedRow(Part):
    """A candidate that was read from prefills: changes in nats on `n_prompts` of each kind, and why it was dropped."""

    plan: str
    gain: float | None = None
    kl: float | None = None
    n_prompts: int | None = None
    strength: float | None = None
    dropped: str | None = None


class BudgetRow(Part):
    """A budget of a search: what was allowed, the estimate, its upper bound."""

    budget: str
    limit: float | None = None
    estimate: float | None = None
    bound: float | None = None
    n: int = 0
    holds: bool | None = None


class FinalistRow(Part):
    """A plan that was measured on prompts no trial read, and the budgets that turned it away."""

    setting: str = ""
    refusal: float | None = None
    refusals: BySuite = Field(default_factory=dict)
    budgets: tuple[BudgetRow, ...] = ()
    turned_away_by: tuple[str, ...] = ()


class TrialScore(Part):
    """What a trial scored on the few prompts that trials read."""

    refusal: float | None = None


class TrialRow(Part):
    """A trial of the search that no other beats."""

    name: str
    number: int
    cost: float | None = None
    score: TrialScore = Field(default_factory=TrialScore)


class Tuning(Part):
    """How a plan was searched for within budgets."""

    setting: str
    trials: int
    confidence: float
    validation: FinalistRow
    finalists: tuple[FinalistRow, ...] = ()
    frontier: tuple[TrialRow, ...] = ()
    binding: dict[str, int] = Field(default_factory=dict)
    unchecked: tuple[str, ...] = ()
    test: tuple[BudgetRow, ...] = ()


class LeftOut(Part):
    """What this run could not show: at which stage, why, and how many prompts (of `role`) would do."""

    stage: str
    reason: str
    needed: int | None = None
    role: str | None = None
