"""Residuals at one site for a long text, in files of a few ten thousand tokens: what was collected survives a kill.

1. The texts come in a shuffled order and are cut into groups; a group is a file, written whole.
2. A group's texts are read in length-bucketed batches by the truncated forward: nothing above the site is computed.
3. A file holds the residuals in float16 and, for each, its token id, its position in its text and its source.

The manifest says what was read; a directory that holds another collection is an error, never added to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from clampdown.activations.capture import forward_to, length_buckets
from clampdown.errors import StoreError
from clampdown.models.chat import pad_left
from clampdown.models.loading import LanguageModel
from clampdown.sae_training.texts import TokenRow, mix
from clampdown.store import claim, content_hash, write_atomic, write_json
from clampdown.types import Site

TEXTS_PER_SHARD = 96
TOKENS_PER_BATCH = 3000
MANIFEST, SHAPE = "collection.json", "mix.json"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Collection:
    """A collection that is to be made: where, from which model and texts, and at which site."""

    lm: LanguageModel
    site: Site
    rows: tuple[TokenRow, ...]

    @property
    def groups(self) -> list[tuple[TokenRow, ...]]:
        return [self.rows[start : start + TEXTS_PER_SHARD] for start in range(0, len(self.rows), TEXTS_PER_SHARD)]

    @property
    def key(self) -> dict[str, Any]:
        """What the files depend on."""
        return {
            "model": self.lm.name,
            "model_revision": self.lm.revision,
            "dtype": str(self.lm.dtype).removeprefix("torch."),
            "site": self.site.name,
            "texts": content_hash([(row.source, row.ids) for row in self.rows]),
        }


def collect(job: Collection, directory: Path, on_progress: Progress | None = None) -> int:
    """Read what is missing; returns the tokens of the whole collection. Raises `StoreError` for another's directory."""
    directory.mkdir(parents=True, exist_ok=True)
    claim(directory / MANIFEST, job.key)
    write_json(directory / SHAPE, mix(job.rows))
    sources = sorted({row.source for row in job.rows})
    total, done = sum(len(row.ids) for row in job.rows), 0
    for number, group in enumerate(job.groups):
        path = shard_path(directory, number)
        if not path.exists():
            write_atomic(path, save(_read(job, group, sources)))
        done += sum(len(row.ids) for row in group)
        if on_progress is not None:
            on_progress(done, total)
    return total


def shard_path(directory: Path, number: int) -> Path:
    """Where a group's file lies."""
    return directory / f"{number:04d}.safetensors"


def _read(job: Collection, group: Sequence[TokenRow], sources: Sequence[str]) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {"residual": [], "token": [], "position": [], "source": []}
    for bucket in length_buckets([len(row.ids) for row in group], TOKENS_PER_BATCH):
        rows = [group[i] for i in bucket]
        batch = pad_left([row.ids for row in rows], job.lm.pad_id, job.lm.device)
        real = batch.attention_mask.bool()
        parts["residual"].append(forward_to(job.lm, batch, [job.site])[job.site][real].half().cpu())
        parts["token"].append(batch.input_ids[real].int().cpu())
        parts["position"].append(batch.position_ids[real].int().cpu())
        lengths = torch.tensor([len(row.ids) for row in rows])
        parts["source"].append(
            torch.tensor([sources.index(row.source) for row in rows]).repeat_interleave(lengths).short()
        )
    return {name: torch.cat(found) for name, found in parts.items()}


@dataclass(frozen=True, slots=True)
class Collected:
    """What files hold, in the order of collection: residuals [tokens, d_model] in float16, ids and positions."""

    residual: Tensor
    token: Tensor
    position: Tensor


def read_collected(directory: Path, site: Site) -> Collected:
    """All files of a directory. Raises `StoreError` when there is none."""
    paths = sorted(directory.glob("[0-9]*.safetensors"))
    if not paths:
        raise StoreError(f"{directory} holds no collected residuals")
    parts: dict[str, list[Tensor]] = {"residual": [], "token": [], "position": []}
    for path in paths:
        with safe_open(path, "pt") as file:
            name = site.name if site.name in file.keys() else "residual"  # noqa: SIM118  # not a dict
            for key, stored in (("residual", name), ("token", "token"), ("position", "position")):
                parts[key].append(file.get_tensor(stored))
    return Collected(*(torch.cat(parts[key]) for key in ("residual", "token", "position")))
