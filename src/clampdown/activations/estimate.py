"""What a pass will cost, before it starts: time, memory and disk, from shapes alone or with a short probe.

    forward FLOPs of a token = 2 x (weights of the matrices in the blocks that run) + 4 x width x attention width
    encode FLOPs of a token  = 2 x d_in x d_sae

per padded token of the forward and per encoded token. Of a mixture of experts only the experts of one token count.
Nothing here allocates weights, so a model on the meta device is estimated as well as a loaded one. What differs is the
speed: a loaded model runs a few of the prompts (`probe`); for weights on meta the speed is that of this machine's plain
matrix product (`matrix_speed`), an assumption that is stated with the result, since real passes stay below it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from clampdown.activations.capture import visit_sites
from clampdown.activations.pooling import POOLINGS
from clampdown.activations.stream import Pass, Reading, pool_features
from clampdown.models.chat import pad_left
from clampdown.types import Point

PROBE_FLOPS = 4e9
ACTIVE_PER_TOKEN = 64
"""Features assumed to fire on a token when none could be counted: SAEs are trained to between 30 and 150."""

ENTRY_BYTES = 8  # of a nonzero on disk: float32 and int32
COPIES_OF_CODES = 5  # what encoding holds at once: product, biased product, mask, activations, pooled copy


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations of a pass, and what they are counted on."""

    prompts: int
    padded_tokens: int
    encoded_tokens: int
    blocks_run: int
    forward_flops: float
    encode_flops: float


@dataclass(frozen=True, slots=True)
class Speed:
    """FLOP per second of forward and encode, nonzeros that a prompt leaves, and how both are known."""

    forward: float
    encode: float
    entries_per_prompt: float
    source: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """`memory_bytes` is the peak beyond the model and the SAE; `disk_bytes` the finished matrices."""

    work: Work
    speed: Speed
    seconds: float
    memory_bytes: int
    disk_bytes: int


def estimate_pass(job: Pass, speed: Speed | None = None) -> Estimate:
    """Estimate a planned pass. Without a speed, weights that are there are probed (about a second on a CPU)."""
    speed = speed or (assumed_speed(job) if job.lm.device.type == "meta" else probe(job))
    work = count_work(job)
    residuals = sum(len(reading.dense) for reading in job.readings) * job.lm.d_model * 4
    entries = speed.entries_per_prompt * work.prompts
    return Estimate(
        work=work,
        speed=speed,
        seconds=work.forward_flops / speed.forward + (work.encode_flops / speed.encode if work.encode_flops else 0.0),
        memory_bytes=_working_set(job, speed.entries_per_prompt),
        disk_bytes=round(entries * ENTRY_BYTES + work.prompts * residuals),
    )


def describe(found: Estimate) -> str:
    """The estimate in words, for people who are about to wait."""
    work, speed = found.work, found.speed
    flops, rate = work.forward_flops + work.encode_flops, min(speed.forward, speed.encode or speed.forward)
    return (
        f"{work.prompts:,} prompts, {work.padded_tokens:,} tokens through {work.blocks_run} blocks, "
        f"{work.encoded_tokens:,} encoded: {flops / 1e12:.3g} TFLOP\n"
        f"about {_duration(found.seconds)} at {rate / 1e9:.3g} GFLOP/s or more ({speed.source})\n"
        f"about {_size(found.memory_bytes)} of memory beyond the weights, {_size(found.disk_bytes)} on disk"
    )


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def count_work(job: Pass) -> Work:
    """Operations of the whole pass."""
    blocks = _blocks_run(job.readings)
    weights = sum(_weights_per_token(block, _text_config(job)) for block in job.lm.layout.blocks[:blocks])
    padded, forward = 0, 0.0
    for rows in job.batches:
        width = max(len(job.encoded[i]) for i in rows)
        padded += len(rows) * width
        forward += len(rows) * width * (2 * weights + 4 * blocks * width * _attention_width(_text_config(job)))
    tokens = _encoded_tokens(job)
    encode = sum(2.0 * r.sae.W_enc.numel() * n for r, n in zip(job.readings, tokens, strict=True) if r.sae)
    return Work(len(job.prompts), padded, sum(tokens), blocks, forward, encode)


def _blocks_run(readings: Sequence[Reading]) -> int:
    """How many blocks are computed: all of a block's input, and the whole block for every other point of it."""
    return max(reading.site.layer + (reading.site.point is not Point.RESID_PRE) for reading in readings)


def _text_config(job: Pass) -> Any:
    return job.lm.layout.decoder.config


def _weights_per_token(block: nn.Module, config: Any) -> float:
    """Matrix weights of a block that one token is multiplied with."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    share = config.num_experts_per_tok / experts if experts else 1.0
    return sum(
        weight.numel() * (share if ".experts." in f".{name}" else 1.0)
        for name, weight in block.named_parameters()
        if weight.ndim >= 2
    )


def _attention_width(config: Any) -> int:
    """Query heads times their width: what each token's scores and mixed values cost per position."""
    heads = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def _encoded_tokens(job: Pass) -> list[int]:
    """Tokens that each reading encodes: contents for poolings over them, one per prompt at the assistant start."""
    content = 0
    for rows in job.batches:
        batch = pad_left([job.encoded[i] for i in rows], job.lm.pad_id)
        content += int(job.lm.chat.content_mask(batch.input_ids, batch.attention_mask).sum())
    return [
        content * any(not POOLINGS[name].at_assistant_start for name in reading.features)
        + len(job.prompts) * any(POOLINGS[name].at_assistant_start for name in reading.features)
        if reading.sae
        else 0
        for reading in job.readings
    ]


