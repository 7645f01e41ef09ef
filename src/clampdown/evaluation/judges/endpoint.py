"""A client of any OpenAI-compatible chat endpoint that gives up late and says exactly how.

1. A request is retried when waiting may help: no connection, a timeout, 408, 409, 429, any 5xx, an answer that is not
   the API's JSON. Waits double, and a `Retry-After` header overrules them; while one thread is told to wait, all wait.
2. What waiting cannot mend (401, 404, 400, ...) is an `EndpointError` at once, with the server's own words.
3. After the last retry it is an `EndpointDownError`: the caller keeps its work and comes back later.
4. An answer has a deadline, whole, and a size, unpacked: one that drips or swells is one that did not come.
5. Addresses hold no credentials. What names a judge is written into manifests, records and reports.

Used by the judges, and by anything else that talks to a model over HTTP (a Crescendo attacker, say).
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx2

from clampdown.errors import EndpointDownError, EndpointError
from clampdown.types import Message

_RETRIED = frozenset({408, 409, 425, 429})
_SECRETIVE = frozenset("@?#")  # an address with one of these may hold a key


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model answers. `url` ends in /v1; the key is read from the environment variable `key_variable`.

    `timeout` is how long the endpoint may be silent, `deadline` how long a whole answer may take, and `max_bytes` how
    large it may be. `backoff` is the first wait in seconds, `longest_wait` the most that one wait may be, also when a
    server asks.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 5
    backoff: float = 1.0
    longest_wait: float = 60.0
    concurrency: int = 8
    deadline: float = 300.0
    max_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        self._check_address()
        if "://" in self.model:
            raise EndpointError("the model's name holds an address", hint="MODEL@URL, and nothing of the URL twice")
        if not self.model:
            raise EndpointError(f"no model named for {self.url}", hint="MODEL@URL; there is no default model")

    def _check_address(self) -> None:
        """An address and nothing else: what is wrong is not repeated, because it may be a password."""
        try:
            parts = urlsplit(self.url)
            named = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            parts, named = None, False
        if parts is None or not named:
            said = "the address of the endpoint" if _SECRETIVE & set(self.url) else f"'{self.url}'"
            raise EndpointError(f"{said} is not an endpoint", hint="such as https://api.example.com/v1")
        if "@" in self.url or parts.query or parts.fragment:
            raise EndpointError(
                f"the address of {parts.hostname} holds more than an address, and it is written into files",
                hint=f"put the key into the environment variable {self.key_variable}; no user, no query, no fragment",
            )


class ChatClient:
    """Asks an endpoint, from any number of threads. A context manager: it holds connections open."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        key = os.environ.get(endpoint.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        headers["Accept-Encoding"] = "identity"
        self._exchanges = _Exchanges(endpoint, headers)
        self._lock = threading.Lock()
        self._not_before = 0.0

    def complete(
        self, messages: Sequence[Message], *, max_tokens: int = 256, temperature: float = 0.0, seed: int | None = 0
    ) -> str:
        """The text of one reply. Raises `EndpointDownError` after the last retry, `EndpointError` for a refusal."""
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "max_tokens": max_tokens,
            "temperature": temperature,
        }
        if seed is not None:
            body["seed"] = seed
        problem, wait = "", self.endpoint.backoff
        for attempt in range(self.endpoint.retries + 1):
            self._pause()
            found = self._ask(body)
            if found.text is not None:
                return found.text
            problem = found.problem
            if attempt < self.endpoint.retries:
                self._hold(wait if found.retry_after is None else found.retry_after)
                wait *= 2
        raise EndpointDownError(
            f"{self.endpoint.url} gave no answer in {self.endpoint.retries + 1} attempts: {problem}",
            hint="what was finished is kept: repeat the command when the endpoint is back",
        )

    def _ask(self, body: dict[str, Any]) -> _Attempt:
        try:
            answer = self._exchanges.post(body)
        except TimeoutError:
            return _Attempt(None, f"no whole answer within {self.endpoint.deadline:g} s")
        except (httpx2.TransportError, httpx2.DecodingError, _TooLargeError, zlib.error) as error:
            return _Attempt(None, f"{type(error).__name__}: {error}".rstrip(": "))
        if answer.status in _RETRIED or answer.status >= 500:
            return _Attempt(None, f"HTTP {answer.status}: {_words(answer)}", _retry_after(answer.headers))
        if answer.status != 200:
            raise EndpointError(
                f"{self.endpoint.url} refused the request: HTTP {answer.status}: {_words(answer)}",
                hint=f"check the model '{self.endpoint.model}', the URL and the key in ${self.endpoint.key_variable}",
            )
        text = _content(answer)
        return _Attempt(text, "" if text is not None else f"not a chat completion: {answer.text[:80]!r}")

    def _hold(self, seconds: float) -> None:
        """Nobody asks before then: a rate limit counts for all threads."""
        until = time.monotonic() + min(max(seconds, 0.0), self.endpoint.longest_wait)
        with self._lock:
            self._not_before = max(self._not_before, until)

    def _pause(self) -> None:
        with self._lock:
            wait = self._not_before - time.monotonic()
        if wait > 0:
            time.sleep(wait)

    def close(self) -> None:
        self._exchanges.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _TooLargeError(Exception):
    """An answer that is larger than an answer may be."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """What an endpoint sent, whole."""

    status: int
    headers: httpx2.Headers
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode("utf-8", "replace")


class _Exchanges:
    """Requests and their answers on a loop of their own, where a deadline holds for all that happens between the two:
    a client that waits in a thread can only time each read, and an endpoint that sends a byte at a time never ends."""

    def __init__(self, endpoint: Endpoint, headers: dict[str, str]) -> None:
        self._endpoint = endpoint
        self._http = httpx2.AsyncClient(timeout=endpoint.timeout, headers=headers)
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="clampdown-endpoint", daemon=True)
        thread.start()
        self._loop = loop
        self.close = weakref.finalize(self, _stop, loop, thread, self._http)

    def post(self, body: Any) -> _Answer:
        """Raises `TimeoutError`, `_TooLargeError`, `zlib.error` and httpx2's own."""
        future = asyncio.run_coroutine_threadsafe(self._post(body), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _post(self, body: Any) -> _Answer:
        url = f"{self._endpoint.url.rstrip('/')}/chat/completions"
        async with asyncio.timeout(self._endpoint.deadline), self._http.stream("POST", url, json=body) as response:
            unpack = _unpacking(response.headers.get("content-encoding", "identity"), self._endpoint.max_bytes)
            found = bytearray()
            async for raw in response.aiter_raw():
                found += unpack(raw)
                if len(found) > self._endpoint.max_bytes:
                    raise _TooLargeError(f"the answer has more than {self._endpoint.max_bytes} bytes")
            return _Answer(response.status_code, response.headers, bytes(found))


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, http: httpx2.AsyncClient) -> None:
    """Close the connections and end the loop's thread. Once, also for a client that nobody closed."""
    if threading.current_thread() is thread:
        return  # the last reference went away here, with the program
    asyncio.run_coroutine_threadsafe(http.aclose(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def _unpacking(encoding: str, most: int) -> Callable[[bytes], bytes]:
    """How an answer's bytes become its text. None was asked to be packed; what is, is unpacked no further than one byte
    beyond the limit."""
    kind = encoding.strip().lower()
    if kind in ("", "identity"):
        return lambda raw: raw
    if kind not in ("gzip", "x-gzip", "deflate"):
        raise httpx2.DecodingError(f"the answer is packed as {kind[:40]!r}, which was not asked for")
    inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)
    return lambda raw: inflate.decompress(raw, most + 1)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A reply, or what went wrong in a way that waiting may mend. `retry_after`: seconds that the server asked for."""

    text: str | None
    problem: str = ""
    retry_after: float | None = None


def _content(answer: _Answer) -> str | None:
    """The first choice's text; None for whatever is not a chat completion."""
    try:
        content = json.loads(answer.body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None
    return content if isinstance(content, str) else None


def _words(answer: _Answer) -> str:
    """The server's explanation, shortened."""
    try:
        found = json.loads(answer.body)
        error = found.get("error", found)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:200]
    except (ValueError, AttributeError, RecursionError):
        return answer.text[:200].strip() or "no explanation"


def _retry_after(headers: httpx2.Headers) -> float | None:
    """Seconds from a Retry-After header, which is a number of seconds or a date."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        return float(value)
    except ValueError:
        date = email.utils.parsedate_to_datetime(value) if _is_date(value) else None
        return None if date is None else max(0.0, date.timestamp() - time.time())


def _is_date(value: str) -> bool:
    return email.utils.parsedate_tz(value) is not None
