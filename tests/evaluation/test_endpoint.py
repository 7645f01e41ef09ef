"""The endpoint client against a server that fails in every way an endpoint can."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import tracemalloc
import zlib

import pytest

from clampdown.errors import EndpointDownError, EndpointError
from clampdown.evaluation.judges.endpoint import ChatClient, Endpoint
from clampdown.evaluation.judges.llm import parse_llm
from clampdown.types import Message
from tests.evaluation.chat_server import ChatServer, Fault, chat_server

ASK = [Message("user", "hello")]


def client(server: ChatServer, **settings: object) -> ChatClient:
    given = {"timeout": 60.0, "retries": 3, "backoff": 0.01, "longest_wait": 0.3, **settings}
    return ChatClient(Endpoint(server.url, "judge-model", **given))  # type: ignore[arg-type]


TRANSIENT = {
    "rate limit": Fault(429, '{"error": {"message": "slow down"}}', (("Retry-After", "0.05"),)),
    "rate limit with a date": Fault(429, "", (("Retry-After", "Wed, 21 Oct 2015 07:28:00 GMT"),)),
    "rate limit with nonsense": Fault(429, "", (("Retry-After", "soon"),)),
    "server error": Fault(500, "boom"),
    "overloaded": Fault(503, "<html>busy</html>"),
    "not JSON": Fault(200, "garbage"),
    "other JSON": Fault(200, '{"choices": []}'),
    "no text": Fault(200, '{"choices": [{"message": {"content": null}}]}'),
    "a list": Fault(200, "[1]"),
    "cut connection": Fault(body=None),
}


@pytest.mark.parametrize("name", TRANSIENT)
def test_what_passes_is_retried(name: str) -> None:
    with chat_server(lambda body: "hi", [TRANSIENT[name]] * 2) as server, client(server) as chat:
        assert chat.complete(ASK) == "hi"
        assert len(server.requests) == 3


def test_what_is_not_answered_in_time_is_asked_again() -> None:
    """As often as it takes: on a busy machine an answer may come late that was not meant to."""
    silent = [Fault(silent=True)] * 2
    with chat_server(lambda body: "hi", silent) as server, client(server, timeout=0.2, retries=20) as chat:
        assert chat.complete(ASK) == "hi"
        assert len(server.requests) >= 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_stays_is_an_error_at_once_with_the_servers_words(status: int) -> None:
    fault = Fault(status, '{"error": {"message": "no such model"}}')
    with chat_server(lambda body: "hi", [fault]) as server, client(server) as chat:
        with pytest.raises(EndpointError, match=rf"HTTP {status}: no such model") as caught:
            chat.complete(ASK)
        assert not isinstance(caught.value, EndpointDownError)
        assert len(server.requests) == 1


def test_after_the_last_retry_it_is_down() -> None:
    with chat_server(lambda body: Fault(503, "busy")) as server, client(server) as chat:
        with pytest.raises(EndpointDownError, match=r"in 4 attempts: HTTP 503: busy"):
            chat.complete(ASK)
        assert len(server.requests) == 4


def test_nobody_listening_is_down() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with ChatClient(Endpoint(url, "m", retries=1, backoff=0.01)) as chat, pytest.raises(EndpointDownError):
        chat.complete(ASK)


def test_a_servers_wish_to_wait_is_kept() -> None:
    fault = Fault(429, "", (("Retry-After", "0.2"),))
    with chat_server(lambda body: "hi", [fault]) as server, client(server) as chat:
        chat.complete(ASK)
        assert server.times[1] - server.times[0] >= 0.2


def test_the_request_is_the_apis(monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server(lambda body: "hi") as server, client(server) as chat:
        chat.complete([Message("system", "s"), *ASK], max_tokens=7)
    assert server.requests == [
        {
            "model": "judge-model",
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}],
            "max_tokens": 7,
            "temperature": 0.0,
            "seed": 0,
        }
    ]


@pytest.mark.parametrize(("url", "model"), [("api.example.com", "m"), ("http://x/v1", "")])
def test_an_endpoint_needs_an_address_and_a_model(url: str, model: str) -> None:
    with pytest.raises(EndpointError):
        Endpoint(url, model)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@127.0.0.1:1/v1",
        "https://secret@host/v1",
        "http://host/v1?key=secret",
        "http://host/v1#secret",
        "http:///user:secret@host/v1",
        "http://user:secret@[::1/v1",
        "ftp://user:secret@host/v1",
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(EndpointError) as refused:
        Endpoint(url, "m")
    assert "secret" not in str(refused.value)
    with pytest.raises(EndpointError) as refused:
        parse_llm(f"strongreject:m@{url}" if url.startswith("http") else f"strongreject:m@http://x@{url}")
    assert "secret" not in str(refused.value)
    with pytest.raises(EndpointError) as refused:
        Endpoint("http://host/v1", f"m@{url}")
    assert "secret" not in str(refused.value)


BOMB = gzip.compress(b" " * 50_000_000)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("sent", "drips", "problem"),
    [
        (HEAD + b"Content-Length: 99\r\n\r\n", True, "no whole answer within"),
        (b"HTTP/1.1 200 OK\r\nX-Long: ", True, "no whole answer within"),
        (HEAD + b"Connection: close\r\n\r\n" + b" " * 70_000, False, "more than 65536 bytes"),
        (
            HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB) + BOMB,
            False,
            "more than 65536 bytes",
        ),
        (HEAD + b"Content-Encoding: br\r\nContent-Length: 1\r\n\r\nx", False, "was not asked for"),
        (HEAD + b"Content-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx", False, "incorrect|not a chat"),
        (HEAD + b"Content-Length: 8000\r\n\r\n" + b"[" * 8000, False, "not a chat completion"),
    ],
)
def test_an_answer_that_drips_or_swells_did_not_come(sent: bytes, drips: bool, problem: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        over = threading.Event()

        def answer() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(sent)
                while drips and not over.wait(0.02):
                    connection.sendall(b"x")

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        tracemalloc.start()
        try:
            endpoint = Endpoint(url, "m", retries=0, deadline=0.5 if drips else 60.0, max_bytes=65536)
            with ChatClient(endpoint) as chat, pytest.raises(EndpointDownError, match=problem):
                chat.complete(ASK)
            assert tracemalloc.get_traced_memory()[1] < 5_000_000
        finally:
            tracemalloc.stop()
            over.set()
            thread.join()


def test_an_answer_that_is_packed_unasked_is_read() -> None:
    said = json.dumps({"choices": [{"message": {"content": "hi"}}]}).encode()
    for packed, name in ((gzip.compress(said), b"gzip"), (zlib.compress(said), b"deflate")):
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def answer(packed: bytes = packed, name: bytes = name, listening: socket.socket = listening) -> None:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    length = b"Content-Length: %d\r\n\r\n" % len(packed)
                    connection.sendall(HEAD + b"Content-Encoding: " + name + b"\r\n" + length + packed)

            thread = threading.Thread(target=answer)
            thread.start()
            with ChatClient(Endpoint(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", "m", retries=0)) as chat:
                assert chat.complete(ASK) == "hi"
            thread.join()
