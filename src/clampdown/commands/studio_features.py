"""The studio's features: what each promotes, the scores of sets that runs left behind, cards, and plans made of one."""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from clampdown.activations.capture import capture
from clampdown.activations.sinks import sinks_at
from clampdown.config import ORGANISM
from clampdown.discovery.finders import DEFAULT, run_finder
from clampdown.discovery.ranking import token_effects
from clampdown.errors import ClampdownError, FeatureSetMismatchError, PromptSetError
from clampdown.featuresets import check_made_for, merge
from clampdown.models.chat import encode
from clampdown.models.loading import LanguageModel
from clampdown.reports.card_page import build_card_page
from clampdown.saes.sae import Sae
from clampdown.serving.studio.workbench import FeatureRow
from clampdown.steering.plan import Plan
from clampdown.steering.units import Strength
from clampdown.store import read_feature_set, write_feature_set
from clampdown.study.card import make_card
from clampdown.study.features import ShowRequest, prompts_of
from clampdown.study.groundwork import Groundwork
from clampdown.study.plan import Request as PlanRequest
from clampdown.study.plan import calibration_prompts, plan_of
from clampdown.study.progress import Stages
from clampdown.study.prompts import embedded_prompts
from clampdown.study.sizes import QUICK
from clampdown.study.study import Study, judge_for
from clampdown.types import FeatureSet, Message

CARDS_KEPT, CARD_PROMPTS, ROWS_AT_ONCE, TOKENS, MANY = 64, 24, 128, 8, 16
MOST_EFFECTS = 2**36
"""Multiplications up to which every feature's promoted tokens are computed: about a minute of one core."""
FOUND = "studio"
Tick = Callable[[int, int], None]


