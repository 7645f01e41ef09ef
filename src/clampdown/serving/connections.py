"""Connections: how many may be open, and how long one may take to say what it wants.

uvicorn closes a connection that is idle between requests, and no other. Here a connection that is silent, or sends half
a request's head, has a time-out as well, and when as many are open as may be, the one that has waited longest without
asking anything makes room for the next: whoever opens hundreds and says nothing keeps nobody out.

The number lies below what the process may have of open files: an event loop that cannot accept logs that for every
place in its backlog, and stops accepting for a second.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import time
from collections.abc import Callable
from typing import Any

from clampdown.extras import extra
from clampdown.serving.limits import Limits

with extra("serve", "the server"):
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)

_BACKLOG = 8  # connections that the loop accepts in one turn of it
_TURNS = 6  # of the loop, from a connection's being accepted to its being closed again
_WAITING = 1024  # connections that the system holds until they are accepted
_OTHER_FILES = 32  # logs, and what the model's libraries open
_FEWEST = 8
_SELDOM = 10.0  # seconds between two lines that say the same
_FLOODS = (
    "socket.accept() out of system resource",
    "Exception in callback BaseSelectorEventLoop._start_serving",  # what comes of the former
    "Invalid HTTP request received.",
)


def most_connections(asked: int) -> int:
    """As many as were asked for, or as the process has files for."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return asked
    return max(_FEWEST, min(asked, files - _open_files() - _TURNS * _BACKLOG - _OTHER_FILES))


def _open_files() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:  # another system: a server has about this many
        return 64


class Doorkeeper:
    """The open connections of one server, and since when each has asked for nothing (None: it is being answered)."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._since: dict[Guarded, float | None] = {}
        self._said = -_SELDOM

    def __len__(self) -> int:
        return len(self._since)

    def admit(self, connection: Guarded) -> None:
        """Another one. When there are too many, one that asks for nothing goes; it itself if all others are busy."""
        if len(self._since) >= self.most:
            self._close_one(connection)
        self.waits(connection)

    def waits(self, connection: Guarded) -> None:
        if not connection.closed:
            self._since[connection] = time.monotonic()

    def busy(self, connection: Guarded) -> None:
        if connection in self._since:
            self._since[connection] = None

    def leave(self, connection: Guarded) -> None:
        self._since.pop(connection, None)

    def _close_one(self, new: Guarded) -> None:
        waiting = [(since, i, one) for i, (one, since) in enumerate(self._since.items()) if since is not None]
        victim = min(waiting)[2] if waiting else new
        self.leave(victim)
        victim.close()
        if time.monotonic() - self._said > _SELDOM:
            self._said = time.monotonic()
            log.warning("%d connections are open, and no more are kept: one that asked nothing was closed", self.most)


class Guarded(H11Protocol):
    """uvicorn's connection, with a time-out for a request's head. Made by `protocol`."""

    keeper: Doorkeeper
    seconds: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.closed = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.keeper.admit(self)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._stop_clock()
        self.keeper.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._answering and self._timer is None:
            self._start_clock()
        super().data_received(data)
        if self._answering:
            self._stop_clock()
            self.keeper.busy(self)

    def on_response_complete(self) -> None:
        self.keeper.waits(self)
        super().on_response_complete()
        if self._answering:  # the next request had come already
            self.keeper.busy(self)

    def close(self) -> None:
        """At once, whatever is on its way."""
        self.closed = True
        self._stop_clock()
        self.transport.abort()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_clock(self) -> None:
        if not self.closed:
            self._timer = self.loop.call_later(self.seconds, self.close)

    def _stop_clock(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def protocol(limits: Limits) -> type[Guarded]:
    """The kind of connection that one server has."""
    keeper = Doorkeeper(most_connections(limits.connections))
    return type("GuardedConnection", (Guarded,), {"keeper": keeper, "seconds": limits.receive_seconds})


class Server(uvicorn.Server):
    """A server of guarded connections that says when it is `ready`."""

    def __init__(self, app: Any, limits: Limits, ready: Callable[[], None] = lambda: None, **options: Any) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol(limits),
                backlog=_BACKLOG,
                access_log=False,
                server_header=False,
                **{"log_level": "warning", **options},
            )
        )
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        for name in ("asyncio", "uvicorn.error"):
            logging.getLogger(name).addFilter(seldom)
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(_WAITING)  # the loop accepts few at a time, the system holds more
        if self.started:
            self._ready()


class Seldom(logging.Filter):
    """Lets through what anybody who connects can have logged, but not more often than every ten seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        flood = next((words for words in _FLOODS if str(record.msg).startswith(words)), None)
        if flood is None:
            return True
        moment = time.monotonic()
        if moment - self._said.get(flood, -_SELDOM) < _SELDOM:
            return False
        self._said[flood] = moment
        return True


seldom = Seldom()
