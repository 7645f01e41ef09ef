"""A run that is killed, finds the disk full, or loses its judge ends with the records of an undisturbed one.

Real processes: a server process imports everything once, and every attempt is a fork of it that is really killed.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from clampdown.errors import StoreError
from clampdown.evaluation.runner import Job, Settings, resume_key, run
from clampdown.steering.arms import BASELINE
from clampdown.store import RecordLog, read_records
from clampdown.types import Judgement, Prompt
from tests.evaluation.conftest import arm, clamp, length_judge, suite
from tests.steering.conftest import random_sae, tiny_llama

KILLS = 20
LOGS = ("records.jsonl", "replies.jsonl")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


def job(asked: Path) -> Job:
    """Two arms, 24 rows in 6 batches; the judge writes down what it is asked before it answers."""

    def judge(prompt: Prompt, reply: str) -> Judgement:
        with asked.open("a") as file:
            file.write(f"{prompt.suite}/{prompt.id}/{reply}\n")
        return length_judge(prompt, reply)

    suites = (suite("harmful", 7, harmful=True), suite("benign", 5))
    return Job((BASELINE, arm(clamp(6.0), "clamped")), suites, judge, "by length", Settings(5, batch_rows=4))


def attempt(directory: Path, free_bytes: int | None = None, deadly: bool = False) -> None:
    """One process's try at the whole run, on a disk with so much room for each file. `deadly`: the system kills it
    where the room ends."""
    torch.set_num_threads(1)
    if deadly:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if free_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, free_bytes))
    lm, sae = tiny_llama(), random_sae()
    what = job(directory.parent / "asked")
    try:
        with RecordLog(directory, resume_key(lm, [sae], what)) as log:
            run(lm, [sae], what, log)
    except StoreError:
        os._exit(3)


def started(directory: Path, free_bytes: int | None = None, deadly: bool = False) -> BaseProcess:
    process = FORKS.Process(target=attempt, args=(directory, free_bytes, deadly))
    process.start()
    return process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("faults") / "run"
    process = started(directory)
    process.join()
    assert process.exitcode == 0
    return directory


def test_twenty_kills_at_random_bytes_change_nothing(undisturbed: Path, tmp_path: Path) -> None:
    """Each strikes while a byte of the larger log is written, so none comes too late, whatever the machine does."""
    chance, directory, known = random.Random(0), tmp_path / "run", set()
    longest = max((undisturbed / name).stat().st_size for name in LOGS)
    for target in sorted(chance.randrange(longest) for _ in range(KILLS)):
        before_asked = len((tmp_path / "asked").read_text().splitlines()) if (tmp_path / "asked").exists() else 0
        killed = started(directory, target, deadly=True)
        killed.join()
        assert killed.exitcode == -signal.SIGXFSZ
        asked = (tmp_path / "asked").read_text().splitlines()[before_asked:] if (tmp_path / "asked").exists() else []
        assert not known & set(asked), "what had been recorded was judged again"
        records = directory / "records.jsonl"
        known = {f"{r.suite}/{r.prompt_id}/{r.reply}" for r in read_records(records)} if records.exists() else set()
    last = started(directory)
    last.join()
    assert last.exitcode == 0
    for name in LOGS:
        assert (directory / name).read_bytes() == (undisturbed / name).read_bytes()


def test_a_last_line_cut_anywhere_is_done_again(undisturbed: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    started(directory).join()
    for name in LOGS:
        whole = (directory / name).read_bytes()
        (directory / name).write_bytes(whole[: whole.rfind(b"\n", 0, -1) + 20])
    process = started(directory)
    process.join()
    assert process.exitcode == 0
    assert set(read_records(directory / "records.jsonl")) == set(read_records(undisturbed / "records.jsonl"))


def test_a_disk_that_fills_up_is_a_named_error_and_costs_nothing(undisturbed: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    for room in (2000, 2600, 4100):
        process = started(directory, room)
        process.join()
        assert process.exitcode == 3
        whole = (directory / "records.jsonl").read_bytes()
        assert not whole or whole.endswith(b"\n"), "half a line was left behind"
    process = started(directory)
    process.join()
    assert process.exitcode == 0
    assert (directory / "records.jsonl").read_bytes() == (undisturbed / "records.jsonl").read_bytes()
