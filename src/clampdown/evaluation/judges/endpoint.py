"""A client of any OpenAI-compatible chat endpoint that gives up late and says exactly how.

1. A request is retried when waiting may help: no connection, a timeout, 408, 409, 429, any 5xx, an answer that is not
   the API's JSON. Waits double, and a `Retry-After` header overrules them; while one thread is told to wait, all wait.
2. What waiting cannot mend (401, 404, 400, ...) is an `EndpointError` at once, with the server's own words.
3. After the last retry it is an `EndpointDownError`: the caller keeps its work and comes back later.

Used by the judges, and by anything else that talks to a model over HTTP (a Crescendo attacker, say).
"""

from __future__ import annotations

import email.utils
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx2

from clampdown.errors import EndpointDownError, EndpointError
from clampdown.types import Message

_RETRIED = frozenset({408, 409, 425, 429})


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model answers. `url` ends in /v1; the key is read from the environment variable `key_variable`.

    `backoff` is the first wait in seconds, `longest_wait` the most that one wait may be, also when a server asks.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 5
    backoff: float = 1.0
    longest_wait: float = 60.0
    concurrency: int = 8

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise EndpointError(f"'{self.url}' is not an endpoint", hint="such as https://api.example.com/v1")
        if not self.model:
            raise EndpointError(f"no model named for {self.url}", hint="MODEL@URL; there is no default model")


class ChatClient:
    """Asks an endpoint, from any number of threads. A context manager: it holds connections open."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        key = os.environ.get(endpoint.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx2.Client(timeout=endpoint.timeout, headers=headers)
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
            response = self._http.post(f"{self.endpoint.url.rstrip('/')}/chat/completions", json=body)
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            return _Attempt(None, f"{type(error).__name__}: {error}".rstrip(": "))
        status = response.status_code
        if status in _RETRIED or status >= 500:
            return _Attempt(None, f"HTTP {status}: {_words(response)}", _retry_after(response.headers))
        if status != 200:
            raise EndpointError(
                f"{self.endpoint.url} refused the request: HTTP {status}: {_words(response)}",
                hint=f"check the model '{self.endpoint.model}', the URL and the key in ${self.endpoint.key_variable}",
            )
        text = _content(response)
        return _Attempt(text, "" if text is not None else f"not a chat completion: {response.text[:80]!r}")

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
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Attempt:
    """A reply, or what went wrong in a way that waiting may mend. `retry_after`: seconds that the server asked for."""

    text: str | None
    problem: str = ""
    retry_after: float | None = None


def _content(response: httpx2.Response) -> str | None:
    """The first choice's text; None for whatever is not a chat completion."""
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return content if isinstance(content, str) else None


def _words(response: httpx2.Response) -> str:
    """The server's explanation, shortened."""
    try:
        found = response.json()
        error = found.get("error", found)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:200]
    except (ValueError, AttributeError):
        return response.text[:200].strip() or "no explanation"


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
