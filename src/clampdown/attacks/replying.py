"""Answers to attempts of all arms in shared batches: the likeliest reply, or one drawn at a temperature.

A reply is drawn by adding Gumbel noise to the logits and taking the largest, which is sampling, with noise that each
row has from its own seed: what a row says does not depend on who else is in the batch, and a run that is resumed draws
the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clampdown.attacks.attempt import Attempt
from clampdown.errors import ChatTemplateError
from clampdown.models.chat import encode, pad_left
from clampdown.models.loading import LanguageModel
from clampdown.models.memory import rows_that_fit
from clampdown.saes.sae import Sae
from clampdown.steering.arms import Arm, generate_batch
from clampdown.steering.hooks import steer
from clampdown.types import Message, Prompt, Receipt

SHORTEST = 0.6
"""Of a batch's longest prompt, the length of its shortest."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One attempt under one arm; `prompt` is what it is for."""

    arm: Arm
    prompt: Prompt
    attempt: Attempt

    def ids(self, lm: LanguageModel) -> list[int]:
        """The prompt's tokens, and those of a reply that is begun."""
        ids = encode(lm, self.messages)
        if self.attempt.begun:
            ids += lm.tokenizer(self.attempt.begun, add_special_tokens=False).input_ids
        return ids

    @property
    def messages(self) -> tuple[Message, ...]:
        return self.arm.messages(replace(self.prompt, messages=self.attempt.messages))


@dataclass(frozen=True, slots=True)
class Answer:
    """`text` with what was begun for it."""

    text: str
    n_tokens: int
    receipt: Receipt | None


def answers(
    lm: LanguageModel, saes: Sequence[Sae], asked: Sequence[Asked], max_new_tokens: int, batch_rows: int | None = None
) -> list[Answer]:
    """One answer per attempt, in order; an empty one to what is longer than the model reads, or cannot be written in
    its chat template."""
    ids = [_expressed(lm, each) for each in asked]
    longest = getattr(lm.layout.decoder.config, "max_position_embeddings", None) or sys.maxsize
    fits = [0 < len(prompt) <= longest - max_new_tokens for prompt in ids]
    found = {i: Answer(asked[i].attempt.begun, 0, None) for i in range(len(asked)) if not fits[i]}
    for drawn in (False, True):
        mine = [i for i, each in enumerate(asked) if fits[i] and (each.attempt.temperature > 0) is drawn]
        mine.sort(key=lambda i: (-len(ids[i]), ids[i]))
        for rows in _cut(lm, mine, ids, max_new_tokens, batch_rows):
            batch = [asked[i] for i in rows]
            shown = [ids[i] for i in rows]
            reply = _drawn if drawn else _likeliest
            found.update(zip(rows, reply(lm, saes, batch, shown, max_new_tokens), strict=True))
    return [found[i] for i in range(len(asked))]


def _expressed(lm: LanguageModel, asked: Asked) -> list[int]:
    """The prompt's tokens; none for a conversation that the template does not take."""
    try:
        return asked.ids(lm)
    except ChatTemplateError:
        return []


def _cut(
    lm: LanguageModel, order: Sequence[int], ids: Sequence[Sequence[int]], new: int, batch_rows: int | None
) -> list[list[int]]:
    """Longest first, as many rows as memory has room for, and none much shorter than the longest: padding costs what
    tokens cost."""
    batches: list[list[int]] = []
    room = longest = 0
    for row in order:
        if not batches or len(batches[-1]) >= room or len(ids[row]) < SHORTEST * longest:
            batches.append([])
            longest = len(ids[row])
            room = batch_rows or rows_that_fit(lm, longest + new)
        batches[-1].append(row)
    return batches


def _likeliest(
    lm: LanguageModel, saes: Sequence[Sae], batch: Sequence[Asked], ids: Sequence[list[int]], new: int
) -> list[Answer]:
    rows = [(each.arm, each.prompt, shown) for each, shown in zip(batch, ids, strict=True)]
    replies = generate_batch(lm, saes, rows, new)
    return [
        Answer(each.attempt.begun + reply.text, reply.n_tokens, reply.receipt)
        for each, reply in zip(batch, replies, strict=True)
    ]


def _drawn(
    lm: LanguageModel, saes: Sequence[Sae], batch: Sequence[Asked], ids: Sequence[list[int]], new: int
) -> list[Answer]:
    """By the library's own loop, inside a `steer` block."""
    shown = pad_left(ids, lm.pad_id, lm.device)
    plans = [each.arm.plan for each in batch]
    noise = GumbelNoise([each.attempt.seed for each in batch], [each.attempt.temperature for each in batch])
    with torch.no_grad(), steer(lm, plans, list(saes), require_reach=False) as steering:
        output = lm.model.generate(
            shown.input_ids,
            attention_mask=shown.attention_mask,
            max_new_tokens=new,
            do_sample=False,
            num_beams=1,
            pad_token_id=lm.pad_id,
            eos_token_id=sorted(lm.eos_ids),
            logits_processor=[noise],
            disable_compile=True,
        )
        receipts = steering.receipts()
    replies = output[:, shown.input_ids.shape[1] :].tolist()
    pairs = zip(batch, (_ended(row, lm.eos_ids) for row in replies), receipts, strict=True)
    return [
        Answer(each.attempt.begun + lm.tokenizer.decode(row, skip_special_tokens=True), len(row), receipt)
        for each, row, receipt in pairs
    ]


def _ended(ids: Sequence[int], ends: frozenset[int]) -> list[int]:
    found = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:found])


class GumbelNoise:
    """A logits processor: argmax of its output is a draw from softmax(logits / temperature), by each row's seed."""

    def __init__(self, seeds: Sequence[int], temperatures: Sequence[float]) -> None:
        self._draw = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperatures = torch.tensor(temperatures)[:, None]

    def __call__(self, input_ids: Int[Tensor, "rows pos"], scores: Float[Tensor, "rows vocab"]) -> Tensor:
        uniform = torch.stack([torch.rand(scores.shape[1], generator=draw) for draw in self._draw])
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        return scores / self._temperatures.to(scores.device) + gumbel.to(scores.device)
