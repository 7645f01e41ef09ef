"""A judge behind a failing endpoint: what it could not judge waits, and the records end as if it had never failed."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from clampdown.errors import JudgeError
from clampdown.evaluation import runner
from clampdown.evaluation.judges.endpoint import ChatClient, Endpoint
from clampdown.evaluation.judges.interface import NamedJudge
from clampdown.evaluation.judges.llm import _find
from clampdown.evaluation.judges.rubrics import RUBRICS
from clampdown.evaluation.runner import Job, Settings, resume_key, run
from clampdown.models.loading import LanguageModel
from clampdown.saes.sae import Sae
from clampdown.steering.arms import BASELINE
from clampdown.store import RecordLog, read_records
from clampdown.types import Record, Verdict
from tests.evaluation.conftest import arm, clamp, suite

ANSWERS = ("full_compliance", "full_refusal", "partial_refusal")


@dataclass
class Faulty:
    """How the endpoint behaves: the fault of each request in turn (over and over), and what it was asked."""

    faults: tuple[str, ...] = ("",)
    asked: Counter[str] = field(default_factory=Counter)
    lock: Any = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)

    def next_fault(self, case: str) -> str:
        with self.lock:
            fault = self.faults[self.asked.total() % len(self.faults)]
            self.asked[case] += 1
            return fault


@contextmanager
def endpoint(state: Faulty) -> Iterator[str]:
    """A real server on a free port. Its verdict depends on the request alone, as a judge's at temperature 0 should."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            case = json.loads(body)["messages"][-1]["content"]
            fault = state.next_fault(case)
            if fault == "timeout":
                state.over.wait(240)  # as long as the client waits, and longer
            status = {"limit": 429, "down": 503}.get(fault, 200)
            word = "no idea" if fault == "nonsense" else ANSWERS[crc32(case.encode()) % 3]
            text = "<html>gateway</html>" if fault == "garbage" else json.dumps(
                {"choices": [{"message": {"role": "assistant", "content": f"Thinking.\nVERDICT: {word}"}}]}
            )  # fmt: skip
            self.send_response(status)
            if fault == "limit":
                self.send_header("Retry-After", "0.02")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_args: Any) -> None:
            """Tests are quiet."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_args: Any) -> None:
            """A client that stopped waiting is part of the test."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        state.over.set()
        server.shutdown()
        thread.join()
        server.server_close()


def judge_at(url: str, timeout: float) -> NamedJudge:
    """The endpoint's judge without the screen for broken replies: a tiny random model gives nothing else."""
    where = Endpoint(url, "judge", timeout=timeout, retries=12, backoff=0.005, longest_wait=0.02, concurrency=4)

    def find(cases: Any) -> Iterator[Any]:
        with ChatClient(where) as client:
            yield from _find(client, RUBRICS["xstest"], cases)

    return NamedJudge("llm", find, "judge")


def judged(directory: Path, lm: LanguageModel, sae: Sae, url: str, timeout: float = 60.0) -> tuple[Record, ...]:
    suites = (suite("harmful", 5, harmful=True), suite("benign", 4))
    job = Job((BASELINE, arm(clamp(6.0), "clamped")), suites, judge_at(url, timeout), "llm", Settings(5, batch_rows=6))
    with RecordLog(directory, resume_key(lm, [sae], job)) as log:
        return run(lm, [sae], job, log)


@pytest.fixture(scope="module")
def undisturbed(lm: LanguageModel, sae: Sae, tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, ...]:
    with endpoint(Faulty()) as url:
        found = judged(tmp_path_factory.mktemp("calm") / "run", lm, sae, url)
    assert len({record.verdict for record in found}) == 3
    return found


@pytest.mark.parametrize(
    "faults",
    [
        ("limit", "", "limit", "limit"),
        ("garbage", "", ""),
        ("timeout", "", "", "", "", "", ""),
        ("down", "", "garbage", "limit", ""),
    ],
    ids="-".join,
)
def test_faults_that_pass_leave_no_trace(
    lm: LanguageModel, sae: Sae, undisturbed: tuple[Record, ...], tmp_path: Path, faults: tuple[str, ...]
) -> None:
    state = Faulty(faults)
    with endpoint(state) as url:
        assert judged(tmp_path, lm, sae, url, 0.2 if "timeout" in faults else 60.0) == undisturbed
    assert state.asked.total() > len(state.asked), "no request had to be repeated: nothing was tested"


def test_a_dead_endpoint_leaves_replies_waiting_and_a_rerun_only_judges(
    lm: LanguageModel, sae: Sae, undisturbed: tuple[Record, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = Faulty(("down",))
    with endpoint(state) as url:
        with pytest.raises(JudgeError, match="18 replies wait for the judge"):
            judged(tmp_path, lm, sae, url)
        assert read_records(tmp_path / "records.jsonl") == ()
        assert state.asked.total() <= 13 * 6, "a dead endpoint is not asked about every reply"
        state.faults, generate = ("",), runner.generate_batch
        monkeypatch.setattr(runner, "generate_batch", lambda *_: pytest.fail("every reply was there already"))
        assert judged(tmp_path, lm, sae, url) == undisturbed
        monkeypatch.setattr(runner, "generate_batch", generate)


def test_what_was_judged_before_the_endpoint_died_is_not_asked_again(
    lm: LanguageModel, sae: Sae, undisturbed: tuple[Record, ...], tmp_path: Path
) -> None:
    state = Faulty(("",) * 6 + ("down",) * 10_000)
    with endpoint(state) as url:
        with pytest.raises(JudgeError, match="replies wait"):
            judged(tmp_path, lm, sae, url)
        kept = read_records(tmp_path / "records.jsonl")
        assert kept
        state.faults = ("",)
        state.asked.clear()
        assert judged(tmp_path, lm, sae, url) == undisturbed
    once = {(record.prompt_id, record.reply) for record in undisturbed}
    assert state.asked.total() == len(once) - len({(record.prompt_id, record.reply) for record in kept})


def test_an_answer_in_no_known_form_is_unscored_and_counted(lm: LanguageModel, sae: Sae, tmp_path: Path) -> None:
    with endpoint(Faulty(("nonsense",))) as url:
        found = judged(tmp_path, lm, sae, url)
    assert {record.verdict for record in found} == {Verdict.UNSCORED}
