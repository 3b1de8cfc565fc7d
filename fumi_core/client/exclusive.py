"""A connection to a server that one task uses at a time: opening it, waiting for the server, and the failure that ends it."""

from __future__ import annotations

import asyncio
import os
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

from fumi_core.runtime.addresses import SocketAddress
from fumi_core.runtime.dead_peers import CHECK_SECONDS, check_window, detect_dead_peer

NEXT_ADDRESS_SECONDS = 0.25
"""Until the next address of a host name is also tried (RFC 8305 §5)."""

P = TypeVar("P", bound=asyncio.Protocol)
F = TypeVar("F", bound=Exception)


async def open_connection(make: Callable[[], P], address: SocketAddress, seconds: float) -> P:
    """Connect to a TCP or Unix address, within this time. Raises OSError, of which TimeoutError is one.

    If the caller is cancelled, the attempt continues and its connection is closed. asyncio, if it is cancelled at the moment of
    connecting, leaves the socket open until the garbage collector finds it.
    """
    opening = asyncio.create_task(_open(make, address, seconds))
    try:
        return (await asyncio.shield(opening))[1]
    except asyncio.CancelledError:
        opening.add_done_callback(_abort)
        raise


async def _open(make: Callable[[], P], address: SocketAddress, seconds: float) -> tuple[asyncio.BaseTransport, P]:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(seconds):
        if address.kind == "unix":
            return await loop.create_unix_connection(make, address.path)
        host, port = address.host, address.port
        return await loop.create_connection(make, host, port, happy_eyeballs_delay=NEXT_ADDRESS_SECONDS)


def connect_error(error: OSError) -> str:
    """The system's text for this error; asyncio's own is "Connect call failed", with the address."""
    number = error.errno or 0  # the resolver's numbers are negative
    return os.strerror(number) if number > 0 else error.strerror or str(error)


def _abort(opening: asyncio.Task[tuple[asyncio.BaseTransport, P]]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        cast(asyncio.Transport, opening.result()[0]).abort()


class ExclusiveConnection(asyncio.Protocol, Generic[F]):
    """The first failure closes the connection, and every later call raises it.

    A wait that times out or is cancelled is a failure: the server's next reply would be taken for the reply to the next request.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._failure: F | None = None
        self._blocked = False
        self._waiter: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport
        self._window_check: asyncio.TimerHandle

    @abstractmethod
    def _lost(self, detail: str) -> F:
        """The failure of a connection that has ended; ``detail`` is the reason."""

    @abstractmethod
    def _timed_out(self) -> F:
        """The failure of a wait that took too long."""

    # Calls by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        detect_dead_peer(transport.get_extra_info("socket"))
        self._window_check = self._loop.call_later(CHECK_SECONDS, self._check_window)

    def connection_lost(self, exc: Exception | None) -> None:
        self._window_check.cancel()
        self._fail(self._lost(f"connection lost: {exc}" if exc else "connection closed"))

    def pause_writing(self) -> None:
        self._blocked = True

    def resume_writing(self) -> None:
        self._blocked = False
        self._wake()

    def _check_window(self) -> None:
        check_window(self._transport.get_extra_info("socket"))
        self._window_check = self._loop.call_later(CHECK_SECONDS, self._check_window)

    # Waiting, and the end

    @property
    def usable(self) -> bool:
        return self._failure is None

    def abort(self) -> None:
        """Abort the connection: what is in progress must not be completed."""
        self._fail(self._lost("connection aborted"))

    def _close(self, last_bytes: bytes) -> None:
        """Send this and close, unless the connection has failed."""
        if self.usable:
            self._transport.write(last_bytes)
            self._failure = self._lost("connection closed")
            self._transport.close()

    def _fail(self, failure: F) -> None:
        if self._failure is None:
            self._failure = failure
            self._transport.abort()
            self._wake()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure.with_traceback(None)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait_for_room(self, seconds: float) -> None:
        """Return when most of what was sent has been passed to the kernel. Raises F."""
        if self._blocked:
            await self._wait_until(lambda: not self._blocked, seconds)

    async def _wait_until(self, ready: Callable[[], Any], seconds: float) -> None:
        """Raises F."""
        try:
            async with asyncio.timeout(seconds):
                while not ready():
                    self._raise_failure()
                    self._waiter = self._loop.create_future()
                    await self._waiter
        except TimeoutError:
            self._fail(self._timed_out())
            self._raise_failure()
        except asyncio.CancelledError:
            self.abort()
            raise
