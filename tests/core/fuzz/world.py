"""A whole server in a world of its own, whose clock stands until there is nothing left to do, then jumps to the next timer.

So a client that falls silent for an hour takes no time, and what comes of it is the same each time. No threads: the clock would
not wait for them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import selectors
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from fumi_core import Fumi
from fumi_core.runtime.scoreboard import count_of_one_process
from fumi_core.server import connection as server
from fumi_core.server import dialogue, message
from fumi_core.server.listeners import Server

CLIENT, OWN = ("192.0.2.1", 1), ("198.51.100.2", 25)
LITTLE = 2304
"""Octets of replies that a socket holds for a client that does not read, or little more."""


class Loop(asyncio.SelectorEventLoop):
    """``run(seconds)`` lets so much time go by. ``problems`` is what nobody caught."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.problems: list[dict[str, Any]] = []
        self._horizon = 0.0
        super().__init__(_Selector(self))
        self.set_exception_handler(lambda loop, context: self.problems.append(context))

    def time(self) -> float:
        return self.now

    def run(self, seconds: float = 0.0) -> None:
        self._horizon = self.now + seconds
        self.run_forever()

    def idle(self, timeout: float | None) -> None:
        """Nothing is to be done before ``timeout`` seconds have gone by."""
        if timeout is None or self.now + timeout > self._horizon:
            self.now = self._horizon
            self.stop()
        else:
            self.now += timeout


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout != 0:
            self._loop.idle(timeout)
        return ready


class World:
    """The server of one app."""

    def __init__(self, loop: Loop, app: Fumi) -> None:
        self.loop, self.app = loop, app
        self.server = loop.run_until_complete(self._make())

    async def _make(self) -> Server:
        return Server(self.app._dialogue_setup(), None, count_of_one_process())

    def connect(self, little_room: bool = False) -> Client:
        """A client whose connection was accepted; where there is little room, replies soon wait for it to read."""
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setblocking(False)
        if little_room:
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LITTLE)
        self.loop.call_soon(self.server.admit, theirs, CLIENT, OWN)
        self.loop.run(0)
        return Client(self.loop, ours)

    @property
    def connections(self) -> int:
        return len(self.server.connections)


class Client:
    """One that does things when it is told to. ``closed`` tells that the server sends no more."""

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        self._loop, self._sock = loop, sock
        self.closed = False

    def send(self, data: bytes) -> bool:
        """False where the server takes it not: it does not read now, or has gone."""
        while data:
            try:
                data = data[self._sock.send(data) :]
            except BlockingIOError:
                before = self._loop.now
                self._loop.run(0)
                if not self._writable():
                    assert self._loop.now == before
                    return False
            except OSError:
                return False
        return True

    def _writable(self) -> bool:
        with selectors.SelectSelector() as selector:
            selector.register(self._sock, selectors.EVENT_WRITE)
            return bool(selector.select(0))

    def read(self) -> bytes:
        """What has arrived."""
        pieces = []
        with contextlib.suppress(BlockingIOError):
            while not self.closed:
                try:
                    piece = self._sock.recv(65536)
                except ConnectionResetError:
                    piece = b""
                self.closed = not piece
                pieces.append(piece)
        return b"".join(pieces)

    def half_close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    """Whose clock is the server's, and whose server's log is not read."""
    loop = Loop()
    monkeypatch.setattr(server, "monotonic", loop.time)
    for module in (dialogue, message):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=loop.time))
    logging.disable()
    asyncio.set_event_loop(loop)
    yield loop
    asyncio.set_event_loop(None)
    logging.disable(logging.NOTSET)
    loop.close()
