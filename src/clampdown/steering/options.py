"""Log-likelihoods of continuations under many arms: a prompt is read once, its continuations are read from its cache.

1. The prompts of a batch run once, arms sharing what their plans cannot change (`prompt_sharing.py`). Every row then
   has the keys and values of its prompt and the distribution of the token after it.
2. Rows are repeated for their continuations, which run in one short pass over the cache.

A continuation's tokens count as generated, as they do when a model writes them itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clampdown.models.chat import pad_left
from clampdown.models.generation import growing_cache
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import FeatureSource
from clampdown.steering.hooks import steer
from clampdown.steering.plan import Plan
from clampdown.steering.prompt_sharing import distinct


@dataclass(frozen=True, slots=True)
class Continued:
    """A plan (or None), the prompt's token ids, and continuations of it. `ended`: the end of the turn counts too."""

    plan: Plan | None
    prompt: Sequence[int]
    continuations: tuple[tuple[int, ...], ...]
    ended: bool = False


@torch.no_grad()
def continuation_log_likelihoods(
    lm: LanguageModel, saes: FeatureSource | Sequence[FeatureSource] | None, rows: Sequence[Continued]
) -> list[tuple[float, ...]]:
    """For every row, the log-likelihood in nats of each of its continuations after its prompt, as one batch."""
    prompts, prompt_of = distinct([row.prompt for row in rows])
    batch = pad_left(prompts, lm.pad_id, lm.device)
    cache = growing_cache()
    plans = [row.plan for row in rows]
    width = batch.input_ids.shape[1]
    with steer(lm, plans, saes, prompt_width=width, require_reach=False, prompt_of=prompt_of) as steering:
        first = lm.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        row_of = steering.row_map.row_of.tolist()
        texts = _Texts.of(rows, row_of, lm)
        shown = steering.row_map.prompt_of[texts.source]
        log_probs = first.float().log_softmax(-1)[texts.source, None]
        if texts.ids.shape[1] > 0:
            cache.batch_select_indices(texts.source)
            steering.keep_rows(texts.source)
            mask = torch.cat([batch.attention_mask[shown], texts.real.long()], dim=1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, width:]
            rest = lm.model(
                input_ids=texts.ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).logits
            log_probs = torch.cat([log_probs, rest.float().log_softmax(-1)], dim=1)
    values = texts.score(log_probs, sorted(lm.eos_ids))
    return [tuple(values[row, i] for i in range(len(rows[r].continuations))) for r, row in enumerate(row_of)]


@dataclass(frozen=True, slots=True)
class _Texts:
    """The distinct (output row, continuation) pairs as one right-padded batch. `source` is each one's output row."""

    keys: tuple[tuple[int, int], ...]
    wholes: tuple[tuple[tuple[int, ...], bool], ...]
    source: Int[Tensor, " texts"]
    ids: Int[Tensor, "texts pos"]
    real: Bool[Tensor, "texts pos"]

    @classmethod
    def of(cls, rows: Sequence[Continued], row_of: Sequence[int], lm: LanguageModel) -> _Texts:
        """The tokens to feed: all but the last of a continuation, which predicts nothing that counts, unless its end
        does. Output rows that several rows share are read for the first of them."""
        wholes = {
            (output, i): (tokens, row.ended)
            for row, output in zip(rows, row_of, strict=True)
            for i, tokens in enumerate(row.continuations)
        }
        fed = [tokens if ended else tokens[:-1] for tokens, ended in wholes.values()]
        width = max(map(len, fed), default=0)
        ids = [[*tokens, *[lm.pad_id] * (width - len(tokens))] for tokens in fed]
        real = [[True] * len(tokens) + [False] * (width - len(tokens)) for tokens in fed]
        return cls(
            keys=tuple(wholes),
            wholes=tuple(wholes.values()),
            source=torch.tensor([output for output, _ in wholes], dtype=torch.long, device=lm.device),
            ids=torch.tensor(ids, dtype=torch.long, device=lm.device).view(len(fed), width),
            real=torch.tensor(real, dtype=torch.bool, device=lm.device).view(len(fed), width),
        )

    def score(
        self, log_probs: Float[Tensor, "texts predicted vocab"], end_ids: Sequence[int]
    ) -> dict[tuple[int, int], float]:
        """Log-likelihood of every continuation; its end counts as any of the tokens that end a turn."""
        values = {}
        for key, (tokens, ended), row in zip(self.keys, self.wholes, log_probs, strict=True):
            index = torch.tensor(tokens, dtype=torch.long, device=row.device)
            total = row[torch.arange(len(tokens), device=row.device), index].sum()
            if ended:
                total = total + row[len(tokens), list(end_ids)].logsumexp(0)
            values[key] = float(total)
        return values
