"""The table of finders: each ranks the features of an SAE by one idea of what makes a feature cause refusal.

`Material` is what finders may draw on: two prompt sets and, for some, a judge and jailbreak pairs. What several of them
need (the pass over the prompts, the refusal tokens, the gradients) is computed on first use and kept. A finder says
what it needs; asked for without it, it is an error that says so.

Every ranking keeps features that fire on a share of the prompts of one set only (`ContrastSettings.min_firing_rate`),
whatever score ranks them, so that dead and near-dead features are never proposed; the literal contrast alone does not.
A new finder is one function and one row of `FINDERS`. `DEFAULT` is the one that won `benchmarks/finders.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
from jaxtyping import Float

from clampdown.activations.collect import Progress, collect
from clampdown.activations.store import ActivationStore
from clampdown.activations.stream import Pass, plan_pass, read_sae
from clampdown.discovery import causal
from clampdown.discovery.contrast import (
    Contrast,
    ContrastSettings,
    best_first,
    contrast_scores,
    eligible_features,
    plan_contrast,
)
from clampdown.discovery.gradients import STEPS, Attribution, attribute
from clampdown.discovery.output_score import NEUTRAL, output_scores
from clampdown.discovery.pairs import Pair, signed_rank
from clampdown.discovery.ranking import Finding, build_feature_set, make_provenance
from clampdown.discovery.refusal_tokens import RefusalTokens, find_refusal_tokens
from clampdown.discovery.screening import BenignKl, Matched, PrefillRefusal, match_strengths
from clampdown.discovery.single_prompt import SinglePromptSettings, find_from_first_refusal
from clampdown.errors import PromptSetError
from clampdown.models.chat import encode
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.types import FeatureScore, FeatureSet, Judge, Message, Prompt, Provenance, ScoreSource

PerFeature = Float[np.ndarray, " d_sae"]
MATCHED_EFFECT = "clamp_refusal_at_kl"
TOKEN_PROMPTS = 24


@dataclass(frozen=True, slots=True)
class Effort:
    """How much the costly finders spend. `attributed`: prompts that are differentiated. `finalists`: features that the
    clamp finder tests, on `clamped` prompts, at a benign KL of `kl` nats per token measured on `benign` replies."""

    attributed: int = 32
    finalists: int = 32
    clamped: int = 24
    benign: int = 16
    kl: float = 0.02
    scope: str = "prompt"


@dataclass(frozen=True)
class Material:
    """What finders may draw on.

    `pairs` are requests with and without a jailbreak wrapper. `judge` tells this model's refusals; without it the
    refusal tokens are not known. `only` is the prompt for the single-prompt finder (None: the first that is refused).
    `run` says how the pass over the prompts is made, for example into a directory (None: in memory). `known_tokens` are
    those that open refusals, if that is known already.
    """

    lm: LanguageModel
    sae: Sae
    harmful: tuple[Prompt, ...]
    harmless: tuple[Prompt, ...]
    pairs: tuple[Pair, ...] = ()
    judge: Judge | None = None
    only: Prompt | None = None
    settings: ContrastSettings = field(default_factory=ContrastSettings)
    effort: Effort = field(default_factory=Effort)
    seed: int = 0
    on_progress: Progress | None = None
    run: Callable[[Pass], ActivationStore] | None = None
    known_tokens: RefusalTokens | None = None

    @property
    def planned(self) -> Pass:
        """The pass over both prompt sets that `contrast` makes."""
        poolings = tuple(dict.fromkeys((self.settings.pooling, "max")))
        return plan_contrast(self.lm, self.sae, self.harmful, self.harmless, poolings)

    @cached_property
    def contrast(self) -> Contrast:
        run = self.run or partial(collect, on_progress=self.on_progress)
        return Contrast.of(run(self.planned), len(self.harmful))

    @cached_property
    def contrast_scores(self) -> dict[str, PerFeature]:
        return contrast_scores(self.sae, self.contrast, self.settings)

    @cached_property
    def tokens(self) -> RefusalTokens:
        """Those that are given, else those that open the model's own refusals. Raises `PromptSetError` without a
        judge."""
        if self.known_tokens is not None:
            return self.known_tokens
        if self.judge is None:
            raise PromptSetError(
                "which first words mean refusal is read off the model's own replies, and that needs a judge",
                hint="give --judge learned for replies in English, or choose a finder that needs none: "
                + ", ".join(name for name, finder in FINDERS.items() if not finder.needs_judge),
            )
        prompts = [*self.harmful[:TOKEN_PROMPTS], *self.harmless[:TOKEN_PROMPTS]]
        return find_refusal_tokens(self.lm, prompts, self.judge)

    @property
    def tempting(self) -> tuple[Prompt, ...]:
        """Harmful prompts that the model may answer: jailbroken ones where there are any."""
        return tuple(pair.wrapped for pair in self.pairs) or self.harmful

    @property
    def clamped(self) -> tuple[Prompt, ...]:
        """The prompts on which clamps are measured to raise refusal."""
        return self.tempting[-self.effort.clamped :]

    @property
    def costed(self) -> tuple[Prompt, ...]:
        """The benign prompts on which clamps are brought to one cost."""
        return self.harmless[: self.effort.benign]

    @cached_property
    def gradients(self) -> Attribution:
        return self._attribute(0)

    @cached_property
    def integrated(self) -> Attribution:
        return self._attribute(STEPS)

    def _attribute(self, steps: int) -> Attribution:
        prompts = self.tempting[: self.effort.attributed]
        return attribute(self.lm, self.sae, prompts, self.tokens, steps=steps, on_progress=self.on_progress)

    def paired(self) -> tuple[Pair, ...]:
        """The pairs. Raises `PromptSetError` without any."""
        if not self.pairs:
            raise PromptSetError(
                "the jailbreak contrast needs the same requests with and without a wrapper",
                hint="give --jailbroken FILE, each prompt with the id of the --harmful prompt that it wraps",
            )
        return self.pairs


Find = Callable[[Material], FeatureSet]


@dataclass(frozen=True, slots=True)
class Finder:
    """One row: how to find, what ranks, and what it needs beyond two prompt sets."""

    find: Find
    what: str
    needs_judge: bool = False
    needs_pairs: bool = False


def run_finder(name: str, material: Material) -> FeatureSet:
    """A ranked `FeatureSet`. Raises `PromptSetError` for an unknown finder or missing material."""
    if name not in FINDERS:
        raise PromptSetError(f"no finder is called '{name}'", hint=f"one of: {', '.join(FINDERS)}")
    return dataclasses.replace(FINDERS[name].find(material), finder=name)


def _ranked(
    material: Material,
    ranked_by: str,
    more: Mapping[str, PerFeature] | None = None,
    read: Sequence[Prompt] = (),
    settings: ContrastSettings | None = None,
) -> FeatureSet:
    """Features that fire often enough, by one score. `more` adds to the contrast's scores, `read` to its prompts."""
    settings = dataclasses.replace(settings or material.settings, ranked_by=ranked_by)
    contrast = contrast_scores(material.sae, material.contrast, settings) if settings.literal else None
    scores = (contrast or material.contrast_scores) | dict(more or {})
    prompts = material.contrast.prompts
    finding = Finding(
        finder="",
        ranked_by=ranked_by,
        scores=scores,
        order=best_first(scores, eligible_features(material.contrast, settings), settings),
        peaks=material.contrast.peaks,
        texts=[prompt.text for prompt in prompts],
        settings={name: str(value) for name, value in dataclasses.asdict(settings).items()},
    )
    return build_feature_set(material.lm, material.sae, finding, _provenance(material, (*prompts, *read)))


