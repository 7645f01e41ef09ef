"""A real HTTP server that speaks the OpenAI chat API on a free port, and misbehaves as told. Not a mock: sockets."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PATIENCE = 240  # seconds

Answer = Callable[[dict[str, Any]], "str | Fault"]
"""What the model says to a request's body, or how the server fails."""


@dataclass(frozen=True)
class Fault:
    """A reply that is not a chat completion. `body` None: the connection is cut. `silent`: nothing comes until the
    server ends."""

    status: int = 200
    body: str | None = ""
    headers: tuple[tuple[str, str], ...] = ()
    silent: bool = False


@dataclass
class ChatServer:
    """The server's address, the requests that it got, and how many it was answering at once at most."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0


@contextmanager
def chat_server(answer: Answer, faults: Sequence[Fault] = (), together: int = 1) -> Iterator[ChatServer]:
    """Serve `answer`; the first requests get the faults instead. The first `together` are answered when all of them are
    there."""
    lock, pending, live = threading.Lock(), list(faults), [0]
    company, over = threading.Barrier(together), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.requests.append(body)
                server.times.append(time.monotonic())
                live[0] += 1
                server.most_at_once = max(server.most_at_once, live[0])
                said, early = pending.pop(0) if pending else None, len(server.requests) <= together
            if early:
                company.wait(_PATIENCE)
            self._send(said if said is not None else answer(body))
            with lock:
                live[0] -= 1

        def _send(self, said: str | Fault) -> None:
            if isinstance(said, str):
                said = Fault(body=json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}))
            if said.silent:
                over.wait(_PATIENCE)
            if said.body is None or said.silent:
                self.close_connection = True
                return
            payload = said.body.encode()
            self.send_response(said.status)
            for name, value in (*said.headers, ("Content-Length", str(len(payload)))):
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client had stopped waiting
                self.wfile.write(payload)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = ChatServer(f"http://127.0.0.1:{http.server_address[1]}/v1")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        over.set()
        http.shutdown()
        thread.join()
        http.server_close()