@dataclass
class Explorer:
    """Features of one SAE. `lm` is for reading only; sets are searched below `runs`, and new ones written there."""

    lm: LanguageModel
    sae: Sae
    runs: Path
    model: str
    prompts: Path | None = None
    _cards: dict[int, str] = field(default_factory=dict)
    _sets: tuple[FeatureSet, ...] | None = None
    _busy: threading.Lock = field(default_factory=threading.Lock)

    @property
    def scores(self) -> tuple[str, ...]:
        """Every score that the sets have; those that rank many features come first."""
        found = self._merged
        if found is None:
            return ()
        return tuple(sorted(found.score_names, key=lambda name: sum(map(math.isfinite, found.column(name))) < MANY))

    def listed(self, query: str, sort: str) -> tuple[FeatureRow, ...]:
        """Features whose number or promoted tokens match: the very number first, then the best by the score, and those
        without it at the end."""
        wanted = query.strip().casefold()
        rows = [row for row in self._rows(sort) if _matches(row, wanted)]
        return tuple(sorted(rows, key=lambda row: (str(row.feature) != wanted, row.score is None, -(row.score or 0.0))))

    def on_text(self, words: str) -> tuple[FeatureRow, ...]:
        """Features that are active on these words, as a user's message, by their largest activation on them."""
        (read,) = capture(self.lm, [encode(self.lm, (Message("user", words),))], self.sae.cfg.site)
        here = read.residuals[self.sae.cfg.site]
        written = (read.content & sinks_at(self.lm, [self.sae.cfg.site])[self.sae.cfg.site].outside(here))[0]
        if not written.any():
            return ()
        with torch.no_grad():
            codes = self.sae.encode(here[0, written].to(self.sae.device, self.sae.dtype)).float()
        largest = codes.amax(dim=0).cpu()
        order = largest.argsort(descending=True)[: int((largest > 0).sum())].tolist()
        return tuple(FeatureRow(feature, float(largest[feature]), self._promoted(feature)) for feature in order)

    def _rows(self, sort: str) -> list[FeatureRow]:
        found, width = self._merged, self.sae.cfg.d_sae
        column = found.column(sort) if found is not None and sort in found.score_names else ()
        scores = [float(value) if math.isfinite(value) else None for value in column]
        scores += [None] * (width - len(scores))
        return [FeatureRow(feature, score, self._promoted(feature)) for feature, score in enumerate(scores)]

    def card(self, feature: int, tick: Tick) -> str:
        """The card as a page; measured at the first call. Raises `FeatureIndexError`, `PromptSetError`."""
        if feature not in self._cards:
            with self._busy:
                made = make_card(self.lm, self.sae, feature, self._card_prompts(), self._known, on_progress=tick)
            while len(self._cards) >= CARDS_KEPT:
                self._cards.pop(next(iter(self._cards)))
            self._cards[feature] = build_card_page(made)
        return self._cards[feature]

    def _card_prompts(self) -> list:
        if self.prompts is None and self.model != ORGANISM:
            return []
        return prompts_of(ShowRequest(self.prompts, limit=CARD_PROMPTS))

    def find(self, tick: Tick) -> None:
        """Score features with the default finder. Raises `PromptSetError` for a model without prompts of its own."""
        if self.model != ORGANISM:
            raise PromptSetError(
                "features of this model are found with prompts of your own",
                hint=f"clampdown discover --harmful FILE --harmless FILE --out {self.runs.name}/discover",
            )
        data = embedded_prompts()
        judge = judge_for(None, self.lm, data)
        study = Study(self.lm, self.sae, data, judge, judge.name)
        with self._busy:
            ground = Groundwork(study, QUICK, Stages(Console(quiet=True)))
            given = dataclasses.replace(ground.given, on_progress=tick)
            found = run_finder(DEFAULT, given)
        write_feature_set(self.runs / FOUND / "features" / f"{found.finder}.json", found)
        self._sets = None
        self._cards.clear()

    def steer(self, feature: int, tick: Tick) -> Plan:
        """A clamp of the feature at 1.5 times its largest activation, in the prompt. Raises `StrengthError` for one
        that never fired."""
        prompts = calibration_prompts(self.model, self.prompts)
        request = PlanRequest((feature,), (Strength.parse("1.5max"),), scope="prompt", name=f"clamp {feature} prompt")
        return plan_of(self.lm, self.sae, request, prompts)

    # ---- sets ------------------------------------------------------------------------------------------------

    @property
    def _known(self) -> tuple[FeatureSet, ...]:
        """The newest set of each finder that is about this SAE."""
        if self._sets is None:
            files = [*self.runs.glob("*/features/*.json"), *self.runs.glob("*/*.json")]
            newest = sorted(files, key=lambda path: -path.stat().st_mtime)
            sets: dict[str, FeatureSet] = {}
            for found in filter(None, map(self._read, newest)):
                sets.setdefault(found.finder, found)
            self._sets = tuple(sets.values())
        return self._sets

    def _read(self, path: Path) -> FeatureSet | None:
        if path.stem in ("summary", "manifest"):
            return None
        try:
            found = read_feature_set(path)
            check_made_for(found, sae=self.sae.name, revision=self.sae.revision, site=self.sae.cfg.site.name)
        except (ClampdownError, FeatureSetMismatchError):
            return None
        return found

    @property
    def _merged(self) -> FeatureSet | None:
        return functools.reduce(merge, self._known) if self._known else None

    # ---- tokens ----------------------------------------------------------------------------------------------

    def _promoted(self, feature: int) -> tuple[str, ...]:
        return self._tokens.get(feature, ())

    @functools.cached_property
    def _tokens(self) -> dict[int, tuple[str, ...]]:
        """What each feature promotes; of a very large SAE only what its sets say."""
        rows = self.sae.W_dec
        vocabulary = self.lm.model.get_output_embeddings().weight.shape[0]
        if rows.shape[0] * rows.shape[1] * vocabulary > MOST_EFFECTS:
            kept = (score for found in self._known for score in found.features)
            return {score.feature: score.promoted_tokens for score in kept if score.promoted_tokens}
        found: dict[int, tuple[str, ...]] = {}
        for start in range(0, len(rows), ROWS_AT_ONCE):
            effects = token_effects(self.lm, rows[start : start + ROWS_AT_ONCE])
            for offset, ids in enumerate(effects.topk(TOKENS).indices.tolist()):
                found[start + offset] = tuple(self.lm.tokenizer.decode([token]) for token in ids)
        return found


def _matches(row: FeatureRow, wanted: str) -> bool:
    if not wanted:
        return True
    if wanted.isdigit():
        return str(row.feature).startswith(wanted)
    return any(wanted in token.casefold() for token in row.promoted)