def _provenance(material: Material, read: Sequence[Prompt]) -> Provenance:
    """Of everything that was read, each prompt once."""
    distinct = {(prompt.id, prompt.messages): prompt for prompt in read}
    return make_provenance(material.lm, material.sae, list(distinct.values()), material.seed)


def by_contrast(score: str) -> Find:
    """Any score that the contrast of two prompt sets gives by itself."""
    return lambda material: _ranked(material, score)


def by_literal_contrast(material: Material) -> FeatureSet:
    return _ranked(material, "composite", settings=dataclasses.replace(material.settings, literal=True))


def from_one_prompt(material: Material) -> FeatureSet:
    """Reads one refusal; needs neither set beyond that one prompt."""
    settings = SinglePromptSettings(top=material.settings.top)
    prompts = (material.only,) if material.only else material.harmful
    return find_from_first_refusal(material.lm, material.sae, prompts, judge=material.judge, settings=settings)


def by_jailbreak_contrast(material: Material) -> FeatureSet:
    pairs = material.paired()
    members = [*(pair.plain for pair in pairs), *(pair.wrapped for pair in pairs)]
    numbered = [dataclasses.replace(prompt, id=f"{i}") for i, prompt in enumerate(members)]
    reading = read_sae(material.sae, material.settings.pooling)
    found = collect(plan_pass(material.lm, [reading], numbered), material.on_progress)
    is_plain = np.arange(len(members)) < len(pairs)
    test = signed_rank(*(found.matrix(material.settings.pooling, rows) for rows in (is_plain, ~is_plain)))
    more = {"jailbreak_drop_z": test.z, "jailbreak_drop": test.mean_drop, "jailbreak_q": test.q_value}
    return _ranked(material, "jailbreak_drop_z", more, members)


def by_gradient(score: str) -> Find:
    def find(material: Material) -> FeatureSet:
        integrated = score == "integrated_gradients"
        found = material.integrated if integrated else material.gradients
        read = material.tempting[: material.effort.attributed]
        names = ("gradient_x_activation", "steering_gradient", *(("integrated_gradients",) if integrated else ()))
        return _ranked(material, score, {name: getattr(found, name) for name in names}, read)

    return find


def by_output_score(material: Material) -> FeatureSet:
    text = encode(material.lm, [Message("user", NEUTRAL)])
    scores = output_scores(material.lm, material.sae, text, on_progress=material.on_progress)
    return _ranked(material, "output_score", {"output_score": scores})


