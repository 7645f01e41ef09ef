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
    read_into(job, directory, on_progress, only=only)
    if not files.is_finished(directory):
        if files.missing_shards(directory, len(job.batches)):
            return None
        files.finish(directory, len(job.batches))
    return ActivationStore.open(directory)


def read_into(
    job: Pass, directory: Path, on_progress: Progress | None = None, *, only: Iterable[int] | None = None
) -> None:
    """Run batches into a directory (all, or `only` some) that are not there yet, and leave them as they are."""
    files.claim(job, directory)
    if files.is_finished(directory):
        return
    tally, missing = _Tally(job, on_progress), set(files.missing_shards(directory, len(job.batches)))
    for number in range(len(job.batches)) if only is None else only:
        if number in missing:
            files.write_shard(job, directory, number, read_batch(job, number))
        tally.finished(number)


def merge_shards(parts: Sequence[Path], directory: Path, batches: int) -> ActivationStore:
    """One store from the directories in which a pass's batches were run; no model is needed. Raises `StoreError` for a
    part of another pass, and when a batch is missing."""
    if files.is_finished(directory):
        return ActivationStore.open(directory)
    for part in parts:
        files.take_over(part, directory, files.missing_shards(directory, batches))
    missing = files.missing_shards(directory, batches)
    if missing:
        raise StoreError(f"batch {missing[0]} of {batches} was not run in any of the parts")
    files.finish(directory, batches)
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
