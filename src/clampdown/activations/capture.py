"""Truncated forward: the residual at chosen sites of many prompts, with nothing computed above the highest one.

1. Sort prompts by length and cut them into batches of about equal length under a token budget.
2. Left-pad a batch and run the decoder (never the unembedding) with a hook on every site.
3. The hook that completes the set raises, which ends the forward there. All hooks are removed, whatever happens.

Batches come in length order, longest first so that a lack of memory shows at once; each says which prompts it holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clampdown.errors import PromptSetError
from clampdown.models.chat import Batch, pad_left
from clampdown.models.loading import LanguageModel
from clampdown.types import Site

DEFAULT_TOKENS_PER_BATCH = 4096

Visitor = Callable[[Float[Tensor, "batch pos d_model"]], None]


class _ReachedSite(BaseException):
    """Ends a forward pass. Not an `Exception`, so that no handler in modelling code can swallow it."""


@dataclass(frozen=True, slots=True)
class Captured:
    """One batch. `rows[i]` is the index, in the prompts given, of batch row i; `content` is True on tokens of
    message contents (not padding, BOS, special or template tokens)."""

    rows: tuple[int, ...]
    residuals: Mapping[Site, Float[Tensor, "batch pos d_model"]]
    batch: Batch
    content: Bool[Tensor, "batch pos"]


def length_buckets(lengths: Sequence[int], tokens: int) -> list[tuple[int, ...]]:
    """Indices grouped so that padded size (rows x longest) stays within `tokens`; a longer prompt goes alone."""
    buckets: list[tuple[int, ...]] = []
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        n_rows = max(1, tokens // max(1, lengths[order[0]]))
        buckets.append(tuple(order[:n_rows]))
        order = order[n_rows:]
    return buckets


def _visit_once(
    visitors: Mapping[Site, Visitor], visited: set[Site], site: Site
) -> Callable[[Float[Tensor, "batch pos d_model"]], None]:
    def visit(hidden: Float[Tensor, "batch pos d_model"]) -> None:
        visitors[site](hidden)
        visited.add(site)
        if len(visited) == len(visitors):
            raise _ReachedSite

    return visit


def visit_sites(lm: LanguageModel, batch: Batch, visitors: Mapping[Site, Visitor]) -> None:
    """Run the decoder until every site has been computed, and no further. Each site's visitor is called with its
    residual while the forward runs; what a visitor does not keep is free again before the next site is computed.

    Positions count from each row's first real token, as in generation, so that models with absolute positions read
    a padded row as they would read it alone.
    """
    visited: set[Site] = set()
    arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if "position_ids" in inspect.signature(lm.layout.decoder.forward).parameters:
        arguments["position_ids"] = batch.position_ids
    with ExitStack() as hooks, torch.no_grad():
        for site in visitors:
            handle = lm.layout.hook_point(site).register(_visit_once(visitors, visited, site))
            hooks.callback(handle.remove)
        with suppress(_ReachedSite):
            lm.layout.decoder(**arguments)


def forward_to(
    lm: LanguageModel, batch: Batch, sites: Sequence[Site]
) -> dict[Site, Float[Tensor, "batch pos d_model"]]:
    """The residuals at the sites, kept together: `visit_sites` with visitors that only remember."""
    found: dict[Site, Tensor] = {}
    visit_sites(lm, batch, {site: partial(found.__setitem__, site) for site in sites})
    return found


def capture(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sites: Site | Sequence[Site],
    *,
    tokens_per_batch: int = DEFAULT_TOKENS_PER_BATCH,
) -> Iterator[Captured]:
    """Residuals of token sequences at one or several sites, in length-bucketed batches.

    Raises `PromptSetError` when there is nothing to read, `SiteError` for a site the model lacks.
    """
    if not prompts or not all(prompts):
        raise PromptSetError("no prompts to read" if not prompts else "a prompt has no tokens")
    wanted = (sites,) if isinstance(sites, Site) else tuple(sites)
    for rows in length_buckets([len(prompt) for prompt in prompts], tokens_per_batch):
        batch = pad_left([prompts[i] for i in rows], lm.pad_id, lm.device)
        content = lm.chat.content_mask(batch.input_ids, batch.attention_mask)
        yield Captured(rows, forward_to(lm, batch, wanted), batch, content)
