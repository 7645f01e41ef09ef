"""One streaming pass over prompts: forward to the sites and no further, encode in chunks, pool, keep what is not zero.

1. `plan_pass` renders the prompts and cuts them into length-bucketed batches. The cut depends on the prompts and the
   budget alone, so batch i always holds the same prompts and gives the same numbers: it is the unit of resuming,
   sharding and merging.
2. `read_batch` runs the truncated forward. At each site the residual is pooled (dense) and encoded and pooled
   (features) while the forward runs, and then dropped before the next site is computed.
3. Only what counts is encoded: a batch's content tokens, packed without padding or template tokens, a chunk of
   `codes_per_chunk` activations at a time, every pooling from the same chunk. `assistant_start` encodes one more
   token per prompt, and alone nothing else.

Memory beyond the model is one forward batch, one chunk, and the batch's nonzeros: never prompts x tokens x d_sae.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array, vstack
from torch import Tensor

from clampdown.activations.capture import DEFAULT_TOKENS_PER_BATCH, length_buckets, visit_sites
from clampdown.activations.pooling import POOLINGS, Pooling, State
from clampdown.activations.sinks import Sinks, sinks_at
from clampdown.activations.statistics import shape_of
from clampdown.config import CODE_VERSION
from clampdown.errors import ModelError, PromptSetError
from clampdown.models.chat import encode, pad_left
from clampdown.models.fingerprint import weights_fingerprint
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae, check_fits
from clampdown.store import content_hash, prompts_hash
from clampdown.types import Prompt, Site

Kind = Literal["features", "dense"]
PooledTokens = Float[Tensor, "tokens d_model"]


@dataclass(frozen=True, slots=True)
class Budget:
    """Sizes of the two working sets: padded tokens per forward, and SAE activations per encoded chunk.

    2**24 float32 values are 64 MiB, of which encoding needs a few copies. Below 32 MiB glibc keeps chunks in a heap
    that fragments: with 2**22 a pass over 65,536 features held 0.8 GB where 0.1 were expected.
    """

    tokens_per_batch: int = DEFAULT_TOKENS_PER_BATCH
    codes_per_chunk: int = 2**24


@dataclass(frozen=True, slots=True)
class Reading:
    """What to read at one site: poolings of an SAE's features, and poolings of the residual itself (`dense`).

    `name` tells readings apart; two SAEs at one site need two names. Raises `PromptSetError` for an unknown pooling,
    or one that has no meaning for signed values under `dense`.
    """

    site: Site
    sae: Sae | None = None
    features: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        signed = [name for name, pooling in POOLINGS.items() if pooling.signed]
        for asked, known in ((self.features, list(POOLINGS)), (self.dense, signed)):
            for name in asked:
                if name not in known:
                    kind = "pooling of residuals" if asked is self.dense else "pooling"
                    raise PromptSetError(f"unknown {kind} '{name}'", hint=f"one of: {', '.join(known)}")
        if not self.name:
            object.__setattr__(self, "name", self.site.name)

    @property
    def series(self) -> tuple[Series, ...]:
        features = tuple(Series(self.name, "features", pooling) for pooling in self.features if self.sae)
        return features + tuple(Series(self.name, "dense", pooling) for pooling in self.dense)


@dataclass(frozen=True, slots=True, order=True)
class Series:
    """One result of a pass: a row per prompt, of SAE features (sparse) or of the residual (dense)."""

    reading: str
    kind: Kind
    pooling: str


@dataclass(frozen=True, slots=True)
class Shard:
    """One batch's results. `rows[i]` is the index of the prompt that row i of every series belongs to."""

    rows: Int[np.ndarray, " rows"]
    features: Mapping[Series, csr_array]
    dense: Mapping[Series, Float[np.ndarray, "rows d_model"]]


def read_sae(sae: Sae, *poolings: str, dense: Sequence[str] = (), name: str = "") -> Reading:
    """Read an SAE's features at its own site, by default where the reply is decided and at the prompt's peaks."""
    return Reading(sae.cfg.site, sae, poolings or ("assistant_start", "max"), tuple(dense), name)


def read_layers(lm: LanguageModel, saes: Sequence[Sae] = (), *poolings: str) -> list[Reading]:
    """The layer scan: the residual after every block at the assistant start, and the SAEs' features at their sites."""
    layers = [Reading(Site(layer), dense=("assistant_start",)) for layer in range(lm.n_layers)]
    return [*layers, *(read_sae(sae, *poolings, name=f"{sae.cfg.site.name} {sae.name}") for sae in saes)]


