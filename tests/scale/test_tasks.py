"""An actor's task, made again from its message, does what the sender would have done."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from clampdown.activations import files
from clampdown.activations.collect import collect_to
from clampdown.activations.stream import Pass
from clampdown.errors import MissingPackageError, ShardError
from clampdown.evaluation import runner
from clampdown.evaluation.condition import StoredCondition, condition_sae
from clampdown.scale.pool import PoolRequest, pool, shares
from clampdown.scale.tasks import ANSWER, CHOOSE, READ, AnswerMessage, PassMessage, by_likelihood, packed, task_of
from clampdown.store import content_hash, to_jsonable
from clampdown.study.evaluate import Evaluation
from clampdown.study.measure import job_of
from clampdown.types import Site


def job_and_names(found: Evaluation) -> tuple[runner.Job, tuple[str, ...]]:
    return job_of(found, found.arms, found.asked.suites, found.answering), found.test.likelihood


def test_a_passes_task_writes_the_senders_bytes(small_pass: Pass, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    assert collect_to(small_pass, here, only=[1, 3]) is None
    files.claim(small_pass, there)
    task = task_of(packed(PassMessage.of(small_pass, there)))
    assert task.digest == content_hash(small_pass.key)
    for number in (3, 1, 3):
        assert task.do((READ, number)) == "[]"
    for number in (1, 3):
        assert files.shard_path(here, number).read_bytes() == files.shard_path(there, number).read_bytes()


def test_an_evaluations_task_answers_as_the_sender_does(small_evaluation: Evaluation) -> None:
    job, names = job_and_names(small_evaluation)
    lm, saes = small_evaluation.lm, small_evaluation.saes
    task = task_of(packed(AnswerMessage.of(small_evaluation, job, names)))
    assert task.digest == content_hash(runner.resume_key(lm, saes, job))
    batches = runner.cut_batches(lm, job)
    for number in (0, len(batches) - 1):
        expected = runner.answer_batch(lm, saes, job, batches[number])
        assert json.loads(task.do((ANSWER, number))) == to_jsonable(expected)
    choosing = by_likelihood(job, names)
    expected = runner.score_chunk(lm, saes, choosing, runner.option_chunks(choosing)[0])
    assert json.loads(task.do((CHOOSE, 0))) == to_jsonable(list(expected))


def test_another_job_has_another_digest(small_evaluation: Evaluation) -> None:
    job, names = job_and_names(small_evaluation)
    message = AnswerMessage.of(small_evaluation, job, names)
    longer = replace(message, max_new_tokens=13)
    assert task_of(packed(longer)).digest != task_of(packed(message)).digest


@pytest.mark.parametrize("text", ["", "{}", '{"kind": "other", "message": {}}', '{"kind": "pass", "message": {}}'])
def test_what_is_no_message(text: str) -> None:
    with pytest.raises(ShardError):
        task_of(text)


def test_a_condition_is_stored_to_the_last_bit() -> None:
    sae = condition_sae(Site(2), [0.1, -0.7, 1e-9, 3.0])
    found = StoredCondition.of(sae).sae()
    assert (found.name, found.revision, found.cfg) == (sae.name, sae.revision, sae.cfg)
    assert all((found.tensors[name] == sae.tensors[name]).all() for name in sae.tensors)


@pytest.mark.parametrize(
    ("cpus", "gpus", "request_", "expected"),
    [
        ([8, 8], [0, 0], PoolRequest(), (2, 8, 0)),
        ([8, 8], [0, 0], PoolRequest(actors=3), (3, 4, 0)),  # five each would leave the third without a machine
        ([2], [0], PoolRequest(actors=2), (2, 1, 0)),
        ([16, 16], [4, 4], PoolRequest(), (8, 1, 1)),
        ([16, 16], [4, 4], PoolRequest(gpus_per_actor=3), (2, 1, 3)),
        ([16, 16], [4, 4], PoolRequest(actors=4, gpus_per_actor=0), (4, 8, 0)),
    ],
)
def test_actors_get_what_one_machine_has(
    cpus: list[float], gpus: list[float], request_: PoolRequest, expected: tuple[int, float, float]
) -> None:
    actors, held = shares(cpus, gpus, request_)
    assert (actors, held["num_cpus"], held["num_gpus"]) == expected


@pytest.mark.parametrize("request_", [PoolRequest(actors=9), PoolRequest(gpus_per_actor=5), PoolRequest(actors=40)])
def test_actors_that_would_wait_for_ever_are_refused(request_: PoolRequest) -> None:
    with pytest.raises(ShardError, match="do not fit"):
        shares([16, 16], [4, 4], request_)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed here")
def test_without_ray_it_is_said_how_to_get_it() -> None:
    with pytest.raises(MissingPackageError, match="ray"), pool(PoolRequest(), "{}"):
        pass
