"""A real server on a real port, in a thread, with the embedded model and the real engine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console

from clampdown.commands.serve import Options, listen, open_server
from clampdown.serving.app import create_app
from clampdown.serving.audit import read_lines
from clampdown.serving.connections import Server
from clampdown.serving.desk import Served
from clampdown.study.progress import Stages

PATIENCE = 240  # seconds, for what must come


@dataclass(frozen=True)
class Live:
    """A server that answers at `url`."""

    served: Served
    url: str
    audit: Path

    def post(self, path: str, body: Any, **more: Any) -> httpx2.Response:
        """`body` as JSON, half surrogate pairs and all."""
        sent = {"content": json.dumps(body), "headers": {"content-type": "application/json"}} | more
        return httpx2.post(f"{self.url}{path}", timeout=PATIENCE, **sent)

    def get(self, path: str, **more: Any) -> httpx2.Response:
        return httpx2.get(f"{self.url}{path}", timeout=PATIENCE, **more)

    def chat(self, text: str, model: str = "organism", **more: Any) -> Any:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **more}
        answer = self.post("/v1/chat/completions", body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def events(self, path: str, body: Any) -> list[Any]:
        """The chunks of a stream, which must end with [DONE]."""
        with httpx2.stream("POST", f"{self.url}{path}", json={**body, "stream": True}, timeout=PATIENCE) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream"), answer.read()
            data = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        assert data[-1] == "[DONE]"
        return [json.loads(line) for line in data[:-1]]

    def lines(self) -> list[dict[str, Any]]:
        """The audit log so far."""
        return [line.fields for line, _ in read_lines(self.audit) if line.fields is not None]


@contextmanager
def running(tmp: Path, options: Options | None = None, *, endless: bool = False, **served_with: Any) -> Iterator[Live]:
    """Serve until the block ends. `endless`: replies are as long as they may be."""
    audit = tmp / "audit.jsonl"
    served = open_server(replace(options or Options(), audit=audit), Stages(Console(quiet=True)))
    if endless:
        _never_ending(served)
    bound = listen("127.0.0.1", 0)
    app = create_app(replace(served, **served_with), drain_seconds=5)
    server = Server(app, served.limits, log_level="critical")
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    try:
        httpx2.get(f"{url}/healthz", timeout=PATIENCE)  # the socket listens as soon as the server has started
        yield Live(served, url, audit)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


def _never_ending(served: Served) -> None:
    """No token ends a reply, and there is room for minutes of it: what must still be running later on is running."""
    engine: Any = served.engine
    vars(served.lm)["eos_ids"] = frozenset()
    served.lm.model.config.max_position_embeddings = engine._context = 1_000_000
