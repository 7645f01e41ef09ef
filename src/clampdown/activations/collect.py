"""Running a planned pass: in memory, into a directory that survives a kill, or in parts that are merged.

All three go through the same batches (`stream`) and give an `ActivationStore` with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array, vstack

from clampdown.activations import files
from clampdown.activations.store import ActivationStore
from clampdown.activations.stream import Pass, Series, Shard, read_batch
from clampdown.errors import StoreError
from clampdown.store import content_hash, write_atomic

Progress = Callable[[int, int], None]


class _Tally:
    """Progress in padded tokens, which is what takes time: batches of long prompts come first."""

    def __init__(self, job: Pass, on_progress: Progress | None) -> None:
        self.job, self.report, self.done = job, on_progress, 0
        self.total = sum(job.padded_tokens(number) for number in range(len(job.batches)))

    def finished(self, number: int) -> None:
        self.done += self.job.padded_tokens(number)
        if self.report is not None:
            self.report(self.done, self.total)


def collect(job: Pass, on_progress: Progress | None = None) -> ActivationStore:
    """Run a pass in memory, for up to a few thousand prompts. `on_progress(done, total)` counts padded tokens."""
    tally = _Tally(job, on_progress)
    shards = []
    for number in range(len(job.batches)):
        shards.append(read_batch(job, number))
        tally.finished(number)
    return _join(job, shards)


def collect_to(
    job: Pass, directory: Path, on_progress: Progress | None = None, *, only: Iterable[int] | None = None
) -> ActivationStore | None:
    """Run a pass into a directory, or what is left of it after an interruption.

    `only` names some of the batches, for a pass that is split over machines; the result is None unless all are there.
    Raises `StoreError` when the directory holds another pass or cannot be written.
    """
    files.claim(job, directory)
    if not files.is_finished(directory):
        tally, missing = _Tally(job, on_progress), set(files.missing_shards(job, directory))
        for number in range(len(job.batches)) if only is None else only:
            if number in missing:
                files.write_shard(job, directory, number, read_batch(job, number))
            tally.finished(number)
        if files.missing_shards(job, directory):
            return None
        files.finish(job, directory)
    return ActivationStore.open(directory)


def merge_shards(job: Pass, parts: Sequence[Path], directory: Path) -> ActivationStore:
    """One store from the directories in which a pass's batches were run. Raises `StoreError` when one is missing."""
    files.claim(job, directory)
    for part in parts:
        if files.read_manifest(part)["resume_key"] != content_hash(job.key):
            raise StoreError(f"{part} holds another pass (other model, SAE, prompts, template or poolings)")
        for number in files.missing_shards(job, directory):
            if files.shard_path(part, number).exists():
                write_atomic(files.shard_path(directory, number), files.shard_path(part, number).read_bytes())
    missing = files.missing_shards(job, directory)
    if missing:
        raise StoreError(f"batch {missing[0]} of {len(job.batches)} was not run in any of the parts")
    files.finish(job, directory)
    return ActivationStore.open(directory)


def _join(job: Pass, shards: Sequence[Shard]) -> ActivationStore:
    """All batches in memory, their rows put back into prompt order."""
    back = np.argsort(np.concatenate([shard.rows for shard in shards]))
    sparse: dict[Series, csr_array] = {}
    dense: dict[Series, np.ndarray] = {}
    for series in job.series:
        if series.kind == "features":
            stacked: Any = vstack([shard.features[series] for shard in shards], format="csr")
            sparse[series] = csr_array(stacked[back])
        else:
            dense[series] = np.concatenate([shard.dense[series] for shard in shards])[back]
    return ActivationStore(job.prompts, {r.name: r.site for r in job.readings}, sparse, dense)
