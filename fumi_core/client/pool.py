"""Idle connections, kept for their next transaction: most mail comes in bursts, and a new greeting costs three round trips."""

from __future__ import annotations

import asyncio
from typing import Generic, Protocol, TypeVar

MAX_IDLE = 16
"""Connections kept at most."""
IDLE_SECONDS = 30.0
"""Seconds for which one is kept: less than servers allow (RFC 5321 §4.5.3.2.7), so that we close it and not the server."""


class Reusable(Protocol):
    """A connection; ``usable``: it is open, as far as is known."""

    @property
    def usable(self) -> bool: ...

    def quit(self) -> None: ...


C = TypeVar("C", bound=Reusable)


class Pool(Generic[C]):
    """The idle connections to one server; the one used last is taken first, so that surplus connections stay idle and expire."""

    def __init__(self) -> None:
        self._idle: dict[C, asyncio.TimerHandle] = {}

    def take(self) -> C | None:
        """Return a connection that is open, as far as is known; None when there is none."""
        while self._idle:
            connection, timer = self._idle.popitem()
            timer.cancel()
            if connection.usable:
                return connection
        return None

    def put(self, connection: C) -> None:
        """Keep it, unless it is closed or the pool is full."""
        if connection.usable and len(self._idle) < MAX_IDLE:
            timer = asyncio.get_running_loop().call_later(IDLE_SECONDS, self._expire, connection)
            self._idle[connection] = timer
        else:
            connection.quit()

    def close(self) -> None:
        while (connection := self.take()) is not None:
            connection.quit()

    def _expire(self, connection: C) -> None:
        del self._idle[connection]
        connection.quit()
