"""One listening socket: accepts, applies the limits, and starts each connection on its walk."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

from fumi_core.runtime.acceptor import Acceptor, DescriptorLimit
from fumi_core.runtime.addresses import Networks, peer_of
from fumi_core.runtime.scoreboard import ConnectionCount
from fumi_edge.backends.dialing import Name
from fumi_edge.connection.limits import Limits, Rejections
from fumi_edge.metrics import LIMITS, EdgeMetrics
from fumi_edge.sockets.ending import TOO_MANY_CLIENTS

Serve = Callable[["Listener", socket.socket, Name, Name], None]
"""Serves an accepted connection; the arguments after the socket are the client's address and the local one."""

log = logging.getLogger("fumi.edge.listener")


class Listener:
    """A listening socket of an edge. ``starttls``: clients begin in plaintext.

    ``balancers`` are the networks of the load balancers, which must send a PROXY header; nobody else may connect. None: clients
    connect directly.
    """

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        starttls: bool,
        balancers: Networks | None,
        limits: Limits,
        rejections: Rejections,
        metrics: EdgeMetrics,
        connection_count: ConnectionCount,
        descriptor_limit: DescriptorLimit,
        serve: Serve,
    ) -> None:
        self._serve = serve
        self._limits = limits
        self._rejections = rejections
        self.balancers = balancers
        self.name = name
        self.starttls = starttls
        self.metrics = metrics.listener(name)
        own = sock.getsockname()
        # The path of an abstract Unix socket is bytes.
        self.address: Name = (own[0], own[1]) if isinstance(own, tuple) else os.fsdecode(own)
        self.sock = sock
        self._acceptor = Acceptor(sock, name, log, self._admit, connection_count, descriptor_limit)

    async def close(self) -> None:
        """Accept the connections in the kernel's queue, then stop listening."""
        await self._acceptor.close_after_queue()

    def _admit(self, client: socket.socket, name: Any, own: Any) -> None:
        self.metrics.connections.inc()
        peer = peer_of(name)
        reason = self._refusal(peer[0])
        if reason is not None:
            self._rejections.add(reason, peer[0], self.name)
            self._turn_away(client, reason)
            return
        destination: Name = peer_of(own) if isinstance(own, tuple) else os.fsdecode(own)
        self._serve(self, client, peer if isinstance(name, tuple) else "", destination)

    def _refusal(self, host: str) -> str | None:
        if self.balancers is None:
            return self._limits.enter(host)
        # The client's address is not known before the header.
        return self._limits.enter(None) if host in self.balancers else "untrusted"

    def _turn_away(self, client: socket.socket, reason: str) -> None:
        if self.starttls and reason in LIMITS:
            with contextlib.suppress(OSError):
                client.send(TOO_MANY_CLIENTS)
                # Closing a socket with unread bytes sends RST, which would destroy the 421 on its way.
                client.recv(4096)
        client.close()
