"""One streaming pass over a prompt set: forward to the site, encode in chunks, pool, keep what is not zero.

Memory beyond the model is one forward batch, one chunk of `codes_per_chunk` SAE activations, and the nonzeros of the
result: never prompts x tokens x d_sae, and for a long prompt not even tokens x d_sae. Only message tokens are encoded
(padding and template tokens are dropped first), and `assistant_start` alone encodes one token per prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.sparse import csr_array, vstack
from torch import Tensor

from clampdown.activations.capture import DEFAULT_TOKENS_PER_BATCH, Captured, capture
from clampdown.activations.pooling import POOLINGS, Pooling, State
from clampdown.activations.statistics import Moments, ResidualMean
from clampdown.errors import PromptSetError
from clampdown.models.chat import encode
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.types import Prompt, Site

Progress = Callable[[int, int], None]
Residual = Float[Tensor, "batch pos d_model"]
Mask = Bool[Tensor, "batch pos"]


@dataclass(frozen=True, slots=True)
class Budget:
    """Sizes of the two working sets: padded tokens per forward, and SAE activations per encoded chunk.

    2**24 float32 values are 64 MiB, of which encoding needs a few copies. Much smaller chunks are no faster, and below
    32 MiB glibc keeps them in a heap that fragments: the same pass has then taken up to 0.9 GB instead of 0.4.
    """

    tokens_per_batch: int = DEFAULT_TOKENS_PER_BATCH
    codes_per_chunk: int = 2**24


@dataclass(frozen=True, slots=True)
class FeatureMatrix:
    """Pooled activations, prompts x features, float32, in the order of the prompts given."""

    pooling: str
    prompt_ids: tuple[str, ...]
    values: csr_array

    def moments(self) -> Moments:
        return Moments.of(self.values)

    def merge(self, other: FeatureMatrix) -> FeatureMatrix:
        """The rows of both. Raises `ValueError` when they were pooled differently."""
        if self.pooling != other.pooling:
            raise ValueError(f"cannot merge {self.pooling} with {other.pooling}")
        stacked = csr_array(vstack([self.values, other.values], format="csr"))
        return FeatureMatrix(self.pooling, self.prompt_ids + other.prompt_ids, stacked)


@dataclass(frozen=True, slots=True)
class Collected:
    """What one pass over a prompt set found: a matrix per pooling, and the mean residual at the assistant start."""

    site: Site
    matrices: Mapping[str, FeatureMatrix]
    residual: ResidualMean

    def merge(self, other: Collected) -> Collected:
        """Shards of one prompt set as one: equal to a single pass over all of it."""
        if self.site != other.site:
            raise ValueError(f"cannot merge {self.site} with {other.site}")
        merged = {name: matrix.merge(other.matrices[name]) for name, matrix in self.matrices.items()}
        return Collected(self.site, merged, self.residual.merge(other.residual))


def content_first(
    residual: Residual, content: Mask
) -> tuple[Float[Tensor, "batch kept d_model"], Bool[Tensor, "batch kept"]]:
    """Drop what does not count: each row's content tokens moved to its left end, in order, and cut to the longest."""
    width = max(1, int(content.sum(1).max()))
    order = (~content).int().argsort(dim=1, stable=True)[:, :width]
    index = order[..., None].expand(-1, -1, residual.shape[-1])
    return residual.gather(1, index), content.gather(1, order)


def _fold(sae: Sae, residual: Residual, mask: Mask, poolings: Sequence[Pooling], step: int) -> list[Tensor]:
    """Pool the codes of a few rows, `step` positions at a time."""
    states: list[State] = []
    for start in range(0, residual.shape[1], step):
        codes = sae.encode(residual[:, start : start + step])
        chunk = [pooling.start(codes, mask[:, start : start + step]) for pooling in poolings]
        pairs = zip(poolings, states, chunk, strict=True) if states else ()
        states = [pooling.merge(before, after) for pooling, before, after in pairs] or chunk
    return [pooling.finish(state) for pooling, state in zip(poolings, states, strict=True)]


