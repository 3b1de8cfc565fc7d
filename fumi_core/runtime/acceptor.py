"""Accepts connections from a listening socket in the event loop, and keeps going when the system runs out of resources.

It replaces ``asyncio.start_server()``, which makes a task, a future and a transport for each connection. It is not here for its
speed: a task that awaits ``loop.sock_accept()`` costs the same, 1.05 (0.75 … 1.19) of its CPU in the row core-connect of
``ops/bench`` and 1.05 (0.97 … 1.15) in edge-handshake (7 rounds on a busy machine, Python 3.11.7). It is here for the descriptor
limit, the sharing among workers, and the queue that is emptied at a stop. Delete it when asyncio has these. It uses no private
names.

Workers accept from the same sockets, and a connection wakes all of them that sleep. A worker that is awake anyway would always be
first, and end up with all long-lived connections. So a worker with more connections than the others lets them accept first, for a
moment.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import os
import resource
import socket
import struct
from collections.abc import Callable
from typing import Any

from fumi_core.runtime.dead_peers import detect_dead_peer
from fumi_core.runtime.listening import BACKLOG
from fumi_core.runtime.logs import event
from fumi_core.runtime.scoreboard import ConnectionCount

Admit = Callable[[socket.socket, Any, Any], None]
"""Takes a connected, non-blocking socket, the peer's name and our own, as getpeername() and getsockname() return them."""

MAX_ACCEPTS_AT_ONCE = 32
"""Connections accepted before other callbacks of the loop run."""
YIELD_SECONDS = 0.001
"""Seconds for which the other workers accept first."""
PAUSE_SECONDS = 0.5
"""Seconds without accepting when descriptors or the kernel's memory have run out."""
QUIET_SECONDS = 60.0
"""Seconds without a pause after which the next pause is logged again."""
QUEUE_TIMEOUT = 1.0
"""Seconds that a stop may spend on accepting the connections in the kernel's queue."""
SPARE_DESCRIPTORS = 64
"""Descriptors reserved for everything except connections; one eighth of the limit where that is less."""
_TCPI_UNACKED = struct.Struct("24xI")
"""Of struct tcp_info (linux/tcp.h), up to this field."""
_WILDCARDS = ("0.0.0.0", "::")


class DescriptorLimit:
    """How many connections this process has descriptors for, when each takes more descriptors than the one that accept() opens.

    Without this limit, the last connections would be accepted although no descriptor is left for their second socket.
    """

    def __init__(self, each: int, closing: Callable[[], int] = lambda: 0) -> None:
        """Each connection takes ``each`` descriptors. Descriptors that are open now are not available for connections, nor are
        those that ``closing()`` counts: of connections that have ended but are not closed yet.
        """
        self._each = each
        self._closing = closing
        self._others = _open_descriptors()

    def reached(self, connections: int) -> bool:
        return connections >= self._connections(self._closing())

    @property
    def connections(self) -> float:
        """How many connections there can be while none is closing; infinity without a limit."""
        return self._connections(0)

    def _connections(self, closing: int) -> float:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit == resource.RLIM_INFINITY:
            return math.inf
        free = limit - self._others - min(SPARE_DESCRIPTORS, limit // 8) - closing
        return max(1, free // self._each)


class Acceptor:
    """Accepts from ``sock``, which must be listening and non-blocking, until ``close()``."""

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        log: logging.Logger,
        admit: Admit,
        connection_count: ConnectionCount,
        descriptor_limit: DescriptorLimit | None = None,
    ) -> None:
        """``name`` is for the log; at the ``descriptor_limit`` further connections stay in the kernel's queue."""
        self.sock = sock
        self._name = name
        self._log = log
        self._admit = admit
        self._connection_count = connection_count
        self._descriptor_limit = descriptor_limit
        self._loop = asyncio.get_running_loop()
        self._resume: asyncio.TimerHandle | None = None
        self._paused_at = float("-inf")
        own = sock.getsockname()
        # All connections of a socket bound to one address have that address; otherwise each needs a getsockname().
        self._own = own if sock.family == socket.AF_UNIX or own[0] not in _WILDCARDS else None
        if sock.family != socket.AF_UNIX:
            # Accepted sockets inherit these options from the listening one.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            detect_dead_peer(sock)
        self._loop.add_reader(sock.fileno(), self._accept)

    async def close_after_queue(self) -> None:
        """Accept the connections that are in the kernel's queue now, for at most QUEUE_TIMEOUT, and stop listening.

        Other callbacks run in between. Connections that arrive later are not accepted: in a flood there is always one more.
        """
        if self.sock.fileno() < 0:
            return
        self._stop_watching()
        end = self._loop.time() + QUEUE_TIMEOUT
        waiting = _queued(self.sock)
        while waiting > 0 and self._loop.time() < end:
            for _ in range(min(MAX_ACCEPTS_AT_ONCE, waiting)):
                if not self._accept_one():
                    waiting = 0
                    break
                waiting -= 1
            await asyncio.sleep(0)
        self.close()

    def close(self) -> None:
        """Stop listening. Connections that were not accepted yet are reset, unless another process has the socket open too."""
        if self.sock.fileno() < 0:
            return
        self._stop_watching()
        self.sock.close()

    def _accept(self) -> None:
        for _ in range(MAX_ACCEPTS_AT_ONCE):
            if self._connection_count.ahead:
                self._stop_watching_for(YIELD_SECONDS)
                return
            if not self._accept_one():
                return

    def _accept_one(self) -> bool:
        """Accept one connection; False when there is none now."""
        if self._descriptor_limit is not None and self._descriptor_limit.reached(self._connection_count.connections):
            self._pause(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
            return False
        try:
            client, name = self.sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False
        except OSError as error:
            self._pause(error)
            return False
        try:
            client.setblocking(False)
            own = self._own or client.getsockname()
        except OSError:
            client.close()  # the client has disconnected already
        else:
            self._admit(client, name, own)
        return True

    def _pause(self, error: OSError) -> None:
        now = self._loop.time()
        if now - self._paused_at > QUIET_SECONDS:
            # Logged once: this state can last, with one connection accepted now and then.
            event(self._log, logging.ERROR, "cannot accept, pausing", listener=self._name, error=error.strerror)
        self._paused_at = now
        self._stop_watching_for(PAUSE_SECONDS)

    def _stop_watching_for(self, seconds: float) -> None:
        self._stop_watching()
        self._resume = self._loop.call_later(seconds, self._watch_again)

    def _stop_watching(self) -> None:
        if self._resume is not None:
            self._resume.cancel()
        self._loop.remove_reader(self.sock.fileno())

    def _watch_again(self) -> None:
        """Resume: accept the connection that waits, unless another worker has accepted it."""
        self._resume = None
        self._loop.add_reader(self.sock.fileno(), self._accept)
        self._accept_one()


def _open_descriptors() -> int:
    """How many descriptors this process has open; 0 on a system that does not tell, such as one without /proc."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0


def _queued(sock: socket.socket) -> int:
    """How many connections wait to be accepted: tcpi_unacked of a listening TCP socket; the maximum for other sockets."""
    if sock.family == socket.AF_UNIX:
        return BACKLOG
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCPI_UNACKED.size)
    return int(_TCPI_UNACKED.unpack(info)[0])
