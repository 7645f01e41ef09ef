"""The server's own safety: who may ask, for how much, and a log that survives what the server does not."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.requests import Request

from clampdown.commands.serve import Options, is_local, listen, open_server, public_name
from clampdown.errors import ClampdownError, PlanError, StoreError
from clampdown.organism import MODEL_DIR, PLANS_DIR
from clampdown.saes.checkpoints import load_sae
from clampdown.serving.audit import AuditLog, read_lines
from clampdown.serving.desk import Desk
from clampdown.serving.limits import Keys, Limits, allowed_hosts, host_name, readable_by_others
from clampdown.serving.plans import PlanTable
from clampdown.serving.schemas import ChatRequest
from clampdown.serving.worker import Limits as EngineLimits
from clampdown.steering.plan import read_plan
from clampdown.study.progress import Stages
from tests.serving.live import PATIENCE, Live, running

KEY, OTHER = "k" * 20 + "1", "k" * 20 + "2"
CHAT = "/v1/chat/completions"
SAY = {"model": "organism:clamp-352-gated", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
ENDLESS = {**SAY, "max_tokens": 500_000}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A strict server: keys, plans only, small limits."""
    directory = tmp_path_factory.mktemp("strict")
    keys = directory / "keys"
    keys.write_text(f"# who\nalice {KEY}\nbob {OTHER}\n")
    options = Options(
        api_keys=keys,
        allow_base=False,
        inline=None,
        limits=Limits(body_bytes=4000, choices=4, concurrent=3, tokens=500_000),
        engine=EngineLimits(rows=2, queue=2),
    )
    with running(directory, options, endless=True) as found:
        yield found


def bearer(key: str) -> dict[str, Any]:
    return {"headers": {"authorization": f"Bearer {key}", "content-type": "application/json"}}


def test_a_key_is_needed_everywhere_but_for_health(live: Live) -> None:
    for path in ("/v1/models", "/metrics", "/openapi.json"):
        assert live.get(path).status_code == 401
        assert live.get(path, **bearer(OTHER)).status_code == 200
    for headers in ({}, {"authorization": KEY}, {"authorization": "Bearer"}, {"authorization": f"Bearer {KEY}x"}):
        answer = live.post(CHAT, SAY, headers={"content-type": "application/json", **headers})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert live.get("/healthz").status_code == 200
    assert live.post(CHAT, SAY, **bearer(KEY)).status_code == 200
    assert live.lines()[-1]["key"] == "alice" and live.lines()[-2]["key"] is None
    assert KEY not in live.audit.read_text()


def test_what_the_operator_forbids_is_forbidden(live: Live) -> None:
    for body, code in (
        ({**SAY, "model": "organism"}, "steering_required"),
        ({**SAY, "steering": "off"}, "steering_required"),
        ({**SAY, "steering": {"feature": 1, "strength": 1}}, "inline_steering_disabled"),
    ):
        answer = live.post(CHAT, body, **bearer(KEY))
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, code)
    listed = [model["id"] for model in live.get("/v1/models", **bearer(KEY)).json()["data"]]
    assert "organism" not in listed and len(listed) == 3


def test_a_large_body_is_refused_whether_or_not_it_says_how_large_it_is(live: Live) -> None:
    body = json.dumps({**SAY, "user": "x" * 5000}).encode()
    stated = live.post(CHAT, None, content=body, **bearer(KEY))
    chunked = live.post(CHAT, None, content=iter([body[:3000], body[3000:]]), **bearer(KEY))
    for answer, line in zip((stated, chunked), live.lines()[-2:], strict=True):
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        assert (line["endpoint"], line["status"], line["code"]) == ("chat", 413, "request_too_large")
        assert "4000 bytes" in answer.json()["error"]["message"]
    assert live.get("/healthz").json()["status"] == "ok"


