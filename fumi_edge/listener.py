"""One listening socket: accepts, applies the limits, and starts each connection on its walk."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Any

from fumi_core.runtime.addresses import Networks, peer_of
from fumi_core.runtime.logs import event
from fumi_edge.backends import Name
from fumi_edge.ending import TOO_MANY_CLIENTS
from fumi_edge.limits import Limits, Rejections
from fumi_edge.metrics import LIMITS, EdgeMetrics

Serve = Callable[["Listener", socket.socket, Name, Name], None]
"""Takes an accepted connection with the client's name and our own."""

log = logging.getLogger("fumi.edge.listener")

BURST = 32
"""Connections accepted before the others get a turn."""
PAUSE = 0.5
"""Seconds without accepting when descriptors or the kernel's memory have run out."""
QUIET = 60.0
"""Seconds without a pause after which the next one is worth a line again."""
_WILDCARDS = ("0.0.0.0", "::")


class Listener:
    """A listening socket of an edge; ``starttls`` says whether its clients begin in plaintext.

    ``balancers`` are those that may connect, and send a PROXY header; None when clients come themselves.
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
        serve: Serve,
    ) -> None:
        self._serve = serve
        self._limits = limits
        self._rejections = rejections
        self.balancers = balancers
        self.sock = sock
        self._loop = asyncio.get_running_loop()
        self._resume: asyncio.TimerHandle | None = None
        self._paused_at = float("-inf")
        self._closing = False
        self.name = name
        self.starttls = starttls
        self.metrics = metrics.listener(name)
        own = sock.getsockname()
        self.address: Name = own if isinstance(own, str) else (own[0], own[1])
        self._destination: Name | None = None
        if isinstance(own, str):
            self._destination = own
        else:
            if own[0] not in _WILDCARDS:
                self._destination = peer_of(own)
            # Accepted sockets inherit these from the listening one.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._loop.add_reader(sock.fileno(), self._accept)

    def close(self) -> None:
        """Take in what has already connected, then stop listening."""
        if self.sock.fileno() < 0:
            return
        if self._resume is not None:
            self._resume.cancel()
        self._closing = True
        while not self._accept():
            pass
        self._loop.remove_reader(self.sock.fileno())
        self.sock.close()

    def _accept(self) -> bool:
        """Take in up to BURST connections; whether there are no more to be had now."""
        for _ in range(BURST):
            try:
                client, name = self.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return True
            except OSError as error:
                if not self._closing:
                    self._pause(error)
                return True
            self._admit(client, name)
        return False

    def _pause(self, error: OSError) -> None:
        now = self._loop.time()
        if now - self._paused_at > QUIET:
            # Once: this can last, with one connection accepted now and then.
            event(log, logging.ERROR, "cannot accept, pausing", listener=self.name, error=error.strerror)
        self._paused_at = now
        self._loop.remove_reader(self.sock.fileno())
        self._resume = self._loop.call_later(PAUSE, self._unpause)

    def _unpause(self) -> None:
        self._resume = None
        self._loop.add_reader(self.sock.fileno(), self._accept)

    def _admit(self, client: socket.socket, name: Any) -> None:
        client.setblocking(False)
        self.metrics.connections.inc()
        try:
            destination = self._destination or peer_of(client.getsockname())
        except OSError:
            client.close()
            return
        peer = peer_of(name)
        reason = self._refusal(peer[0])
        if reason is not None:
            self._rejections.add(reason, peer[0], self.name)
            self._turn_away(client, reason)
            return
        self._serve(self, client, peer if isinstance(name, tuple) else "", destination)

    def _refusal(self, host: str) -> str | None:
        if self.balancers is None:
            return self._limits.enter(host)
        # Whom it is for is known only when the header has come.
        return self._limits.enter(None) if host in self.balancers else "untrusted"

    def _turn_away(self, client: socket.socket, reason: str) -> None:
        if self.starttls and reason in LIMITS:
            with contextlib.suppress(OSError):
                client.send(TOO_MANY_CLIENTS)
        client.close()
