"""Greedy generation of one batch: left padded, KV cached, rows leave as soon as they end.

1. One forward over the padded prompts fills the cache and gives each row's first token.
2. Every further forward feeds one token per live row. The cache writes in place into a buffer with room to grow:
   a cache that concatenates copies itself whole at every token.
3. A row that emits an end token leaves before the next forward: the last live row moves into its place, so that leaving
   costs one row's copy. `on_keep` tells per-row steering which row is now where.

Everything goes through the model's own forward, so hooks fire exactly as they do in the library's `generate`, to
which this is equal token for token (tested). Penalties that the model's generation config asks for are applied as
there, its sampling is not: this is greedy (`generation_config.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from clampdown.models.chat import ChatFormat, pad_left
from clampdown.models.generation_config import Asked, Penalties
from clampdown.models.loading import LanguageModel
from clampdown.models.voice import Voice

KeepFn = Callable[[Int[Tensor, " kept"]], None]
WidenFn = Callable[[], Int[Tensor, " rows"]]
_ROOM = 64  # positions of growth room, at least


@dataclass(frozen=True, slots=True)
class Generation:
    """A reply: its tokens without the end token, its text, and whether it ended by itself.

    Where the template opens the reply's thoughts, the text begins with the mark that opens them.
    """

    ids: tuple[int, ...]
    text: str
    finished: bool


class GrowingLayer(DynamicLayer):
    """One block's keys and values [batch, heads, pos, head_dim], views of buffers with room to grow in place."""

    keys: Any  # Tensor; None in the library's layer until the first update
    values: Any

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append along `pos`; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        keys, values = self._room(end)
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def _room(self, end: int) -> tuple[Tensor, Tensor]:
        """Buffers of the live batch with at least `end` positions, holding what is cached."""
        batch = self.keys.shape[0]
        if self._buffers is not None and self._buffers[0].shape[2] >= end and self._owns(self.keys):
            return self._buffers[0][:batch], self._buffers[1][:batch]
        grown = tuple(_with_room(cached, end + max(_ROOM, end // 4)) for cached in (self.keys, self.values))
        self._buffers = (grown[0], grown[1])
        return self._buffers

    def _owns(self, cached: Tensor) -> bool:
        """False after the library has replaced the views (crop, repeat): then the buffer is stale."""
        return self._buffers is not None and cached.data_ptr() == self._buffers[0].data_ptr()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row i becomes what row indices[i] was. Only rows that move are copied."""
        if self.is_initialized:  # on a spread model, on its block's device
            indices = indices.to(self.device)
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero().flatten()
        if self._buffers is None or not self._owns(self.keys) or len(indices) > self.keys.shape[0]:
            super().batch_select_indices(indices)
            return
        if len(moved):
            self.keys[moved] = self.keys[indices[moved]]
            self.values[moved] = self.values[indices[moved]]
        self.keys, self.values = self.keys[: len(indices)], self.values[: len(indices)]


def _with_room(cached: Float[Tensor, "batch heads pos dim"], capacity: int) -> Float[Tensor, "batch heads cap dim"]:
    batch, heads, length, dim = cached.shape
    buffer = cached.new_empty((batch, heads, capacity, dim))
    buffer[:, :, :length] = cached
    return buffer


def growing_cache() -> Cache:
    """An empty cache of `GrowingLayer`s, one per block, made as blocks ask for it."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def generate(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    on_keep: KeepFn | None = None,
    on_step: Callable[[int], None] | None = None,
    widened: WidenFn | None = None,
) -> list[Generation]:
    """Greedy replies to token-id prompts, in one batch.

    `widened()` is asked after the first forward: something in it may have made several rows of one prompt (steering
    many arms at once), and row i of its output then shows prompt widened()[i]. There is one reply per row.
    `on_keep(rows)` is called just before a forward with fewer rows than the last: row i now is what row rows[i] was
    (not necessarily ascending). `on_step(n)` is called after every forward with the number of tokens it produced.

    Raises `ModelError` for a generation config that asks for another way of decoding (beams, guidance).
    """
    if not prompts or max_new_tokens < 1:
        return [Generation((), "", False) for _ in prompts]
    decoding = _Decoding(lm, prompts, max_new_tokens)
    with torch.no_grad():
        for step in range(max_new_tokens):
            produced = decoding.advance(step, on_keep, widened)
            if on_step is not None:
                on_step(produced)
            if decoding.done:
                break
    return decoding.results()


class _Decoding:
    """The state of one batch being decoded. `rows[i]` is the prompt that live row i answers."""

    def __init__(self, lm: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.lm = lm
        batch = pad_left(prompts, lm.pad_id, lm.device)
        wanted = Asked.of(lm.model.generation_config, greedy=True).penalties
        self.prompts = [list(prompt) for prompt in prompts]
        self.penalties = [Penalties(wanted, len(prompt), lm.eos_ids, lm.device) for prompt in prompts]
        self.cache = growing_cache()
        n, width = batch.input_ids.shape
        self.ids = batch.input_ids
        self.positions = batch.position_ids
        self.mask = torch.ones((n, width + max_new_tokens), dtype=torch.long, device=lm.device)
        self.mask[:, :width] = batch.attention_mask
        self.width = width
        self.eos = torch.tensor(sorted(lm.eos_ids), device=lm.device)
        self.max_new_tokens = max_new_tokens
        self._start(n)

    def _start(self, n: int) -> None:
        self.rows = torch.arange(n)
        self.tokens = torch.full((n, self.max_new_tokens), -1, dtype=torch.long)
        self.ended = torch.zeros(n, dtype=torch.bool)  # of the live rows
        self.finished = torch.zeros(n, dtype=torch.bool)

    def _widen(self, prompt_of: Int[Tensor, " rows"]) -> None:
        self.mask, self.positions = self.mask[prompt_of], self.positions[prompt_of]
        self.prompts = [self.prompts[i] for i in prompt_of.tolist()]
        self.penalties = [self.penalties[i] for i in prompt_of.tolist()]
        self._start(len(prompt_of))

    @property
    def done(self) -> bool:
        return bool(self.ended.all())

    def advance(self, step: int, on_keep: KeepFn | None, widened: WidenFn | None) -> int:
        """One forward of the live rows; returns how many tokens it produced."""
        if bool(self.ended.any()):
            self._leave(on_keep)
        output = self.lm.model(
            input_ids=self.ids,
            attention_mask=self.mask[:, : self.width + step],
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if step == 0 and widened is not None:
            self._widen(widened())
        chosen = self._penalised(output.logits[:, -1], step).argmax(-1)
        self.ended = torch.isin(chosen, self.eos).cpu()
        self.tokens[self.rows, step] = chosen.cpu()
        self.finished[self.rows] = self.ended
        self.ids = chosen[:, None]
        self.positions = self.positions[:, -1:] + 1
        return len(chosen)

    def _penalised(self, logits: Float[Tensor, "rows vocab"], step: int) -> Float[Tensor, "rows vocab"]:
        if not any(self.penalties):
            return logits
        histories = [(row, [*self.prompts[row], *self.tokens[row, :step].tolist()]) for row in self.rows.tolist()]
        return torch.stack([self.penalties[row](past, logits[i]) for i, (row, past) in enumerate(histories)])

    def _leave(self, on_keep: KeepFn | None) -> None:
        """Drop ended rows; live rows from the end fill the places they leave."""
        kept = _fill_holes(self.ended).to(self.lm.device)
        self.cache.batch_select_indices(kept)
        self.ids, self.positions, self.mask = self.ids[kept], self.positions[kept], self.mask[kept]
        self.rows = self.rows[kept.cpu()]
        if on_keep is not None:
            on_keep(kept)

    def results(self) -> list[Generation]:
        rows = zip(self.prompts, self.tokens.tolist(), self.finished.tolist(), strict=True)
        return [self._result(prompt, row, finished) for prompt, row, finished in rows]

    def _result(self, prompt: list[int], row: list[int], finished: bool) -> Generation:
        ids = tuple(token for token in row if token >= 0 and token not in self.lm.eos_ids)
        return Generation(ids, reply_text(self.lm.tokenizer, prompt, ids), finished)


def reply_text(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """A reply as text, without control tokens. Marks of thoughts stay, and the one that the template itself wrote at
    the end of the prompt comes first: so the text alone says where the answer begins."""
    decode = tokenizer.decode
    if not getattr(tokenizer, "chat_template", None):
        return decode(ids, skip_special_tokens=True)
    marks, chat = Voice.of(tokenizer).marks, ChatFormat.kept(tokenizer)
    opened = bool(chat.opening) and tuple(prompt[-len(chat.generation_prompt) :]) == chat.generation_prompt
    runs = groupby(ids, key=lambda token: token if token in marks else None)
    pieces = [decode(list(run), skip_special_tokens=True) if mark is None else marks[mark] for mark, run in runs]
    return (chat.opening if opened else "") + "".join(pieces)


def _fill_holes(ended: Tensor) -> Int[Tensor, " kept"]:
    """Rows to keep, such that as few as possible move: rows from the end fill the places of ended rows."""
    n_kept = int((~ended).sum())
    kept = torch.arange(n_kept)
    kept[ended[:n_kept]] = (~ended[n_kept:]).nonzero().flatten() + n_kept
    return kept


@torch.no_grad()
def next_token_logits(lm: LanguageModel, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "batch vocab"]:
    """Logits of the token after each prompt: one forward, no cache, the last position only."""
    batch = pad_left(prompts, lm.pad_id, lm.device)
    output = lm.model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=1,
    )
    return output.logits[:, -1]