@contextmanager
def asking(live: Live, **more: Any) -> Iterator[None]:
    """A request for a reply without an end, by a client that goes away when the block ends."""
    host, port = live.url.removeprefix("http://").split(":")
    body = json.dumps({**ENDLESS, **more}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        yield


def load(live: Live) -> tuple[int, int]:
    """How many requests decode, and how many wait."""
    health = live.get("/healthz").json()
    return health["running"], health["queued"]


def test_beyond_the_queue_is_429_with_a_time_to_wait(live: Live) -> None:
    """Two decode, one waits; a request for two more gets nothing, and its place in the queue is given back."""
    with ExitStack() as asked:
        for of in ((1, 0), (2, 0), (2, 1)):
            asked.enter_context(asking(live))
            wait_until(lambda of=of: load(live) == of)
        answer = live.post(CHAT, {**SAY, "n": 2}, **bearer(KEY))
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        assert live.lines()[-1]["status"] == 429
        never = live.post(CHAT, {**SAY, "n": 3}, **bearer(KEY))
        assert (never.status_code, never.json()["error"]["code"]) == (400, "too_many_choices"), (
            "the queue has two places"
        )
        assert load(live) == (2, 1)
    wait_until(lambda: load(live) == (0, 0))
    assert live.post(CHAT, SAY, **bearer(KEY)).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(live: Live, stream: bool) -> None:
    before = len(live.lines())
    with asking(live, stream=stream):
        wait_until(lambda: load(live) == (1, 0))
    wait_until(lambda: load(live) == (0, 0))
    wait_until(lambda: len(live.lines()) > before)
    assert live.lines()[-1]["status"] == 499


def wait_until(holds: Any) -> None:
    """Ask again until it holds."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_log_that_cannot_be_written_stops_the_answers_and_not_the_server(live: Live) -> None:
    audit = live.served.ledger.audit
    assert audit is not None
    kept = audit.path, audit._file, audit._size
    audit.path, audit._file, audit._size = Path("/dev/full"), os.open("/dev/full", os.O_RDWR), 0
    try:
        unlogged = live.post(CHAT, SAY, **bearer(KEY))
        assert (unlogged.status_code, unlogged.json()["error"]["code"]) == (503, "audit_failed")
        answer = live.post(CHAT, SAY, **bearer(KEY))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "audit_failed")
        assert live.get("/healthz").status_code == 503
        assert "clampdown_audit_broken 1.0" in live.get("/metrics", **bearer(KEY)).text
    finally:
        audit.path, audit._file, audit._size = kept
    assert live.post(CHAT, SAY, **bearer(KEY)).status_code == 200
    assert live.get("/healthz").status_code == 200


def test_a_line_that_a_full_disk_cut_spoils_no_other(tmp_path: Path) -> None:
    """A limit of the file's size is as a full disk: some bytes are written, and then none."""
    log = AuditLog(tmp_path / "log")
    log.write("first", {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 10, hard))
    try:
        log.write("second", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.broken
    log.write("third", {})
    log.close()
    assert [line.fields and line.fields["event"] for line, _ in read_lines(log.path)] == ["first", None, "third"]


@pytest.mark.parametrize("happens", ["deleted or moved", "replaced", "made shorter"])
def test_a_log_that_is_taken_away_is_noticed_and_gone_on_with(tmp_path: Path, happens: str) -> None:
    """No line is written where nobody finds it; what was said at the start is said again."""
    log = AuditLog(tmp_path / "log")
    log.write("start", {"model": "m"})
    log.write("request", {"n": 1})
    if happens == "replaced":
        (tmp_path / "other").write_text('{"event": "theirs"}\n{"cut')
        (tmp_path / "other").replace(log.path)
    elif happens == "made shorter":
        os.truncate(log.path, 0)
    else:
        log.path.rename(tmp_path / "moved")
    log.write("request", {"n": 2})
    log.write("request", {"n": 3})
    log.close()
    assert log.broken is None
    found = [line.fields for line, _ in read_lines(log.path)]
    events = [fields and fields["event"] for fields in found]
    before: list[Any] = ["theirs", None] if happens == "replaced" else []
    assert events == [*before, "reopen", "start", "request", "request"]
    assert happens in str(found[len(before)]) and found[len(before) + 1]["model"] == "m"  # type: ignore[index]


def test_a_log_whose_place_is_taken_by_no_file_stops_the_answers(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log")
    log.path.unlink()
    os.mkfifo(log.path)
    log.write("request", {})
    assert log.broken
    log.path.unlink()
    log.write("retry", {})
    assert log.broken is None
    log.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_the_server_s_end_cuts_off_has_its_line(tmp_path: Path, stream: bool) -> None:
    """When the time to drain is over, tasks are cancelled wherever they are: here before the first token."""
    from rich.console import Console

    served = open_server(Options(audit=tmp_path / "log", inline=None), Stages(Console(quiet=True)))
    body = ChatRequest.model_validate({**SAY, "stream": stream})

    async def main() -> None:
        await served.engine.start()

        async def receive() -> Any:
            await asyncio.Event().wait()

        http = Request({"type": "http", "method": "POST", "path": CHAT, "headers": []}, receive)
        task = asyncio.create_task(Desk(served).answer(served.intake.chat(body), http, "alice"))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await served.engine.stop(drain_seconds=0)

    asyncio.run(main())
    last = [line.fields for line, _ in read_lines(tmp_path / "log") if line.fields][-1]
    assert (last["event"], last["status"], last["code"], last["key"]) == ("request", 503, "server_stopped", "alice")


@dataclass(frozen=True)
class Process:
    """`clampdown serve` in a process of its own."""

    child: subprocess.Popen[str]
    url: str

    @classmethod
    def start(cls, *arguments: str) -> Process:
        command = [sys.executable, "-m", "clampdown", "serve", "--port", "0", "--no-inline", "--canary-every", "never"]
        child = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("serving "):
                return cls(child, line.split()[1])
        raise AssertionError("the server ended before it served")

    def end(self, how: signal.Signals) -> None:
        self.child.send_signal(how)
        self.child.wait(PATIENCE)
        assert self.child.stdout is not None
        self.child.stdout.close()

    def ask(self, plan: str) -> Any:
        body = {**SAY, "model": f"base:{plan}"}
        return httpx2.post(f"{self.url}/chat/completions", json=body, timeout=PATIENCE).json()["steering"]["digest"]


def test_killed_and_started_again_the_log_is_whole_and_the_plans_are_there(tmp_path: Path) -> None:
    audit, plans = tmp_path / "audit.jsonl", tmp_path / "plans"
    plans.mkdir()
    plan = read_plan(PLANS_DIR / "clamp-352-gated.toml")
    (plans / "mine.toml").write_text((PLANS_DIR / "clamp-352-gated.toml").read_text())
    arguments = ("--audit", str(audit), "--plans", str(plans), "--log-prompts")
    first = Process.start(*arguments)
    digests = [first.ask("clamp-352-gated") for _ in range(3)]
    client = threading.Thread(target=_ask_until_it_dies, args=(first,))
    client.start()
    wait_until(lambda: len(list(read_lines(audit))) > 5)
    first.end(signal.SIGKILL)
    client.join()
    whole = [line.fields for line, _ in read_lines(audit)]
    assert None not in whole and [line["event"] for line in whole if line][:4] == ["start", *["request"] * 3]
    with audit.open("ab") as file:
        file.write(b'{"v": 1, "event": "requ')  # as if the kill had come in the middle of a line
    second = Process.start(*arguments)
    assert {second.ask("clamp-352-gated"), *digests} == {plan.digest}
    second.end(signal.SIGTERM)
    again = [line.fields for line, _ in read_lines(audit)]
    assert again[: len(whole)] == whole
    cut, start, request, stop = again[len(whole) :]
    assert cut is None and start and request and stop
    assert (start["event"], request["event"], stop["event"]) == ("start", "request", "stop")
    assert (request["prompt"], bool(request["reply"])) == ("Hello", True), "told to, it writes prompts"


def _ask_until_it_dies(process: Process) -> None:
    try:
        while True:
            process.ask("clamp-352-gated")
    except httpx2.HTTPError:
        return


def test_a_log_and_keys_of_the_wrong_kind_stop_the_start(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        AuditLog(tmp_path)
    for text in ("alice", "alice short", f"alice {KEY}\nalice {OTHER}", "", f"a/b {KEY}"):
        (tmp_path / "keys").write_text(text)
        with pytest.raises(ClampdownError):
            Keys.read(tmp_path / "keys")
    with pytest.raises(ClampdownError):
        Keys.read(tmp_path / "none")
    assert (tmp_path / "log").exists() is False
    AuditLog(tmp_path / "log").close()
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0, "nobody else reads it"


def test_names_of_plans_are_words_and_never_ambiguous() -> None:
    plan = read_plan(PLANS_DIR / "clamp-352.toml")
    table = PlanTable("m")
    assert table.add(plan, "Clamp 352, prompt x2!") == "clamp-352-prompt-x2"
    assert table.add(plan, "clamp 352 prompt x2") == "clamp-352-prompt-x2", "the same plan again is no conflict"
    other = read_plan(PLANS_DIR / "clamp-352-gated.toml")
    for name in ("clamp 352 prompt x2", "off", "Base", "inline"):
        with pytest.raises(PlanError):
            table.add(other, name)


def test_the_shipped_plans_are_for_the_shipped_weights() -> None:
    from clampdown.models.loading import directory_revision

    revision, sae = directory_revision(MODEL_DIR), load_sae("organism").revision
    found = [read_plan(file) for file in sorted(PLANS_DIR.glob("*.toml"))]
    assert len(found) == 3
    assert {(plan.model.revision, plan.saes[0].revision) for plan in found} == {(revision, sae)}


def test_addresses_and_paths(tmp_path: Path) -> None:
    hosts = allowed_hosts("127.0.0.1", ["Studio.example:443"])
    assert hosts == {"localhost", "studio.example"} == allowed_hosts("localhost", ["studio.example."])
    assert allowed_hosts("0.0.0.0", []) is None and allowed_hosts("0.0.0.0", ["a"]) == {"a", "0.0.0.0"}
    names = ["LOCALHOST:8000", "[::1]:80", "::1", "127.0.0.1", "a.b.:1", "evil.example:localhost"]
    assert [host_name(name) for name in names] == ["localhost", "::1", "::1", "127.0.0.1", "a.b", names[-1]]
    (tmp_path / "keys").write_text(f"a {KEY}")
    (tmp_path / "keys").chmod(0o640)
    assert "chmod 600" in str(readable_by_others(tmp_path / "keys"))
    (tmp_path / "keys").chmod(0o600)
    assert readable_by_others(tmp_path / "keys") is None
    assert [is_local(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.org")] == [1, 1, 1, 0, 0]
    assert public_name(str(tmp_path)) == tmp_path.name and public_name("organism") == "organism"
    with listen("127.0.0.1", 0) as bound:
        bound.listen()
        with pytest.raises(ClampdownError, match="cannot listen"):
            listen("127.0.0.1", bound.getsockname()[1])
