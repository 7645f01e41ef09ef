"""What a model and an SAE need in memory and time, from their shapes: arithmetic for planning, not a measurement.

    pass        tokens * (2 * weights below the site + 2 * d_model * d_sae) / (peak * share of it that is reached)
    generation  replies / rows * new tokens * (bytes of weights and cache / bandwidth) + prompts' passes, steered

1. A prompt's pass is bound by arithmetic, a decoding step by reading the weights and what is cached, once for all rows.
2. A model that one device does not hold is spread over several (`--device-map auto`): they work one after the other, so
   that a copy on k devices is as fast as one device, and the copies are what work in parallel (`--shard`, `--ray`).
3. What is done once, wherever the shards ran (clamping finalists, calibrating, costs), is not counted.

docs/scale.md prints the table with these numbers; a test holds the two together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True, slots=True)
class Device:
    """An accelerator by its data sheet, and the shares of it that are assumed to be reached."""

    name: str = "H100 80 GB"
    memory: float = 80 * GB
    flops: float = 989e12
    bandwidth: float = 3.35e12
    reached_flops: float = 0.4
    reached_bandwidth: float = 0.6


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder model. `bytes_per_weight` is 2 in bf16 and about 0.56 in 4 bits (with their scales)."""

    name: str
    weights: float
    layers: int
    d_model: int
    kv_width: int
    vocabulary: int
    bytes_per_weight: float = 2.0

    @property
    def bytes(self) -> float:
        return self.weights * self.bytes_per_weight

    def below(self, layer: int) -> float:
        """Weights of the blocks up to and with a layer, the embedding left out."""
        return (self.weights - 2 * self.vocabulary * self.d_model) * (layer + 1) / self.layers

    def cached(self, tokens: int) -> float:
        """Bytes of keys and values of so many tokens."""
        return 2.0 * self.layers * self.kv_width * 2 * tokens


LLAMA_8B = Shape("Llama 3.1 8B, bf16", 8.03e9, 32, 4096, 1024, 128_256)
LLAMA_70B = Shape("Llama 3.1 70B, bf16", 70.6e9, 80, 8192, 1024, 128_256)
LLAMA_70B_4BIT = Shape("Llama 3.1 70B, 4 bits", 70.6e9, 80, 8192, 1024, 128_256, 0.56)


@dataclass(frozen=True, slots=True)
class Work:
    """A discovery pass over `read` prompts, and a test of `arms` arms on `asked` prompts. `steering` is what steering
    was measured to cost over plain generation (docs/benchmarks.md)."""

    read: int = 100_000
    asked: int = 2_000
    arms: int = 20
    prompt_tokens: int = 200
    new_tokens: int = 200
    rows: int = 64
    layer_share: float = 0.5
    steering: float = 1.03


@dataclass(frozen=True, slots=True)
class Need:
    """Memory of one copy in bytes, devices that hold it, copies that fit on all devices (0: none does), and seconds of
    the pass and of the test."""

    sae_bytes: float
    copy_bytes: float
    devices_per_copy: int
    copies: int
    pass_seconds: float | None
    test_seconds: float | None


def need(shape: Shape, d_sae: int, devices: int, work: Work, device: Device | None = None) -> Need:
    """What the work takes on so many devices. The seconds are None where not even one copy fits."""
    device = device or Device()
    sae = 2.0 * 4 * shape.d_model * d_sae
    cached = shape.cached(work.rows * (work.prompt_tokens + work.new_tokens))
    spare = 4 * GB  # temporaries of a batch, the allocator, the library
    copy = shape.bytes + sae + cached + spare
    per_copy = math.ceil(copy / device.memory)
    copies = devices // per_copy
    if not copies:
        return Need(sae, copy, per_copy, 0, None, None)
    rate = device.flops * device.reached_flops
    layer = round(shape.layers * work.layer_share) - 1
    tokens = work.read * work.prompt_tokens
    reading = tokens * (2 * shape.below(layer) + 2 * shape.d_model * d_sae) / rate
    replies = work.arms * work.asked
    mean_cached = shape.cached(work.rows * (work.prompt_tokens + work.new_tokens // 2))
    step = (shape.bytes + mean_cached) / (device.bandwidth * device.reached_bandwidth)
    prompts = replies * work.prompt_tokens * 2 * shape.weights / rate
    testing = (replies / work.rows * work.new_tokens * step + prompts) * work.steering
    return Need(sae, copy, per_copy, copies, reading / copies, testing / copies)


SHAPES = (LLAMA_8B, LLAMA_70B, LLAMA_70B_4BIT)
WIDTHS = (65_536, 131_072)
DEVICES = (1, 8, 64)


def table(work: Work) -> str:
    """The table of docs/scale.md."""
    heads = ["model", "features", "SAE", "one copy", "GPUs per copy"]
    heads += [f"pass / test on {n} GPU{'s' if n > 1 else ''}" for n in DEVICES]
    rows = [heads, ["---"] * len(heads)]
    for shape in SHAPES:
        for width in WIDTHS:
            found = [need(shape, width, n, work) for n in DEVICES]
            one = found[-1]
            row = [shape.name, f"{width:,}", _size(one.sae_bytes), _size(one.copy_bytes), str(one.devices_per_copy)]
            rows.append(row + [f"{_time(each.pass_seconds)} / {_time(each.test_seconds)}" for each in found])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _size(count: float) -> str:
    return f"{count / GB:.1f} GB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "does not fit"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
