"""Who may ask, and for how much.

Keys are compared by digest in constant time, all of them at every request, so that an answer's time says nothing about
a key. A body that is too large, or does not come, is refused before it is read whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from clampdown.errors import ClampdownError, RequestError
from clampdown.extras import extra

with extra("serve", "the server"):
    from starlette.exceptions import HTTPException

GatedScoring = Literal["read", "context", "off"]
MIN_KEY_LENGTH = 16
ANYBODY = "anonymous"
_LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64})\s+(?P<key>[\x21-\x7e]+)")


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one request, and all together, may ask for. `raw`: whether prompts may come without the chat
    template. `gated_scoring`: what a gate reads of a text that is scored under it, token by token (`read`) or the
    context alone (`context`); or such texts are not scored (`off`). `receive_seconds`: how long a request's head may
    take, and its body. `hosts`: the names under which this server may be asked; None for any."""

    body_bytes: int = 1 << 20
    tokens: int = 1024
    choices: int = 64
    concurrent: int = 256
    default_tokens: int = 256
    raw: bool = True
    gated_scoring: GatedScoring = "read"
    connections: int = 1024
    receive_seconds: float = 20.0
    hosts: frozenset[str] | None = None


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


def readable_by_others(path: Path) -> str | None:
    """A warning about a file of keys that other users of this machine can read or write."""
    mode = path.stat().st_mode
    if not mode & 0o077:
        return None
    return f"other users of this machine can read or change {path} (mode {mode & 0o777:03o}): chmod 600 {path}"


class _Broken(HTTPException):
    """What is wrong with a body that is being read, as the framework's own kind: it turns any other into "400, not
    parsed"."""

    def __init__(self, error: RequestError) -> None:
        # Whoever has not sent all of it may go on sending for ever.
        super().__init__(error.status, error.message, {"Connection": "close"})
        self.code = error.code


class Entrance:
    """ASGI middleware, the first that a request meets: under which name it asks (421), how large its body is (413) and
    how long that takes (408). A body is refused by what it says of its length or, when it says nothing, as soon as
    more has come. `refuse` makes the answer out of an error, and keeps count of it."""

    def __init__(self, app: Any, limits: Limits, refuse: Callable[[str, str, RequestError], Any]) -> None:
        self.app, self.limits, self.refuse = app, limits, refuse

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if error := self._wrong_name(headers) or self._wrong_length(headers):
            await self.refuse(scope["method"], scope["path"], error)(scope, receive, send)
            return
        await self.app(scope, self._bounded(receive), send)

    def _wrong_name(self, headers: Mapping[bytes, bytes]) -> RequestError | None:
        """A page of another site whose name leads to this machine is no client of a server that is for this machine."""
        allowed, name = self.limits.hosts, host_name(headers.get(b"host", b"").decode("latin-1"))
        if allowed is None or not name or name in allowed or (_LOOPBACK in allowed and is_loopback(name)):
            return None
        return RequestError(
            f"this server does not answer to the name {name[:100]!r}",
            hint="the operator can allow it: --allow-host NAME",
            status=421,
            code="host_not_allowed",
        )

    def _wrong_length(self, headers: Mapping[bytes, bytes]) -> RequestError | None:
        stated = headers.get(b"content-length", b"0")
        return self._too_large() if not stated.isdigit() or int(stated[:20]) > self.limits.body_bytes else None

    def _bounded(self, receive: Any) -> Any:
        """What is received, counted until the body has ended. The time starts when somebody begins to read it."""
        seen, whole, deadline = 0, False, None

        async def counted() -> Any:
            nonlocal seen, whole, deadline
            if whole:
                return await receive()
            deadline = deadline or asyncio.get_running_loop().time() + self.limits.receive_seconds
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise _Broken(self._too_slow()) from None
            seen += len(message.get("body", b""))
            if seen > self.limits.body_bytes:
                raise _Broken(self._too_large())
            whole = not message.get("more_body", False)
            return message

        return counted

    def _too_slow(self) -> RequestError:
        seconds = self.limits.receive_seconds
        return RequestError(f"the body did not come within {seconds:g} s", status=408, code="request_too_slow")

    def _too_large(self) -> RequestError:
        return RequestError(
            f"the request's body is larger than {self.limits.body_bytes} bytes", status=413, code="request_too_large"
        )


_LOOPBACK = "localhost"


def allowed_hosts(host: str, also: Sequence[str]) -> frozenset[str] | None:
    """The names under which a server that listens on `host` may be asked: of one that is for this machine, this
    machine's; of another any, unless some are named."""
    named = frozenset(host_name(name) for name in also)
    if host == _LOOPBACK or is_loopback(host):
        return named | {_LOOPBACK}
    return named | {host_name(host)} if named else None


def host_name(header: str) -> str:
    """A Host header's name without its port: small letters, no brackets, no last dot."""
    name = header.strip().casefold()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    before, colon, port = name.rpartition(":")
    return (before if colon and port.isdigit() and ":" not in before else name).rstrip(".")


def is_loopback(name: str) -> bool:
    """Whether it is an address that only this machine reaches."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
