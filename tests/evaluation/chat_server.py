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

Answer = Callable[[dict[str, Any]], "str | Fault"]
"""What the model says to a request's body, or how the server fails."""


@dataclass(frozen=True)
class Fault:
    """A reply that is not a chat completion. `body` None: the connection is cut after `delay` seconds."""

    status: int = 200
    body: str | None = ""
    headers: tuple[tuple[str, str], ...] = ()
    delay: float = 0.0


@dataclass
class ChatServer:
    """The server's address, the requests that it got, and how many it was answering at once at most."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_once: int = 0


@contextmanager
def chat_server(answer: Answer, faults: Sequence[Fault] = (), hold: float = 0.0) -> Iterator[ChatServer]:
    """Serve `answer`; the first requests get the faults instead. Every answer takes `hold` seconds."""
    lock, pending, live = threading.Lock(), list(faults), [0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.requests.append(body)
                server.times.append(time.monotonic())
                live[0] += 1
                server.most_at_once = max(server.most_at_once, live[0])
                said = pending.pop(0) if pending else None
            time.sleep(hold)
            self._send(said if said is not None else answer(body))
            with lock:
                live[0] -= 1

        def _send(self, said: str | Fault) -> None:
            if isinstance(said, str):
                said = Fault(body=json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}))
            time.sleep(said.delay)
            if said.body is None:
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
        http.shutdown()
        thread.join()
        http.server_close()
