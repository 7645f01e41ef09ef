"""A shard of an evaluation, or of a study's test: some of the batches, in a directory that merges with the others'.

What comes before the test (finding, choosing, calibrating, matching controls) is done once and read from the run's
directory (`study/frozen.py`); what comes after (costs, summary, report) is done once where the shards are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clampdown.errors import JudgeError, ShardError
from clampdown.evaluation import runner
from clampdown.results.run import Run
from clampdown.scale.on_ray import answer_on_ray
from clampdown.scale.pool import PoolRequest
from clampdown.scale.shards import Shard, ShardFile, begin
from clampdown.steering.arms import Arm
from clampdown.store import RecordLog, write_atomic
from clampdown.study import evaluate as evaluating
from clampdown.study.frozen import FILE as FROZEN
from clampdown.study.frozen import FrozenTest, frozen_test
from clampdown.study.measure import Asked, Subject, job_of
from clampdown.study.progress import Stages
from clampdown.study.run import StudyRequest, asked_of, key_of_choice, reading_of, take_test
from clampdown.study.sizes import Answering
from clampdown.study.study import Study

KIND = "evaluation"


def evaluate_shard(
    evaluation: evaluating.Evaluation, out: Path, shard: Shard, stages: Stages, command: Sequence[str] = ()
) -> Path:
    """One shard of an evaluation, into a directory of its own under `out`. Raises `ShardError`."""
    check_matched(out, controls=evaluation.controls)
    return answer_shard(
        evaluation, evaluation.arms, evaluation.asked, evaluation.answering, shard, out, stages, command
    )


def check_matched(out: Path, *, controls: bool) -> None:
    """Before anything is matched: raises `ShardError` when a shard would do that by itself."""
    if controls and not (out / FROZEN).exists():
        raise ShardError(
            f"{out} holds no matched controls: shards would each match their own",
            hint="run the same command with --until-test in place of --shard once, before the shards",
        )


def study_shard(
    study: Study, request: StudyRequest, out: Path, shard: Shard, stages: Stages, command: Sequence[str] = ()
) -> Path:
    """One shard of a study's test, into a directory of its own under `out`. Raises `ShardError` when nothing was chosen
    there yet."""
    test = _test(study, request, out)
    batch_rows = request.sizes.answering.batch_rows or test.answering.batch_rows
    answering = replace(test.answering, batch_rows=batch_rows)
    reading = reading_of(study, test)
    return answer_shard(reading, test.arms, asked_of(study, test), answering, shard, out, stages, command)


def study_on_ray(study: Study, request: StudyRequest, out: Path, pool: PoolRequest, stages: Stages) -> Run:
    """A study's test on Ray's actors, and what comes after it here."""
    test = _test(study, request, out)
    answer_on_ray(reading_of(study, test), test.arms, asked_of(study, test), test.answering, out, pool, stages)
    return take_test(study, test, out, stages)


def _test(study: Study, request: StudyRequest, out: Path) -> FrozenTest:
    test = frozen_test(out, key_of_choice(study, request))
    if test is None:
        raise ShardError(
            f"{out} holds no test: what is asked was not found and chosen yet",
            hint="run the same command with --until-test in place of --shard once, before the shards",
        )
    return test


def answer_shard(
    subject: Subject,
    arms: Sequence[Arm],
    asked: Asked,
    answering: Answering,
    shard: Shard,
    out: Path,
    stages: Stages,
    command: Sequence[str] = (),
) -> Path:
    """Answer one shard's batches, and judge them. An interrupted shard goes on.

    Raises `ShardError` when the size of batches is left to each machine's memory, and `JudgeError` when replies wait
    for a judge that failed: the shard counts as finished then, and whoever merges judges them.
    """
    at_once = answering.engine.rows if answering.engine else answering.batch_rows
    if at_once is None:
        raise ShardError(
            "shards must cut the same batches, and how many rows fit differs between machines",
            hint="say how many replies are generated together, the same for every shard: --batch-rows 32",
        )
    suites = tuple(suite for suite in asked.suites if suite.prompts)
    job = job_of(subject, arms, suites, answering)
    by_likelihood = replace(job, arms=tuple(arm for arm in job.arms if asked.by_likelihood(arm)))
    chunks = runner.option_chunks(by_likelihood) if by_likelihood.arms else []
    batches = runner.cut_batches(subject.lm, job)
    units = {"batch_rows": at_once, "batches": len(batches), "rows": len(job.rows), "chunks": len(chunks)}
    key, directory = runner.resume_key(subject.lm, subject.saes, job), shard.directory(out)
    file = ShardFile(KIND, shard, key, units, tuple(command))
    directory.mkdir(parents=True, exist_ok=True)
    with RecordLog(directory, key) as log:
        begin(directory, file)
        if (out / FROZEN).exists():
            write_atomic(directory / FROZEN, (out / FROZEN).read_bytes())
        _choose_options(subject, by_likelihood, log, shard.of(len(chunks)), stages)
        try:
            with stages.stage(f"Answering shard {shard}") as tick:
                runner.answer(subject.lm, subject.saes, job, log, tick, only=shard.of(len(batches)))
        except JudgeError:
            replace(file, finished=True).write(directory)
            raise
        replace(file, finished=True).write(directory)
    return directory


def _choose_options(subject: Subject, job: runner.Job, log: RecordLog, chunks: range, stages: Stages) -> None:
    if not chunks:
        return
    with stages.stage("Multiple choice by likelihood") as tick:
        runner.refuse_generated_scope(job.arms)
        runner.score_chunks(subject.lm, subject.saes, job, log, tick, only=chunks)
