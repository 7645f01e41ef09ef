"""What every method is built from: activations of discovery prompts, dense directions, and which tokens open refusals.

Computed on first use and kept: a study that only sweeps one clamp fits no CAST condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Float

from clampdown.discovery.contrast import ContrastSettings, contrast_scores
from clampdown.discovery.directions import difference_of_means, direction_between
from clampdown.discovery.finders import TOKEN_PROMPTS, Effort, Material
from clampdown.discovery.refusal_tokens import RefusalTokens, assumed_refusal_tokens, find_refusal_tokens
from clampdown.errors import NotEnoughDataError
from clampdown.evaluation.condition import Condition, condition
from clampdown.evaluation.controls import FeatureTable
from clampdown.models.chat import encode
from clampdown.study.composing import BENIGN_WRAPPED
from clampdown.study.progress import Stages
from clampdown.study.sizes import Sizes
from clampdown.study.study import Study
from clampdown.types import ATTACKS, SAFE, Judge, Point, Prompt, PromptRole, Site, Split

EFFORT = Effort(attributed=16, finalists=12, clamped=12, benign=8)
MORE_TOKEN_PROMPTS = 120
"""Attacks that are read for refusals when the first few show none."""
SEARCHED, LEAST_PROMPTS = 128, 4
"""Plans that a search tries, about, and prompts that it reads at least."""


@dataclass(frozen=True)
class Groundwork:
    """A study with its sizes, and what was read of its discovery prompts. `only` is the prompt for the single-prompt
    finder; `settings` are those of the contrast; `refusal_judge` tells refusals where the study's own judge should
    not; `benign_budget` is the share of benign requests on which a gate may fire; `wrapped` is how many copies of each
    prompt in random wrappers the methods' gates learn from."""

    study: Study
    sizes: Sizes
    stages: Stages
    only: Prompt | None = None
    settings: ContrastSettings = field(default_factory=ContrastSettings)
    effort: Effort = EFFORT
    refusal_judge: Judge | None = None
    benign_budget: float = 0.02
    wrapped: int = 0

    @cached_property
    def harmful(self) -> tuple[Prompt, ...]:
        """Plain harmful discovery prompts, or attacks where there are none."""
        return tuple(self.first_of((PromptRole.HARMFUL,), ATTACKS))

    @cached_property
    def harmless(self) -> tuple[Prompt, ...]:
        """Benign discovery prompts, or borderline ones where there are none; plain as the harmful ones are."""
        return tuple(p for p in self.first_of((PromptRole.BENIGN,), SAFE) if p.suite != BENIGN_WRAPPED)

    def first_of(self, *choices: Sequence[PromptRole], split: Split = Split.DISCOVERY) -> list[Prompt]:
        """Prompts of the first of these sets of roles that has any."""
        for roles in choices:
            if found := self.study.prompts(split, self.sizes.discovery, *roles):
                return found
        raise NotEnoughDataError(f"no {split} prompts of the roles {', '.join(role for r in choices for role in r)}")

    @cached_property
    def given(self) -> Material:
        """What finders read."""
        study = self.study
        return Material(
            study.lm,
            study.sae,
            self.harmful,
            self.harmless,
            study.data.pairs(self.sizes.discovery),
            self.refusal_judge or study.judge,
            self.only,
            self.settings,
            self.effort,
            study.seed,
            known_tokens=self.tokens,
        )

    @cached_property
    def tokens(self) -> RefusalTokens:
        """What opens this model's refusals; where it showed none, what opens English ones, and that is said."""
        lm, judge = self.study.lm, self.refusal_judge or self.study.judge
        first = [*self.harmful[:TOKEN_PROMPTS], *self.harmless[:TOKEN_PROMPTS]]
        more = [*self.study.prompts(Split.DISCOVERY, MORE_TOKEN_PROMPTS, *ATTACKS)[:MORE_TOKEN_PROMPTS],
                *self.harmless[:TOKEN_PROMPTS]]  # fmt: skip
        for prompts in (first, more):
            try:
                return find_refusal_tokens(lm, prompts, judge)
            except NotEnoughDataError as error:
                reason = error.message
        self.stages.leave_out(
            "the model's own first words of a refusal",
            f"{reason} among {len(more)} replies: the usual English ones are assumed",
            "give harmful prompts that the unsteered model refuses",
        )
        return assumed_refusal_tokens(lm)

    @cached_property
    def dense(self) -> tuple[float, ...]:
        """The difference of means at the SAE's site, where the reply is decided (2406.11717)."""
        contrast = self.given.contrast
        return tuple(direction_between(contrast.activations, contrast.harmful).vector.tolist())

    @cached_property
    def condition(self) -> Condition:
        """CAST's gate, read where the block of the SAE's site begins (2409.05907)."""
        before = Site(self.study.site.layer, Point.RESID_PRE)
        (vector,) = difference_of_means(self.study.lm, self.harmful, self.harmless, [before], "mean")
        return condition(self.study.lm, before, vector.vector.tolist(), self.harmful, self.harmless)

    @cached_property
    def table(self) -> FeatureTable:
        """What controls are drawn by: each feature's firing rate, refusal score and decoder row."""
        given = self.given
        scores = contrast_scores(given.sae, given.contrast, given.settings)
        return FeatureTable(
            firing_rate=given.contrast.activations.moments("max").firing_rate,
            refusal_score=scores["norm_diff_mean"],
            decoder=given.sae.W_dec.float().cpu().numpy(),
        )

    @property
    def tempting(self) -> list[Prompt]:
        """Validation attacks on which first tokens are read: as many as a search can afford."""
        return [prompt for prompt, _ in self._searched]

    @property
    def tempting_tokens(self) -> int:
        """How long they are together, as the model reads them."""
        return sum(length for _, length in self._searched)

    @property
    def benign(self) -> list[Prompt]:
        """Plain validation prompts on which benign KL is read."""
        n = 2 * self.sizes.causal_prompts
        found = self.study.prompts(Split.VALIDATION, n, PromptRole.BENIGN) or self.study.prompts(
            Split.VALIDATION, n, *SAFE
        )
        return [prompt for prompt in found if prompt.suite != BENIGN_WRAPPED]

    @cached_property
    def _searched(self) -> list[tuple[Prompt, int]]:
        """Attacks on which `SEARCHED` plans may be tried, with their lengths; the longest are left out first, and there
        are never fewer than `LEAST_PROMPTS`. Only large models feel it: a jailbreak of 500 tokens costs ten times what
        the bare request does."""
        prompts = self.study.prompts(Split.VALIDATION, self.sizes.causal_prompts, *ATTACKS)
        lengths = [len(encode(self.study.lm, prompt.messages)) for prompt in prompts]
        left = self.sizes.search_flops / (2 * self._parameters * SEARCHED)
        kept: set[int] = set()
        for place in sorted(range(len(prompts)), key=lengths.__getitem__):
            left -= lengths[place]
            if left < 0 and len(kept) >= LEAST_PROMPTS:
                break
            kept.add(place)
        return [(prompts[place], lengths[place]) for place in sorted(kept)]

    def tries(self, tokens: int) -> int:
        """How many plans a search may try on so many tokens."""
        return int(self.sizes.search_flops / (2 * self._parameters * max(1, tokens)))

    @cached_property
    def _parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.study.lm.model.parameters())

    def affordable(self, candidates: Sequence[int], tokens: int) -> list[int]:
        """As many candidate features as may each be tried on `tokens` tokens: those whose activations tell harmful from
        harmless prompts best, in the order of `candidates`."""
        n = self.tries(tokens)
        if n >= len(candidates):
            return list(candidates)
        strength: Float[np.ndarray, " d_sae"] = np.abs(self.table.refusal_score)
        best = set(sorted(candidates, key=lambda feature: -strength[feature])[: max(1, n)])
        return [feature for feature in candidates if feature in best]
