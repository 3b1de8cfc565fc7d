"""The server of one ``Fumi``: its listening sockets, its connections, and how both end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Any

from fumi_core.runtime.acceptor import Acceptor, DescriptorLimit
from fumi_core.runtime.addresses import peer_of
from fumi_core.runtime.dead_peers import CHECK_SECONDS
from fumi_core.runtime.scoreboard import ConnectionCount
from fumi_core.server.client_facts import ClientFacts
from fumi_core.server.connection import Connection
from fumi_core.server.setup import DialogueSetup
from fumi_core.server.socket_transport import SocketTransport
from fumi_core.server.transport import Transport, TransportOwner

_log = logging.getLogger("fumi.core")

READ_BYTES = 112 * 1024
"""Bytes taken from a socket at once, into one buffer that all connections share.

A 5 MB message costs 3.2 ms with this size, 3.6 with 64 KiB, and 3.3 with 128 KiB, where malloc maps and unmaps some pieces
(bench row core-large; medians of 5 rounds on a busy machine, Python 3.11.2). One whole read is not more than HIGH_WATER_BYTES
(handlers/stream.py): pausing after each read costs more than the larger reads save.
"""

DESCRIPTORS = 2
"""Descriptors that a connection may take: its socket, and a file or a next hop's socket for its message."""


class Server:
    """Listeners and connections of one ``Fumi``; created again by each ``listen()`` after a ``close()``."""

    def __init__(self, setup: DialogueSetup, logger: logging.Logger | None, connection_count: ConnectionCount) -> None:
        self.configure(setup, logger)
        self.connection_count = connection_count
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.buffer = memoryview(bytearray(READ_BYTES))
        self.connections: set[Connection] = set()
        self.draining = False
        self._acceptors: list[Acceptor] = []
        self._descriptor_limit = DescriptorLimit(DESCRIPTORS)
        self._empty = asyncio.Event()
        self._window_check: asyncio.TimerHandle | None = None

    def configure(self, setup: DialogueSetup, logger: logging.Logger | None) -> None:
        """Set what future connections share, and their logger."""
        self.setup = setup
        self.options = setup.options
        self.observer = setup.observer
        self.logger = logger

    def listen(self, sock: socket.socket) -> None:
        """Accept connections from a listening socket, which this server then owns."""
        sock.setblocking(False)
        name = str(sock.getsockname())
        acceptor = Acceptor(sock, name, _log, self.admit, self.connection_count, self._descriptor_limit)
        self._acceptors.append(acceptor)
        if self._window_check is None:
            self._window_check = self.loop.call_later(CHECK_SECONDS, self._check_windows)

    def admit(self, sock: socket.socket, peer: Any, own: Any) -> None:
        """Serve a connected, non-blocking socket whose two ends have these addresses."""
        connection = Connection(self, ClientFacts(peer_of(peer), peer_of(own)))
        transport = SocketTransport(self.loop, sock, self.buffer, connection)
        if self.options.proxy_protocol == "off":
            connection.start(transport)
        else:
            connection.expect_header(transport)

    def serve(self, facts: ClientFacts, transport: Callable[[TransportOwner], Transport]) -> Callable[[], None]:
        """Serve a client that another part of this process has accepted; ``transport`` is called with the transport's owner.

        Returns a function that ends the connection at once, as ``close()`` does when its timeout has passed.
        """
        connection = Connection(self, facts)
        connection.start(transport(connection))
        return connection.kill

    @property
    def sockets(self) -> list[socket.socket]:
        return [acceptor.sock for acceptor in self._acceptors]

    async def close(self, timeout: float) -> None:
        """Stop accepting, let transactions end for ``timeout`` seconds, then abort the rest; if cancelled, abort at once."""
        self.draining = True
        for acceptor in self._acceptors:
            acceptor.close()
        for connection in list(self.connections):
            connection.drain()
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wait_empty(), timeout)
        finally:
            if self._window_check is not None:
                self._window_check.cancel()
            for connection in list(self.connections):
                connection.kill()
        # Their handlers are cancelled, and on_close follows; a handler that does not end is not awaited.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wait_empty(), 1)

    def forget(self, connection: Connection) -> None:
        self.connections.discard(connection)
        if not self.connections:
            self._empty.set()

    def _check_windows(self) -> None:
        for connection in self.connections:
            connection.check_window()
        self._window_check = self.loop.call_later(CHECK_SECONDS, self._check_windows)

    async def _wait_empty(self) -> None:
        while self.connections:
            self._empty.clear()
            await self._empty.wait()
