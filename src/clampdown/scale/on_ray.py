"""A pass and an evaluation on Ray's actors: what one process would do, done by many, and kept by the driver.

Both leave their results where the same command without `--ray` looks for them, so that whatever is missing after a kill
is all that is done again, with or without Ray.

- A pass: actors write batches into the pass's directory, which all machines must see. The driver joins them.
- An evaluation: actors send rows; the driver alone writes the run's log and asks the judge, once for every reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clampdown.activations import files
from clampdown.activations.store import ActivationStore
from clampdown.activations.stream import Pass
from clampdown.documents import parse_json, row_of
from clampdown.errors import ShardError
from clampdown.evaluation import runner
from clampdown.evaluation.judging import Judging
from clampdown.models.chat import encode
from clampdown.models.memory import rows_that_fit
from clampdown.scale.pool import Pool, PoolRequest, pool
from clampdown.scale.tasks import ANSWER, CHOOSE, READ, AnswerMessage, PassMessage, Unit, by_likelihood, packed
from clampdown.steering.arms import Arm
from clampdown.store import RecordLog, content_hash, key_of
from clampdown.study.measure import Asked, Subject, job_of
from clampdown.study.progress import Stages, Tick
from clampdown.study.sizes import Answering
from clampdown.types import OptionChoice, StoredReply

MOST_ROWS = 64
"""Rows of a batch whose size was not said: several actors on one machine share its memory, and many batches spread
evenly."""


def read_on_ray(job: Pass, directory: Path, tick: Tick, *, request: PoolRequest) -> ActivationStore:
    """Run what is left of a pass. Raises `ShardError` when what an actor wrote is not seen here."""
    files.claim(job, directory)
    total = len(job.batches)
    missing = [] if files.is_finished(directory) else files.missing_shards(directory, total)
    if missing:
        with pool(request, packed(PassMessage.of(job, directory))) as actors:
            actors.check(content_hash(job.key))
            left = len(missing)
            for (_, number), _ in actors.run([(READ, number) for number in missing]):
                left -= 1
                if not files.shard_path(directory, number).exists():
                    raise ShardError(
                        f"an actor wrote batch {number} into {directory}, and it is not there",
                        hint="actors and driver need one file system: give an --out that every machine sees",
                    )
                tick(total - left, total)
    if not files.is_finished(directory):
        files.finish(directory, total)
    return ActivationStore.open(directory)


def answer_on_ray(
    subject: Subject,
    arms: Sequence[Arm],
    asked: Asked,
    answering: Answering,
    out: Path,
    request: PoolRequest,
    stages: Stages,
) -> None:
    """Answer and judge into `out` what its log does not hold yet. Raises as `runner.run`."""
    job = _sized(subject, job_of(subject, arms, tuple(suite for suite in asked.suites if suite.prompts), answering))
    if answering.engine is not None:
        raise ShardError("Ray's actors write replies themselves", hint="give one of --ray and --engine")
    names = tuple(arm.name for arm in arms if asked.by_likelihood(arm))
    out.mkdir(parents=True, exist_ok=True)
    with RecordLog(out, runner.resume_key(subject.lm, subject.saes, job)) as log:
        if not _left(subject, job, names, log):
            return
        with pool(request, packed(AnswerMessage.of(subject, job, names))) as actors:
            with stages.stage("Loading on every actor"):
                actors.check(content_hash(runner.resume_key(subject.lm, subject.saes, job)))
            with stages.stage(f"Answering on {len(actors.actors)} actors") as tick:
                _answer(subject, job, names, log, actors, tick)


def _answer(subject: Subject, job: runner.Job, names: Sequence[str], log: RecordLog, actors: Pool, tick: Tick) -> None:
    judging = Judging(job.judge, job.judge_name, job.suites, log)
    judging.catch_up()
    units = _left(subject, job, names, log)
    for done, ((kind, _), text) in enumerate(actors.run(units), 1):
        rows = parse_json(text, "an actor's rows", ShardError)
        if kind == CHOOSE:
            log.choices.append([row_of(OptionChoice)(row) for row in rows])
        else:
            replies = [row_of(StoredReply)(row) for row in rows]
            log.replies.append([reply for reply in replies if key_of(reply) not in log])
            judging.catch_up()
        tick(done, len(units))
    runner.refuse_unjudged(judging, log)


def _left(subject: Subject, job: runner.Job, names: Sequence[str], log: RecordLog) -> list[Unit]:
    """Batches and pieces of which something is missing. What takes longest comes first."""
    batches = runner.cut_batches(subject.lm, job)
    units: list[Unit] = [
        (ANSWER, number)
        for number, batch in enumerate(batches)
        if any(key not in log and key not in log.replies for key in runner.keys_of(batch))
    ]
    choosing = by_likelihood(job, names)
    if not choosing.arms:
        return units
    runner.refuse_generated_scope(choosing.arms)
    for number, chunk in enumerate(runner.option_chunks(choosing)):
        if any((arm.name, p.suite, p.id) not in log.choices for arm in choosing.arms for p in chunk):
            units.append((CHOOSE, number))
    return units


def _sized(subject: Subject, job: runner.Job) -> runner.Job:
    """The job with batches of a stated size: every actor must cut the same ones."""
    if job.settings.batch_rows is not None:
        return job
    longest = max(len(encode(subject.lm, arm.messages(prompt))) for arm, prompt in job.rows)
    rows = rows_that_fit(subject.lm, longest + job.settings.max_new_tokens)
    return replace(job, settings=replace(job.settings, batch_rows=min(rows, MOST_ROWS)))