@dataclass(frozen=True)
class Pass:
    """A planned pass: prompts as token ids, and the batches in the order in which they are read."""

    lm: LanguageModel
    readings: tuple[Reading, ...]
    prompts: tuple[Prompt, ...]
    encoded: tuple[tuple[int, ...], ...]
    batches: tuple[tuple[int, ...], ...]
    budget: Budget
    sinks: Mapping[Site, Sinks] = field(default_factory=dict)
    """What is left out of the content at each site."""

    @property
    def series(self) -> tuple[Series, ...]:
        return tuple(series for reading in self.readings for series in reading.series)

    @cached_property
    def key(self) -> dict[str, Any]:
        """Everything that could change a number of the result; the resume key is its hash."""
        return {
            "code": CODE_VERSION,
            "model": [
                self.lm.name,
                self.lm.revision,
                str(self.lm.dtype),
                self.lm.device.type,
                weights_fingerprint(self.lm.model),
            ],
            "prompts": prompts_hash(self.prompts),
            "tokens": content_hash([self.encoded, self.lm.chat.scaffolds, sorted(self.lm.chat.special_ids)]),
            "readings": [_reading_key(reading) for reading in self.readings],
            "budget": self.budget,
            **({"sinks": left_out} if (left_out := [str(s.limit) for s in self.sinks.values() if s]) else {}),
        }

    def padded_tokens(self, batch: int) -> int:
        rows = self.batches[batch]
        return len(rows) * max(len(self.encoded[i]) for i in rows)


def _reading_key(reading: Reading) -> dict[str, Any]:
    sae = reading.sae
    return {
        "name": reading.name,
        "site": reading.site.name,
        "sae": None if sae is None else [sae.name, sae.revision, str(sae.dtype)],
        "width": None if sae is None else sae.cfg.d_sae,
        "features": reading.features,
        "dense": reading.dense,
    }


def plan_pass(
    lm: LanguageModel,
    readings: Sequence[Reading],
    prompts: Sequence[Prompt],
    budget: Budget | None = None,
    *,
    include_sinks: bool = False,
) -> Pass:
    """Render the prompts and lay out the batches, longest first so that a lack of memory shows at once.

    Attention sinks are no content, unless they are to be included, as published forms do.

    Raises `PromptSetError` when there is nothing to read or two readings share a name, `SaeError` or `SiteError` for
    an SAE that does not fit the model, `SiteError` for a site that it lacks.
    """
    budget = budget or Budget()
    names = [reading.name for reading in readings]
    if not prompts or not names:
        raise PromptSetError("no prompts to read" if not prompts else "nothing to read: no site was asked for")
    if len(set(names)) < len(names):
        raise PromptSetError("two readings have the same name", hint="give SAEs that share a site a name each")
    for reading in readings:
        lm.layout.hook_point(reading.site)
        if reading.sae is not None:
            check_fits(reading.sae, lm.d_model, lm.n_layers, layer_norm=lm.layout.layer_norm)
    encoded = tuple(tuple(encode(lm, prompt.messages)) for prompt in prompts)
    batches = tuple(length_buckets([len(ids) for ids in encoded], budget.tokens_per_batch))
    sinks = {} if include_sinks else sinks_at(lm, [reading.site for reading in readings])
    return Pass(lm, tuple(readings), tuple(prompts), encoded, batches, budget, sinks)


def read_batch(job: Pass, number: int) -> Shard:
    """Run one batch. Raises `ModelError` when an activation is not finite."""
    rows = job.batches[number]
    batch = pad_left([job.encoded[i] for i in rows], job.lm.pad_id, job.lm.device)
    content = job.lm.chat.content_mask(batch.input_ids, batch.attention_mask)
    features: dict[Series, csr_array] = {}
    dense: dict[Series, np.ndarray] = {}

    def visit(here: Sequence[Reading], residual: Float[Tensor, "batch pos d_model"]) -> None:
        sinks = job.sinks.get(here[0].site)
        counted = content & sinks.outside(residual) if sinks else content
        for reading in here:
            for pooling in reading.dense:
                pooled = POOLINGS[pooling](residual.float(), counted)
                dense[Series(reading.name, "dense", pooling)] = pooled.cpu().numpy()
            if reading.sae is not None:
                found = pool_features(reading.sae, residual, counted, reading.features, job.budget.codes_per_chunk)
                features.update({Series(reading.name, "features", name): values for name, values in found.items()})

    sites = {reading.site for reading in job.readings}
    here = {site: [reading for reading in job.readings if reading.site == site] for site in sites}
    visit_sites(job.lm, batch, {site: lambda x, site=site: visit(here[site], x) for site in sorted(sites)})
    _check_finite(job, [*(values.data for values in features.values()), *dense.values()])
    return Shard(np.array(rows), features, dense)


def _check_finite(job: Pass, arrays: Sequence[np.ndarray]) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise ModelError(
            f"'{job.lm.name}' gave activations that are not finite numbers in {job.lm.dtype}",
            hint="load it with --dtype float32 or bfloat16: half precision overflows in many models",
        )


