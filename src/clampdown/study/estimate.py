"""What a run will cost, before it begins: replies, tokens, judgements, and time from a small timed sample."""

from __future__ import annotations

import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from clampdown.evaluation.runner import Job
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.arms import EncodedRow, batches, generate_batch
from clampdown.store import Key

SAMPLE_SHARE = 50
LEAST_SAMPLE = 16


@dataclass(frozen=True, slots=True)
class Estimate:
    """Rows of a job and what is left of them. Tokens and judgements are upper bounds: replies end early, and equal
    replies are judged once. `seconds` is what generation takes at most, None when it was not timed."""

    rows: int
    left: int
    prompt_tokens: int
    new_tokens: int
    seconds: float | None = None

    def __str__(self) -> str:
        done = f" ({self.rows - self.left:,} of {self.rows:,} are there)" if self.left < self.rows else ""
        text = (
            f"{self.left:,} replies to generate and judge{done}: {self.prompt_tokens:,} prompt tokens, "
            f"at most {self.new_tokens:,} new ones"
        )
        return text if self.seconds is None else f"{text}; at most about {duration(self.seconds)} of generation"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _cut(lm: LanguageModel, job: Job) -> Iterator[list[EncodedRow]]:
    return batches(lm, job.rows, job.settings.batch_rows, job.settings.max_new_tokens)


def estimate(
    lm: LanguageModel, saes: Sequence[Sae], job: Job, done: Container[Key] = frozenset(), *, timed: bool = True
) -> Estimate:
    """Count what is left of a job; with `timed`, generate at most 2 % of it (and at least 16 rows) to see how long it
    takes. A small batch is slower per row than a large one, so that the time is an upper bound."""
    every = [row for batch in _cut(lm, job) for row in batch]
    left = [row for row in every if (row[0].name, row[1].suite, row[1].id) not in done]
    counts = Estimate(
        rows=len(every),
        left=len(left),
        prompt_tokens=sum(len(ids) for _, _, ids in left),
        new_tokens=len(left) * job.settings.max_new_tokens,
    )
    if not timed or not left:
        return counts
    size = min(len(left), job.settings.batch_rows or len(left), max(LEAST_SAMPLE, len(left) // SAMPLE_SHARE))
    sample = left[:: len(left) // size][:size]
    began = time.perf_counter()
    generate_batch(lm, saes, sample, job.settings.max_new_tokens)
    seconds = (time.perf_counter() - began) * len(left) / len(sample)
    return Estimate(counts.rows, counts.left, counts.prompt_tokens, counts.new_tokens, seconds)
