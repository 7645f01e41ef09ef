"""Screening: what many plans at one site do to many texts, without generating and without repeating what they share.

1. The texts are cut into length-bucketed batches, and each batch runs once through the blocks that no plan changes.
2. A batch is widened to (plans x texts) rows, every row steered by its own plan, and goes on from there.

Two measures are made of it: the change of the refusal log-odds at the first reply token, and on benign text the
KL(unsteered || steered) per predicted token of the unsteered model's own replies, by teacher forcing. `match_strengths`
finds for each candidate the strength at which it costs a given KL, so that candidates are compared at equal harm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clampdown.activations.capture import length_buckets
from clampdown.activations.collect import Progress
from clampdown.activations.continuation import (
    Prefix,
    continue_logits,
    forward_logits,
    last_shared_layer,
    read_prefix,
    repeated,
)
from clampdown.discovery.refusal_tokens import RefusalTokens, refusal_log_odds
from clampdown.errors import NotEnoughDataError, PromptSetError
from clampdown.models.chat import Batch, encode
from clampdown.models.generation import generate
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Plan
from clampdown.types import Prompt, Site

TOKENS_PER_BATCH = 8192


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt's token ids and, for teacher forcing, the tokens of a reply to present after it."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + len(self.reply)

    @classmethod
    def answered(cls, prompt: Sequence[int], reply: Sequence[int], *, ended: bool) -> Text:
        """A prompt and its reply. The last token of a reply that was cut off predicts nothing that is scored."""
        return cls(tuple(prompt), tuple(reply) if ended else tuple(reply[:-1]))


@dataclass(frozen=True)
class Block:
    """Texts of about equal length as one batch: prompts padded on the left, replies on the right, so that all prompts
    end at column `width`."""

    texts: tuple[int, ...]
    batch: Batch
    width: int

    @property
    def n_predicted(self) -> int:
        """Columns that predict something: the last of the prompt and every one of the reply."""
        return self.batch.input_ids.shape[1] - self.width + 1

    @cached_property
    def predicts(self) -> Bool[Tensor, "rows predicted"]:
        """Which of them belong to the row: the prompt's last column, and the row's own reply."""
        replies = self.batch.attention_mask[:, self.width :].bool()
        return torch.cat([replies.new_ones(len(replies), 1), replies], dim=1)


def make_block(texts: Sequence[Text], rows: Sequence[int], pad_id: int, device: torch.device) -> Block:
    """Stack some of the texts."""
    chosen = [texts[i] for i in rows]
    width, tail = max(len(t.prompt) for t in chosen), max(len(t.reply) for t in chosen)
    ids = torch.full((len(chosen), width + tail), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(chosen):
        span = slice(width - len(text.prompt), width + len(text.reply))
        ids[row, span] = torch.tensor([*text.prompt, *text.reply])
        mask[row, span] = 1
    return Block(tuple(rows), Batch(ids.to(device), mask.to(device)), width)


@dataclass
class Screen:
    """Logits of (plans x texts), plan by plan and batch by batch; what plans share is computed once and kept.

    Gates are part of a plan and read at their own sites, so a plan's lowest site decides what can be shared.
    """

    lm: LanguageModel
    sae: Sae | None
    texts: Sequence[Text]
    tokens_per_batch: int = TOKENS_PER_BATCH
    on_progress: Progress | None = None
    _prefixes: dict[tuple[int, int], Prefix] = field(default_factory=dict)

    @cached_property
    def blocks(self) -> list[Block]:
        """Small enough that a batch holds several plans' rows of a block, so that a lone plan never needs much."""
        buckets = length_buckets([len(text) for text in self.texts], max(1, self.tokens_per_batch // 4))
        return [make_block(self.texts, rows, self.lm.pad_id, self.lm.device) for rows in buckets]

    def logits(
        self, plans: Sequence[Plan | None]
    ) -> Iterator[tuple[Block, range, Float[Tensor, "plans rows predicted vocab"]]]:
        """For each block and each run of plans that fit into one batch: the logits at the predicting columns."""
        layer = self._shared_layer(plans)
        total, done = len(plans) * len(self.texts), 0
        for number, block in enumerate(self.blocks):
            per_batch = max(1, self.tokens_per_batch // block.batch.input_ids.numel())
            for start in range(0, len(plans), per_batch):
                chunk = range(start, min(start + per_batch, len(plans)))
                yield block, chunk, self._run(number, [plans[i] for i in chunk], layer)
                done += len(chunk) * len(block.texts)
                if self.on_progress:
                    self.on_progress(done, total)

    def _run(self, number: int, plans: Sequence[Plan | None], layer: int | None) -> Tensor:
        block = self.blocks[number]
        n_rows = len(block.texts)
        prefix = None if layer is None else self._prefix(number, layer).widened(len(plans))
        rows = [plan for plan in plans for _ in range(n_rows)]
        with torch.no_grad(), steer(self.lm, rows, self.sae, prompt_width=block.width):
            if prefix is None:
                logits = forward_logits(self.lm, repeated(block.batch, len(plans)), keep=block.n_predicted)
            else:
                logits = continue_logits(self.lm, prefix, keep=block.n_predicted)
        return logits.unflatten(0, (len(plans), n_rows))

    def _prefix(self, number: int, layer: int) -> Prefix:
        if (number, layer) not in self._prefixes:
            self._prefixes[number, layer] = read_prefix(self.lm, self.blocks[number].batch, layer)
        return self._prefixes[number, layer]

    def _shared_layer(self, plans: Sequence[Plan | None]) -> int | None:
        sites = {edit.site for plan in plans if plan for edit in plan.all_edits}
        read = (reader.site for plan in plans if plan for gate in plan.gates for reader in gate.readers)
        sites |= {site for site in read if site}
        if not sites and self.sae is not None:
            sites = {self.sae.cfg.site.name}
        return last_shared_layer([Site.parse(name) for name in sites]) if sites else None


class PrefillRefusal:
    """Measure: mean over prompts of the refusal log-odds under a plan minus those of the unsteered model, in nats.

    `baseline` are the unsteered log-odds, prompt by prompt.
    """

    def __init__(
        self,
        lm: LanguageModel,
        sae: Sae | None,
        prompts: Sequence[Prompt],
        tokens: RefusalTokens,
        *,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        on_progress: Progress | None = None,
    ) -> None:
        """Reads the unsteered model once. Raises `PromptSetError` without prompts."""
        if not prompts:
            raise PromptSetError("no validation prompts to measure refusal on")
        self._tokens = tokens
        self._screen = Screen(lm, sae, [Text(tuple(encode(lm, p.messages))) for p in prompts], tokens_per_batch)
        self.baseline = self.log_odds([None])[0]
        self._screen.on_progress = on_progress

    def __call__(self, plans: Sequence[Plan]) -> list[float]:
        return (self.log_odds(plans) - self.baseline).mean(1).tolist() if plans else []

    def log_odds(self, plans: Sequence[Plan | None]) -> Float[Tensor, "plans prompts"]:
        """The log-odds themselves, float64."""
        found = torch.empty(len(plans), len(self._screen.texts), dtype=torch.float64)
        for block, chunk, logits in self._screen.logits(plans):
            values = refusal_log_odds(logits[:, :, -1].flatten(0, 1), self._tokens).view(len(chunk), -1)
            found[chunk.start : chunk.stop, list(block.texts)] = values.cpu()
        return found


class BenignKl:
    """Measure: KL(unsteered || steered) in nats per predicted token, on the unsteered model's own replies to benign
    prompts, cut after `max_new_tokens`. The same number as `evaluation.utility` reports on the same texts."""

    def __init__(
        self,
        lm: LanguageModel,
        sae: Sae | None,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 12,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        on_progress: Progress | None = None,
    ) -> None:
        """Lets the unsteered model answer once. Raises `PromptSetError` without prompts."""
        if not prompts:
            raise PromptSetError("no benign prompts to measure the cost of steering on")
        ids = [encode(lm, prompt.messages) for prompt in prompts]
        replies = generate(lm, ids, max_new_tokens=max_new_tokens)
        texts = [
            Text.answered(prompt, reply.ids, ended=reply.finished) for prompt, reply in zip(ids, replies, strict=True)
        ]
        self._read(Screen(lm, sae, texts, tokens_per_batch), on_progress)

    @classmethod
    def of_texts(cls, lm: LanguageModel, sae: Sae | None, texts: Sequence[Text]) -> BenignKl:
        """The same on replies that are there already. Raises `PromptSetError` without texts."""
        if not texts:
            raise PromptSetError("no benign replies to measure the cost of steering on")
        found = cls.__new__(cls)
        found._read(Screen(lm, sae, texts), None)
        return found

    def _read(self, screen: Screen, on_progress: Progress | None) -> None:
        self._screen = screen
        self._base = {block.texts: logits[0].log_softmax(-1) for block, _, logits in screen.logits([None])}
        screen.on_progress = on_progress

    def __call__(self, plans: Sequence[Plan]) -> list[float]:
        total = torch.zeros(len(plans), dtype=torch.float64)
        for block, chunk, logits in self._screen.logits(plans):
            base = self._base[block.texts]
            kl = (base.exp() * (base - logits.float().log_softmax(-1))).sum(-1)
            total[chunk.start : chunk.stop] += kl.masked_fill(~block.predicts, 0.0).double().sum((1, 2)).cpu()
        n_predicted = sum(int(block.predicts.sum()) for block in self._screen.blocks)
        return (total / n_predicted).tolist()


PlanAt = Callable[[float], Plan]
Kl = Callable[[Sequence[Plan]], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Matched:
    """The strength found for one candidate and the KL it costs there; `ok`: within the tolerance of the goal."""

    plan: Plan
    strength: float
    kl: float
    ok: bool


@dataclass(slots=True)
class _Search:
    """One candidate's search in log strength: the latest trial, the nearest below and above the goal, the best."""

    strength: float
    below: tuple[float, float] | None = None
    above: tuple[float, float] | None = None
    best: tuple[float, float] | None = None

    def learn(self, kl: float, goal: float) -> None:
        """Take in what the trial cost and choose the next strength."""
        at = (math.log(self.strength), math.log(max(kl, 1e-12) / goal) if math.isfinite(kl) else 20.0)
        if self.best is None or abs(at[1]) < abs(self.best[1]):
            self.best = at
        if at[1] <= 0:
            self.below = at
        else:
            self.above = at
        self.strength = math.exp(self._next(*at))

    def _next(self, x: float, excess: float) -> float:
        """Between two sides, the secant kept away from both ends; else along KL ~ strength^2, in bounded steps."""
        if self.below is None or self.above is None:
            return x - min(max(excess / 2, -1.5), 1.5)
        (x0, y0), (x1, y1) = self.below, self.above
        share = min(max(-y0 / (y1 - y0), 0.1), 0.9)
        return x0 + share * (x1 - x0)


def match_strengths(
    plans_at: Sequence[PlanAt],
    kl: Kl,
    goal: float,
    start: Sequence[float],
    *,
    tolerance: float = 0.1,
    rounds: int = 10,
) -> list[Matched]:
    """For each candidate the strength at which it costs `goal` nats of benign KL, all candidates at once.

    A candidate that cannot get within `tolerance` (relative) in `rounds` trials keeps its nearest trial and is not
    `ok`: a clamp far below what a feature does by itself also costs, so some never come down to a small goal.
    """
    searches = [_Search(strength) for strength in start]
    for _ in range(rounds):
        open_ones = [i for i, s in enumerate(searches) if s.best is None or abs(s.best[1]) > tolerance]
        if not open_ones:
            break
        costs = kl([plans_at[i](searches[i].strength) for i in open_ones])
        for i, cost in zip(open_ones, costs, strict=True):
            searches[i].learn(float(cost), goal)
    return [_matched(plan_at, search, goal, tolerance) for plan_at, search in zip(plans_at, searches, strict=True)]


def _matched(plan_at: PlanAt, search: _Search, goal: float, tolerance: float) -> Matched:
    if search.best is None:
        raise NotEnoughDataError("no strength was tried")
    strength, excess = math.exp(search.best[0]), search.best[1]
    return Matched(plan_at(strength), strength, goal * math.exp(excess), abs(excess) <= tolerance)