def pool_features(
    sae: Sae,
    residual: Float[Tensor, "batch pos d_model"],
    content: Bool[Tensor, "batch pos"],
    names: Sequence[str],
    codes_per_chunk: int = Budget.codes_per_chunk,
) -> dict[str, csr_array]:
    """Encode a batch of residuals and pool it by each name: sparse [batch, d_sae] each."""
    at_start = [name for name in names if POOLINGS[name].at_assistant_start]
    over_content = [name for name in names if name not in at_start]
    step = max(1, codes_per_chunk // sae.cfg.d_sae)
    pooled = {name: _encode_rows(sae, residual[:, -1], step) for name in at_start}
    if over_content:
        lengths = content.sum(1).tolist()
        pooled |= _pool_packed(sae, residual[content.to(residual.device)], lengths, over_content, step)
    return pooled


def _codes(sae: Sae, tokens: PooledTokens, step: int) -> Iterator[Float[Tensor, "chunk d_sae"]]:
    with torch.no_grad():
        for start in range(0, len(tokens), step):
            yield sae.encode(tokens[start : start + step].to(sae.device, sae.dtype))


def _encode_rows(sae: Sae, tokens: PooledTokens, step: int) -> csr_array:
    return _stack([_sparse(codes) for codes in _codes(sae, tokens, step)], sae.cfg.d_sae)


def _pool_packed(
    sae: Sae, tokens: PooledTokens, lengths: Sequence[int], names: Sequence[str], step: int
) -> dict[str, csr_array]:
    """Pool packed prompts, of `lengths` tokens each. A prompt that a chunk's end cuts is folded on in the next."""
    poolings = [POOLINGS[name] for name in names]
    rows: dict[str, list[csr_array]] = {name: [] for name in names}
    pieces = _pieces(lengths, step)
    states: list[State] = []
    for codes in _codes(sae, tokens, step):
        for piece in next(pieces):
            states = _fold(poolings, states, codes[None, piece.start : piece.stop])
            if piece.ends:
                for name, pooling, state in zip(names, poolings, states, strict=True):
                    rows[name].append(_sparse(pooling.finish(state)))
                states = []
    empty = [i for i, length in enumerate(lengths) if length == 0]
    return {name: _with_empty_rows(_stack(found, sae.cfg.d_sae), empty) for name, found in rows.items()}


@dataclass(frozen=True, slots=True)
class _Piece:
    """One prompt's tokens inside one chunk; `ends` when they are its last."""

    start: int
    stop: int
    ends: bool


def _pieces(lengths: Sequence[int], step: int) -> Iterator[list[_Piece]]:
    """For every chunk of `step` tokens, the prompts that it touches, in order. Prompts without tokens are left out."""
    stops = np.cumsum(lengths).tolist()
    spans = [(stop - length, stop) for length, stop in zip(lengths, stops, strict=True) if length]
    first = 0
    for start in range(0, stops[-1] if stops else 0, step):
        stop = min(start + step, stops[-1])
        chunk = []
        for begin, end in spans[first:]:
            if begin >= stop:
                break
            chunk.append(_Piece(max(begin, start) - start, min(end, stop) - start, end <= stop))
        first += sum(piece.ends for piece in chunk)
        yield chunk


def _fold(poolings: Sequence[Pooling], states: Sequence[State], codes: Float[Tensor, "1 pos d_sae"]) -> list[State]:
    mask = torch.ones(codes.shape[:2], dtype=torch.bool, device=codes.device)
    started = [pooling.start(codes, mask) for pooling in poolings]
    if not states:
        return started
    return [p.merge(before, after) for p, before, after in zip(poolings, states, started, strict=True)]


def _sparse(pooled: Float[Tensor, "batch d_sae"]) -> csr_array:
    rows, columns = pooled.nonzero(as_tuple=True)
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows.cpu().numpy(), minlength=len(pooled)))])
    data = pooled[rows, columns].float().cpu().numpy()
    return csr_array((data, columns.int().cpu().numpy(), starts.astype(np.int32)), shape=tuple(pooled.shape))


def _stack(rows: Sequence[csr_array], d_sae: int) -> csr_array:
    return csr_array(vstack(rows, format="csr")) if rows else csr_array((0, d_sae), dtype=np.float32)


def _with_empty_rows(values: csr_array, empty: Sequence[int]) -> csr_array:
    """Insert rows without entries, so that they come to stand at the indices `empty` (ascending)."""
    starts = values.indptr
    for row in empty:
        starts = np.insert(starts, row, starts[row])
    return csr_array((values.data, values.indices, starts), shape=(len(starts) - 1, shape_of(values)[1]))
