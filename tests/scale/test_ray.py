"""On Ray's actors everything is as in one process, whoever is killed meanwhile. `make test-ray` has an environment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ray = pytest.importorskip("ray", reason="ray is not installed: `make test-ray` runs these tests")

from clampdown.activations import files  # noqa: E402
from clampdown.activations.collect import collect_to  # noqa: E402
from clampdown.activations.stream import Pass  # noqa: E402
from clampdown.errors import ModelError, ShardError  # noqa: E402
from clampdown.scale.on_ray import answer_on_ray, read_on_ray  # noqa: E402
from clampdown.scale.pool import Pool, PoolRequest, pool  # noqa: E402
from clampdown.scale.tasks import READ, PassMessage, packed  # noqa: E402
from clampdown.steering.plan import write_plan  # noqa: E402
from clampdown.store import content_hash, key_of, read_records  # noqa: E402
from clampdown.study.evaluate import Evaluation, Request, run_evaluate  # noqa: E402
from tests.scale.conftest import SUITES, quiet  # noqa: E402
from tests.study.test_evaluate import plan  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]  # Ray's own warnings
TWO = PoolRequest("local", actors=2)


@pytest.fixture(scope="module", autouse=True)
def one_ray() -> Iterator[None]:
    """One Ray for all tests of this file: starting it takes most of the time."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
    yield
    ray.shutdown()


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_two_actors_write_the_bytes_of_one_process(small_pass: Pass, tmp_path: Path) -> None:
    collect_to(small_pass, tmp_path / "one")
    seen: list[tuple[int, int]] = []
    found = read_on_ray(small_pass, tmp_path / "two", lambda *at: seen.append(at), request=TWO)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert seen[-1] == (len(small_pass.batches),) * 2 and len(found.prompts) == 80


def killed_once(actors: Pool, units: list[tuple[str, int]]) -> set[tuple[str, int]]:
    """All units, one of the actors being killed after the first result."""
    done = set()
    for unit, _ in actors.run(units):
        if not done:
            os.kill(actors.processes()[0], signal.SIGKILL)
        done.add(unit)
    return done


def test_a_killed_actor_changes_nothing(small_pass: Pass, tmp_path: Path) -> None:
    collect_to(small_pass, tmp_path / "one")
    files.claim(small_pass, tmp_path / "two")
    units = [(READ, number) for number in range(len(small_pass.batches))]
    with pool(TWO, packed(PassMessage.of(small_pass, tmp_path / "two"))) as actors:
        actors.check(content_hash(small_pass.key))
        before = actors.processes()
        assert killed_once(actors, units) == set(units)
        assert actors.processes() != before, "the actor was started again"
    read_on_ray(small_pass, tmp_path / "two", lambda *_: None, request=TWO)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_an_actor_with_something_else_is_refused(small_pass: Pass, tmp_path: Path) -> None:
    with pool(TWO, packed(PassMessage.of(small_pass, tmp_path))) as actors, pytest.raises(ShardError, match="driver's"):
        actors.check("another")


def test_what_an_actor_could_not_load_is_said(small_pass: Pass, tmp_path: Path) -> None:
    message = json.loads(packed(PassMessage.of(small_pass, tmp_path)))
    message["message"]["model"] = "no/such/model"
    with pool(TWO, json.dumps(message)) as actors, pytest.raises(ModelError, match="no/such/model"):
        actors.check("any")


def test_more_accelerators_than_there_are() -> None:
    with pytest.raises(ShardError, match="do not fit"), pool(PoolRequest("local", 2, gpus_per_actor=4), "{}"):
        pass


def test_records_on_ray_are_those_of_one_process(
    small_evaluation: Evaluation, small_request: Request, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run_evaluate(small_evaluation, one, small_request, quiet())
    ready = small_evaluation
    answer_on_ray(ready, ready.arms, ready.asked, ready.answering, two, TWO, quiet())
    for name in ("records.jsonl", "replies.jsonl", "choices.jsonl"):
        found = [sorted((path / name).read_text().splitlines()) for path in (one, two)]
        assert found[0] == found[1] and found[0], name
    answer_on_ray(ready, ready.arms, ready.asked, ready.answering, two, PoolRequest("nowhere"), quiet())  # all is there


def test_a_killed_driver_goes_on_where_it_was(
    small_evaluation: Evaluation, small_request: Request, tmp_path: Path
) -> None:
    write_plan(tmp_path / "clamped.toml", plan())
    options = ["--suites", ",".join(SUITES), "--limit", "8", "--max-new-tokens", "12", "--batch-rows", "4"]
    words = [sys.executable, "-m", "clampdown", "evaluate", str(tmp_path / "clamped.toml"), *options,
             "--ray", "local", "--actors", "2", "--out", str(tmp_path / "killed")]  # fmt: skip
    log = tmp_path / "killed" / "replies.jsonl"
    driver = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    while driver.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = log.read_bytes()
    assert 0 < before.count(b"\n") < 48, "it was killed in the middle"
    assert subprocess.run(words, stdout=subprocess.DEVNULL, check=False).returncode == 0
    assert log.read_bytes().startswith(before[: before.rfind(b"\n") + 1]), "nothing was generated again"
    run_evaluate(small_evaluation, tmp_path / "one", small_request, quiet())
    found = [{key_of(r): r for r in read_records(tmp_path / name / "records.jsonl")} for name in ("one", "killed")]
    assert found[0] == found[1] and (tmp_path / "killed" / "report.html").exists()
