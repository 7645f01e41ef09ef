"""A server of the embedded model in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from clampdown.config import embedded_model

START_SECONDS = 900


@dataclass(frozen=True)
class Server:
    """Where it listens, its audit log, and its process."""

    url: str
    audit: Path
    pid: int

    def get(self, path: str) -> str:
        with urlopen(f"{self.url}{path}", timeout=30) as answer:
            return answer.read().decode()

    def post(self, path: str, body: Mapping[str, Any], timeout: float = 900) -> tuple[int, Any]:
        """Status and parsed answer."""
        request = Request(f"{self.url}{path}", json.dumps(body).encode(), {"content-type": "application/json"})
        try:
            with urlopen(request, timeout=timeout) as answer:
                return answer.status, json.load(answer)
        except HTTPError as error:
            return error.code, json.load(error)

    def stream(self, path: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The events of a streamed answer."""
        data = json.dumps({**body, "stream": True}).encode()
        with urlopen(Request(f"{self.url}{path}", data, {"content-type": "application/json"}), timeout=900) as answer:
            lines = [line.decode().removeprefix("data: ").strip() for line in answer if line.startswith(b"data: ")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


def plugged(plans: Path, directory: Path) -> list[str]:
    """`clampdown-vllm serve`, which puts the plugin in place itself."""
    audit = ["--audit", str(directory / "audit.jsonl")]
    return [sys.executable, "-m", "clampdown_vllm.cli", "serve", "organism", "--plans", str(plans), *audit]


def plain(plans: Path, _: Path) -> list[str]:
    """`vllm serve`, which leaves that to vLLM."""
    model = [str(embedded_model("organism")), "--served-model-name", "organism"]
    config = json.dumps({"clampdown": {"plans": str(plans)}})
    return [str(Path(sys.executable).with_name("vllm")), "serve", *model, "--additional-config", config]


@contextmanager
def serving(
    plans: Path,
    directory: Path,
    *options: str,
    command: Callable[[Path, Path], list[str]] = plugged,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A server of the embedded model, until the block ends; nothing of it is left then."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    log = directory / "server.log"
    where = ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512"]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command(plans, directory), *where, "--block-size", "32", *options],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        yield Server(_until_up(process, port, log), directory / "audit.jsonl", process.pid)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with suppress(ProcessLookupError):  # the engine is a process of its own
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _until_up(process: subprocess.Popen[bytes], port: int, log: Path) -> str:
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urlopen(f"{url}/v1/models", timeout=5).read()
            return url
        except (URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")