def _working_set(job: Pass, entries_per_prompt: float) -> int:
    """Peak bytes of one batch beyond the weights: the widest of the block's temporaries, codes, and what it leaves."""
    config = _text_config(job)
    tokens = max(job.padded_tokens(number) for number in range(len(job.batches)))
    rows = max(len(batch) for batch in job.batches)
    width = max(len(ids) for ids in job.encoded)
    inner: int = getattr(config, "intermediate_size", None) or 4 * job.lm.d_model
    per_token = (6 * job.lm.d_model + 3 * inner) * job.lm.dtype.itemsize
    mask = tokens * width * 4
    dense = 2 * tokens * job.lm.d_model * 4 if any(reading.dense for reading in job.readings) else 0
    codes = [
        max(job.budget.codes_per_chunk, reading.sae.cfg.d_sae) * COPIES_OF_CODES * reading.sae.dtype.itemsize
        for reading in job.readings
        if reading.sae is not None and reading.features
    ]
    leaves = 3 * rows * entries_per_prompt * ENTRY_BYTES
    return round(tokens * per_token + mask + dense + max(codes, default=0) + leaves)


# Speed


def assumed_speed(job: Pass) -> Speed:
    """For weights that are not there: this machine's matrix product, and a usual number of active features."""
    dtype = job.lm.dtype
    flops = matrix_speed(dtype)
    tokens = [len(ids) for ids in job.encoded]
    entries = 0.0
    for reading in job.readings:
        if reading.sae is None:
            continue
        for name in reading.features:
            one_token = POOLINGS[name].at_assistant_start or name == "last"
            per_prompt = ACTIVE_PER_TOKEN * (1 if one_token else sum(tokens) / len(tokens))
            entries += min(per_prompt, reading.sae.cfg.d_sae)
    source = (
        f"assumed, as there are no weights to try: this machine's {str(dtype).removeprefix('torch.')} matrix product, "
        f"and at most {ACTIVE_PER_TOKEN} active features a token"
    )
    return Speed(flops, flops, entries, source)


def matrix_speed(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """FLOP per second of a plain matrix product, best of a few tries (about 0.2 s)."""
    left, right = torch.ones(128, 2048, dtype=dtype, device=device), torch.ones(2048, 2048, dtype=dtype, device=device)
    return 2.0 * left.shape[0] * right.numel() / min(_seconds(lambda: left @ right, left.device) for _ in range(3))


def probe(job: Pass) -> Speed:
    """Run a few prompts of middling length, or the start of one, twice: once to warm up, once to time."""
    few = _few_prompts(job)
    work = count_work(few)
    batch = pad_left(few.encoded, few.lm.pad_id, few.lm.device)
    content = few.lm.chat.content_mask(batch.input_ids, batch.attention_mask)
    found: dict[Any, Tensor] = {}
    sites = {reading.site for reading in few.readings}
    visitors = {site: (lambda x, site=site: found.__setitem__(site, x)) for site in sites}
    entries: list[int] = []

    def encode_all() -> None:
        entries.clear()
        for reading in few.readings:
            if reading.sae is not None:
                chunk = few.budget.codes_per_chunk
                pooled = pool_features(reading.sae, found[reading.site], content, reading.features, chunk)
                entries.extend(values.nnz for values in pooled.values())

    forward = _seconds(lambda: visit_sites(few.lm, batch, visitors), few.lm.device)
    encode = _seconds(encode_all, few.lm.device)
    source = f"measured on {work.padded_tokens} tokens"
    return Speed(work.forward_flops / forward, work.encode_flops / encode or 1.0, sum(entries) / work.prompts, source)


def _few_prompts(job: Pass) -> Pass:
    """Prompts of median length as one batch, as many as `PROBE_FLOPS` allow; at least the first tokens of one."""
    whole = count_work(job)
    per_token = (whole.forward_flops + whole.encode_flops) / whole.padded_tokens
    tokens = int(max(8, min(PROBE_FLOPS / per_token, job.budget.tokens_per_batch)))
    order = sorted(range(len(job.encoded)), key=lambda i: len(job.encoded[i]))
    middle = order[len(order) // 2]
    n_rows = max(1, min(tokens // len(job.encoded[middle]), len(order)))
    start = max(0, min(len(order) // 2 - n_rows // 2, len(order) - n_rows))
    rows = order[start : start + n_rows]
    encoded = tuple(job.encoded[i][-tokens:] for i in rows)
    prompts = tuple(job.prompts[i] for i in rows)
    return replace(job, prompts=prompts, encoded=encoded, batches=(tuple(range(n_rows)),))


def _seconds(run: Any, device: torch.device) -> float:
    run()
    _wait(device)
    began = time.perf_counter()
    run()
    _wait(device)
    return max(time.perf_counter() - began, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
