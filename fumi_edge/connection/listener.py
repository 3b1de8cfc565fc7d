"""One listening socket: accepts, applies the limits, and starts each connection on its walk."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from fumi_core.proxy_protocol import Endpoint
from fumi_core.runtime.acceptor import Acceptor
from fumi_core.runtime.addresses import peer_of
from fumi_edge.connection.policy import ListenerPolicy
from fumi_edge.connection.resources import Resources
from fumi_edge.metrics import RejectReason
from fumi_edge.sockets.ending import TOO_MANY_CLIENTS
from fumi_edge.tls.handshake import Deadlines

Serve = Callable[["Listener", socket.socket, Endpoint, Endpoint], None]
"""Serves an accepted connection; the arguments after the socket are the client's address and the local one."""
Served = Callable[[Any, BaseException | None], None]
"""Called at the end of a connection, which is the first argument, with its exception or None."""

log = logging.getLogger("fumi.edge.listener")


class Listener:
    """A listening socket of an edge. ``starttls``: clients begin in plaintext.

    ``policy``, ``handshake_deadlines`` and ``resources`` are those of the connections that begin now; ``use`` replaces them.
    """

    def __init__(
        self,
        resources: Resources,
        sock: socket.socket,
        name: str,
        starttls: bool,
        policy: ListenerPolicy,
        serve: Serve,
        served: Served,
    ) -> None:
        self.use(resources, policy)
        self.sock = sock
        self.name = name
        self.starttls = starttls
        self.metrics = resources.metrics.listener(name)
        self._serve = serve
        self.served = served
        own = sock.getsockname()
        self.address: Endpoint = (own[0], own[1]) if isinstance(own, tuple) else os.fsdecode(own)
        self._acceptor = Acceptor(sock, name, log, self._admit, resources.connection_count, resources.descriptor_limit)

    def use(self, resources: Resources, policy: ListenerPolicy) -> None:
        """Serve the connections that are accepted from now on with these; open connections keep theirs."""
        self.resources = resources
        self.policy = policy
        self.handshake_deadlines = Deadlines(policy.handshake_timeout)

    async def close(self) -> None:
        """Accept the connections in the kernel's queue, then stop listening."""
        await self._acceptor.close_after_queue()

    def _admit(self, client: socket.socket, name: Any, own: Any) -> None:
        self.metrics.connections.inc()
        peer = peer_of(name)
        balancers, limits = self.policy.balancers, self.resources.limits
        if balancers is None:
            reason = limits.enter(peer[0])
        else:
            # The client's address is not known before the header.
            reason = limits.enter(None) if peer[0] in balancers else RejectReason.UNTRUSTED
        if reason is not None:
            self.resources.rejections.add(reason, peer[0], self.name)
            self._reject(client, reason)
            return
        self._serve(self, client, peer if isinstance(name, tuple) else "", _own_address(own))

    def _reject(self, client: socket.socket, reason: RejectReason) -> None:
        if self.starttls and reason is not RejectReason.UNTRUSTED:
            with contextlib.suppress(OSError):
                client.send(TOO_MANY_CLIENTS)
                # Closing a socket with unread bytes sends RST, which would destroy the 421 on its way.
                client.recv(4096)
        client.close()


@lru_cache(64)
def _own_address(own: Any) -> Endpoint:
    """An address of this host from a getsockname() result. There are few of them, so connections share the objects."""
    # The path of an abstract Unix socket is bytes.
    return peer_of(own) if isinstance(own, tuple) else os.fsdecode(own)