def _sparse(pooled: Float[Tensor, "batch d_sae"]) -> csr_array:
    rows, columns = pooled.nonzero(as_tuple=True)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows.cpu().numpy(), minlength=len(pooled)))])
    data = pooled[rows, columns].float().cpu().numpy()
    return csr_array((data, columns.int().cpu().numpy(), starts.astype(np.int32)), shape=tuple(pooled.shape))


def _pool_chunks(
    sae: Sae, residual: Residual, mask: Mask, names: Sequence[str], codes_per_chunk: int
) -> Iterator[dict[str, csr_array]]:
    """Pooled codes of successive groups of rows; one group never needs more than `codes_per_chunk` codes."""
    if not names:
        return
    step = max(1, codes_per_chunk // sae.W_dec.shape[0])
    n_rows = max(1, step // residual.shape[1])
    poolings = [POOLINGS[name] for name in names]
    for start in range(0, len(residual), n_rows):
        rows = slice(start, start + n_rows)
        pooled = _fold(sae, residual[rows], mask[rows], poolings, step)
        yield {name: _sparse(values) for name, values in zip(names, pooled, strict=True)}


def pool_codes(
    sae: Sae, residual: Residual, content: Mask, names: Sequence[str], codes_per_chunk: int = Budget.codes_per_chunk
) -> dict[str, csr_array]:
    """Encode a batch of residuals and pool it by each name: sparse [batch, d_sae] each."""
    residual = residual.to(sae.W_dec.device, sae.W_dec.dtype)
    content = content.to(residual.device)
    at_start = [name for name in names if POOLINGS[name].at_assistant_start]
    over_content = [name for name in names if name not in at_start]
    parts = [
        *_pool_chunks(sae, residual[:, -1:], content[:, -1:], at_start, codes_per_chunk),
        *_pool_chunks(sae, *content_first(residual, content), over_content, codes_per_chunk),
    ]
    return {name: csr_array(vstack([p[name] for p in parts if name in p], format="csr")) for name in names}


class _Gatherer:
    """Collects batches that arrive in length order; puts the rows back into prompt order at the end."""

    def __init__(self, names: Sequence[str], d_model: int) -> None:
        self.parts: dict[str, list[csr_array]] = {name: [] for name in names}
        self.rows: list[int] = []
        self.residual = ResidualMean.empty(d_model)

    def add(self, captured: Captured, site: Site, pooled: Mapping[str, csr_array]) -> None:
        self.rows.extend(captured.rows)
        self.residual = self.residual.merge(ResidualMean.of(captured.residuals[site][:, -1].float().cpu().numpy()))
        for name, values in pooled.items():
            self.parts[name].append(values)

    def finish(self, site: Site, prompt_ids: tuple[str, ...]) -> Collected:
        back = np.argsort(self.rows)
        matrices = {
            name: FeatureMatrix(name, prompt_ids, csr_array(vstack(parts, format="csr"))[back])
            for name, parts in self.parts.items()
        }
        return Collected(site, matrices, self.residual)


def collect(
    lm: LanguageModel,
    sae: Sae,
    prompts: Sequence[Prompt],
    poolings: Sequence[str] = ("assistant_start", "max"),
    *,
    budget: Budget | None = None,
    on_progress: Progress | None = None,
) -> Collected:
    """Pooled SAE activations of every prompt at the SAE's own site. `on_progress(done, total)` counts prompts.

    Raises `PromptSetError` for an empty prompt set or an unknown pooling.
    """
    budget = budget or Budget()
    for name in poolings:
        if name not in POOLINGS:
            raise PromptSetError(f"unknown pooling '{name}'", hint=f"one of: {', '.join(POOLINGS)}")
    site = sae.cfg.site
    gatherer = _Gatherer(poolings, lm.d_model)
    encoded = [encode(lm, prompt.messages) for prompt in prompts]
    for captured in capture(lm, encoded, site, tokens_per_batch=budget.tokens_per_batch):
        with torch.no_grad():
            pooled = pool_codes(sae, captured.residuals[site], captured.content, poolings, budget.codes_per_chunk)
        gatherer.add(captured, site, pooled)
        if on_progress:
            on_progress(len(gatherer.rows), len(prompts))
    return gatherer.finish(site, tuple(prompt.id for prompt in prompts))
