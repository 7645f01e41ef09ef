"""Who may ask, and for how much.

Keys are compared by digest in constant time, all of them at every request, so that an answer's time says nothing about
a key. A body that is too large is refused before it is read whole.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from starlette.exceptions import HTTPException

from clampdown.errors import ClampdownError, RequestError

GatedScoring = Literal["read", "context", "off"]
MIN_KEY_LENGTH = 16
ANYBODY = "anonymous"
_LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64})\s+(?P<key>[\x21-\x7e]+)")


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one request, and all together, may ask for. `raw`: whether prompts may come without the chat
    template. `gated_scoring`: what a gate reads of a text that is scored under it, token by token (`read`) or the
    context alone (`context`); or such texts are not scored (`off`)."""

    body_bytes: int = 1 << 20
    tokens: int = 1024
    choices: int = 64
    concurrent: int = 256
    default_tokens: int = 256
    raw: bool = True
    gated_scoring: GatedScoring = "read"


def scoring_mode(name: str) -> GatedScoring:
    """What an operator says of scoring under gated plans. Raises `ClampdownError` for another word."""
    modes: tuple[GatedScoring, ...] = get_args(GatedScoring)
    if name not in modes:
        raise ClampdownError(f"'{name}' is no way to score under a gate", hint=f"one of: {', '.join(modes)}")
    return name


@dataclass(frozen=True)
class Keys:
    """API keys by the name that stands for them in the audit log. None at all: anybody may ask."""

    digests: Mapping[str, bytes]

    @classmethod
    def read(cls, path: Path) -> Keys:
        """A file of lines `NAME KEY`; # begins a comment. Raises `ClampdownError` for anything else."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ClampdownError(f"cannot read the API keys of {path}: {error}") from error
        found: dict[str, bytes] = {}
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if text and not text.startswith("#"):
                name, digest = _parsed(text, f"{path}, line {number}")
                if name in found:
                    raise ClampdownError(f"{path}, line {number}: the name '{name}' is taken")
                found[name] = digest
        if not found:
            raise ClampdownError(f"{path} holds no API key", hint="a line is NAME KEY")
        return cls(found)

    def name_of(self, authorization: str | None) -> str:
        """Whose key an Authorization header holds. Raises `RequestError` (401)."""
        if not self.digests:
            return ANYBODY
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        matches = [name for name, known in self.digests.items() if hmac.compare_digest(known, digest)]
        if scheme.lower() != "bearer" or not matches:
            raise RequestError(
                "this server needs an API key that it knows: `Authorization: Bearer KEY`",
                status=401,
                code="invalid_api_key",
            )
        return matches[0]


def _parsed(text: str, where: str) -> tuple[str, bytes]:
    match = _LINE.fullmatch(text)
    if match is None:
        raise ClampdownError(f"{where}: not NAME KEY", hint="letters, digits, . _ - in the name; no blanks in the key")
    if len(match["key"]) < MIN_KEY_LENGTH:
        raise ClampdownError(
            f"{where}: the key has fewer than {MIN_KEY_LENGTH} characters",
            hint="python -c 'import secrets; print(secrets.token_urlsafe(32))'",
        )
    return match["name"], _digest(match["key"])


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class BodyLimit:
    """ASGI middleware: a body larger than `limit` bytes is refused (413), by what it says of its length or, when it
    says nothing, as soon as more has come. `refuse` makes the answer out of an error."""

    def __init__(self, app: Any, limit: int, refuse: Callable[[Exception], Any]) -> None:
        self.app, self.limit, self.refuse = app, limit, refuse

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if not stated.isdigit() or int(stated[:20]) > self.limit:
            await self.refuse(self._error())(scope, receive, send)
            return
        seen = 0

        async def counted() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limit:  # as the framework's own kind: it turns any other into "400, not parsed"
                raise HTTPException(413, self._error().message)
            return message

        await self.app(scope, counted, send)

    def _error(self) -> RequestError:
        return RequestError(
            f"the request's body is larger than {self.limit} bytes", status=413, code="request_too_large"
        )