def by_clamping(material: Material) -> FeatureSet:
    """The real thing, for finalists: clamp each at the strength that costs `effort.kl` nats on benign replies, and
    rank by the refusal log-odds that it brings on prompts which tempt the model.

    Finalists are the first of the steering gradient, of d' and of gradient x activation, in turn.
    """
    proposals = [by_gradient("steering_gradient"), by_contrast("d_prime"), by_gradient("gradient_x_activation")]
    ranked = [find(material) for find in proposals]
    by_feature = {score.feature: score for found in reversed(ranked) for score in found.features}
    order = _in_turn([found.ranking for found in ranked])
    finalists = [by_feature[feature] for feature in order[: material.effort.finalists]]
    tested = clamp_all(material, finalists)
    best = sorted(tested, key=lambda score: -score.scores.get(MATCHED_EFFECT, -math.inf))
    rest = [by_feature[feature] for feature in order[len(finalists) :]]
    kept = tuple([*best, *rest][: material.settings.top])
    settings = {
        **ranked[0].settings,
        **{k: str(v) for k, v in dataclasses.asdict(material.effort).items()},
        "ranked_by": MATCHED_EFFECT,
    }
    read = (*material.contrast.prompts, *material.tempting[: material.effort.attributed], *material.clamped)
    return dataclasses.replace(
        ranked[0],
        features=kept,
        ranked_by=MATCHED_EFFECT,
        provenance=_provenance(material, read),
        settings=settings,
        sources=clamp_sources(material),
    )


def clamp_all(material: Material, finalists: Sequence[FeatureScore]) -> list[FeatureScore]:
    """The finalists with the change of the refusal log-odds at matched benign KL (`MATCHED_EFFECT`, absent where the
    feature could not be brought down to that KL), the strength there, and the KL that it costs."""
    lm, sae, effort = material.lm, material.sae, material.effort
    kl = BenignKl(lm, sae, material.costed, on_progress=material.on_progress)
    refusal = PrefillRefusal(lm, sae, material.clamped, material.tokens)
    plans = [lambda c, f=score.feature: causal.clamp_plan(lm, sae, f, c, effort.scope) for score in finalists]
    start = [max(score.scores.get("max_activation", 0.0), 1.0) for score in finalists]
    matched = match_strengths(plans, kl, effort.kl, start)
    return list(map(_with_effect, finalists, matched, refusal([m.plan for m in matched])))


def clamp_sources(material: Material) -> dict[str, ScoreSource]:
    """Where the scores of `clamp_all` come from: its own prompts, whichever finder proposed the features. The effect is
    that of a strength found on the benign prompts, so it comes from both sets."""

    def source(prompts: Sequence[Prompt]) -> ScoreSource:
        return ScoreSource(DEFAULT, material.sae.cfg.site.name, _provenance(material, prompts), n=len(prompts))

    costs = dict.fromkeys(("clamp_strength", "clamp_kl"), source(material.costed))
    return {MATCHED_EFFECT: source((*material.clamped, *material.costed)), **costs}


def _with_effect(score: FeatureScore, matched: Matched, effect: float) -> FeatureScore:
    measured = {"clamp_strength": matched.strength, "clamp_kl": matched.kl}
    if matched.ok:
        measured[MATCHED_EFFECT] = effect
    return dataclasses.replace(score, scores={**score.scores, **measured})


def _in_turn(rankings: Sequence[Sequence[int]]) -> list[int]:
    """Every ranking's first, then every ranking's second, and so on; each feature once."""
    longest = max(map(len, rankings))
    return list(dict.fromkeys(r[i] for i in range(longest) for r in rankings if i < len(r)))


FINDERS: dict[str, Finder] = {
    "clamp": Finder(by_clamping, "exact clamp of finalists at equal benign KL", needs_judge=True),
    "steering-gradient": Finder(
        by_gradient("steering_gradient"), "gradient of the refusal log-odds along each decoder row", needs_judge=True
    ),
    "gradient": Finder(by_gradient("gradient_x_activation"), "gradient x activation (2505.23556)", needs_judge=True),
    "integrated-gradients": Finder(
        by_gradient("integrated_gradients"), "10-step integrated gradients (2505.23556)", needs_judge=True
    ),
    "single-prompt": Finder(from_one_prompt, "features active in one refusal (2411.11296)"),
    "contrast": Finder(by_contrast("composite"), "contrast composite with an activity floor (2511.00029)"),
    "contrast-literal": Finder(by_literal_contrast, "contrast composite as published (2511.00029)"),
    "d-prime": Finder(by_contrast("d_prime"), "difference of means in pooled standard deviations"),
    "auroc": Finder(by_contrast("auroc"), "AUROC, with Mann-Whitney and Benjamini-Hochberg"),
    "alignment": Finder(
        by_contrast("alignment"), "cosine of the decoder row with the difference of means (2406.11717)"
    ),
    "jailbreak-contrast": Finder(
        by_jailbreak_contrast, "paired Wilcoxon of requests with and without a wrapper (2602.12418)", needs_pairs=True
    ),
    "output-score": Finder(by_output_score, "does amplifying it bring up its own tokens (2505.20063)"),
}
DEFAULT = "clamp"
