"""A gate's promise per conversation: fitted on lone turns, calibrated on benign conversations of many turns.

1. The fit sees each prompt's last turn alone, because that is how a gate with a `window` reads it.
2. Benign prompts follow each other until a conversation has n windows, and its score is its worst window's.
3. The threshold is chosen on these maxima. A shorter conversation is the beginning of a longer one, and its worst turn
   is no worse: one bound holds for 1, 2, ... n turns at once.

More turns ask for more prompts. The promise is made for as many as the prompts can prove, `TURNS` at most, with room
for one trigger: a threshold that is the largest score of all is set by a single odd prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from clampdown.models.chat import encode
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import FeatureSource
from clampdown.steering.gate_fitting import FittedGate
from clampdown.steering.gates import upper_bound
from clampdown.steering.turn_reading import read_prompts, window_scores
from clampdown.steering.windows import LoneTurn
from clampdown.types import Message, Prompt

TURNS = 9
"""A request after eight benign turns."""
ROUNDING = 1e-5
"""In standard deviations of the scores."""


def last_turns(prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """Each prompt's last turn alone: what makes a harmful prompt harmful, as far as its label says."""
    return tuple(p if len(p.messages) == 1 else replace(p, messages=p.messages[-1:]) for p in prompts)


def longest_turn(lm: LanguageModel, prompts: Sequence[Prompt]) -> int:
    """The tokens of the longest user turn: the window of a gate that is made with these prompts."""
    lone = LoneTurn.of(lm)
    texts = {message.content for prompt in prompts for message in prompt.messages if message.role == "user"}
    longest = max((len(encode(lm, [Message("user", text)])) for text in texts), default=0)
    return max(longest - len(lone.before) - len(lone.after), 1)


@dataclass(frozen=True, slots=True)
class Turnwise:
    """What makes a fitted gate one that reads turn by turn: the model and SAE it reads, its window, and the promise."""

    lm: LanguageModel
    sae: FeatureSource | None
    window: int
    confidence: float = 0.95
    most: int = TURNS

    def within(self, fitted: FittedGate, benign: Sequence[Prompt], budget: float) -> FittedGate:
        """With the threshold that keeps triggers within the budget on benign conversations.

        Raises `NotEnoughDataError`, naming the n that would do, when the prompts cannot prove it for one turn.
        """
        fitted = fitted.changed(window=self.window)
        scores, owner = window_scores(self.lm, fitted.gate, fitted.vectors, self.sae, benign)
        turns = provable_turns(owner, budget, self.confidence, self.most)
        maxima = conversation_maxima(scores, owner, turns)
        found = fitted.calibrated(maxima, budget=budget, confidence=self.confidence)
        return _apart(found, maxima).changed(turns_calibrated=turns)

    def at_last(
        self, fitted: FittedGate, prompts: Sequence[Prompt], budget: float, on: Literal["benign", "harmful"]
    ) -> FittedGate:
        """For a gate that turns refusals down: it reads the last turn, of prompts which it must leave alone. Raises as
        above."""
        fitted = fitted.changed(window=self.window, turns="last")
        read = read_prompts(self.lm, fitted.gate, fitted.vectors, self.sae, prompts)
        scores = np.array([reading.score for reading in read], dtype=float)
        return _apart(fitted.calibrated(scores, budget=budget, confidence=self.confidence, on=on), scores)


def _apart(fitted: FittedGate, scores: Float[np.ndarray, " n"]) -> FittedGate:
    """The threshold is one of the scores: a hair above it, so that rounding in another batch does not open the gate."""
    return fitted.changed(threshold=fitted.gate.threshold + ROUNDING * max(float(scores.std()), 1e-3))


def conversation_maxima(
    scores: Float[np.ndarray, " windows"], owner: Int[np.ndarray, " windows"], turns: int
) -> Float[np.ndarray, " conversations"]:
    """The worst score of each conversation of `turns` windows, made of prompts in their order; no prompt is in two.
    For one turn: of each prompt as it is."""
    if turns == 1:
        return np.array([scores[owner == prompt].max() for prompt in np.unique(owner)], dtype=float)
    maxima: list[float] = []
    filling: list[float] = []
    full = -1
    for score, prompt in zip(scores.tolist(), owner.tolist(), strict=True):
        if prompt == full:
            continue
        filling.append(score)
        if len(filling) == turns:
            maxima.append(max(filling))
            filling, full = [], prompt
    return np.array(maxima, dtype=float)


def provable_turns(owner: Int[np.ndarray, " windows"], budget: float, confidence: float, most: int) -> int:
    """The longest conversations of which there are enough to prove the budget with one trigger; 1 if there are none."""
    blank = np.zeros(len(owner))
    lengths = (turns for turns in range(most, 1, -1) if _enough(blank, owner, turns, budget, confidence))
    return next(lengths, 1)


def _enough(
    blank: Float[np.ndarray, " windows"], owner: Int[np.ndarray, " windows"], turns: int, budget: float, conf: float
) -> bool:
    return upper_bound(1, len(conversation_maxima(blank, owner, turns)), conf) <= budget
