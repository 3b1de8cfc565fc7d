"""Accepting connections from a listening socket in the event loop, and surviving when the system has no more to give.

asyncio's own way makes a task, a future and a transport for each connection, which costs more than a short session does.

Workers accept from the same sockets, and a connection wakes all of them that sleep. One that is awake anyway would always be
first, and end up with all the connections that stay; so one that is ahead in connections lets the others go first, for a moment.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import socket
import struct
from collections.abc import Callable
from typing import Any

from fumi_core.runtime.addresses import BACKLOG
from fumi_core.runtime.logs import event
from fumi_core.runtime.scoreboard import ConnectionCount

Admit = Callable[[socket.socket, Any, Any], None]
"""Takes a connected, non-blocking socket, the peer's name and our own, as getpeername() and getsockname() give them."""

BURST = 32
"""Connections accepted before the others get a turn."""
YIELD_SECONDS = 0.001
"""Seconds for which the other workers go first."""
PAUSE_SECONDS = 0.5
"""Seconds without accepting when descriptors or the kernel's memory have run out."""
QUIET_SECONDS = 60.0
"""Seconds without a pause after which the next one is worth a line again."""
QUEUE_TIMEOUT = 1.0
"""Seconds that accepting the kernel's queue may take at a stop."""
SPARE = 64
"""Descriptors that are left for what comes and goes beside the connections; an eighth of all where there are few."""
_TCPI_UNACKED = struct.Struct("24xI")
"""Of struct tcp_info (linux/tcp.h), up to this field."""
_WILDCARDS = ("0.0.0.0", "::")


class DescriptorLimit:
    """How many connections this process has descriptors for, when each takes more than the one that accept() finds.

    Without it the last ones would be accepted and then find none for their other half.
    """

    def __init__(self, each: int, closing: Callable[[], int] = lambda: 0) -> None:
        """Each connection takes ``each`` descriptors. What is open now is not there for them, nor what ``closing()`` counts:
        descriptors of connections that are over, but not closed yet.
        """
        self._each = each
        self._closing = closing
        self._others = len(os.listdir("/proc/self/fd"))

    def reached(self, connections: int) -> bool:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit == resource.RLIM_INFINITY:
            return False
        free = limit - self._others - min(SPARE, limit // 8) - self._closing()
        return connections >= max(1, free // self._each)


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
        """``name`` is for the log; at the ``descriptor_limit`` connections wait in the kernel's queue."""
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
        # Bound to one address, all its connections have that; else each has to be asked.
        self._own = own if sock.family == socket.AF_UNIX or own[0] not in _WILDCARDS else None
        if sock.family != socket.AF_UNIX:
            # Accepted sockets inherit these from the listening one.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._loop.add_reader(sock.fileno(), self._accept)

    async def close_after_queue(self) -> None:
        """Accept the connections that wait in the kernel's queue now, for at most QUEUE_TIMEOUT, and stop listening.

        In turns with everything else, and not those that come meanwhile: in a flood there is always one more.
        """
        if self.sock.fileno() < 0:
            return
        self._stop_watching()
        end = self._loop.time() + QUEUE_TIMEOUT
        waiting = _queued(self.sock)
        while waiting > 0 and self._loop.time() < end:
            for _ in range(min(BURST, waiting)):
                if not self._take():
                    waiting = 0
                    break
                waiting -= 1
            await asyncio.sleep(0)
        self.close()

    def close(self) -> None:
        """Stop listening. Connections that were not accepted yet are reset, unless another process has the socket too."""
        if self.sock.fileno() < 0:
            return
        self._stop_watching()
        self.sock.close()

    def _accept(self) -> None:
        for _ in range(BURST):
            if self._connection_count.ahead:
                self._rest(YIELD_SECONDS)
                return
            if not self._take():
                return

    def _take(self) -> bool:
        """Accept one; False when there is none to be had now."""
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
            client.close()  # gone already
        else:
            self._admit(client, name, own)
        return True

    def _pause(self, error: OSError) -> None:
        now = self._loop.time()
        if now - self._paused_at > QUIET_SECONDS:
            # Once: this can last, with one connection accepted now and then.
            event(self._log, logging.ERROR, "cannot accept, pausing", listener=self._name, error=error.strerror)
        self._paused_at = now
        self._rest(PAUSE_SECONDS)

    def _rest(self, seconds: float) -> None:
        self._stop_watching()
        self._resume = self._loop.call_later(seconds, self._go_on)

    def _stop_watching(self) -> None:
        if self._resume is not None:
            self._resume.cancel()
        self._loop.remove_reader(self.sock.fileno())

    def _go_on(self) -> None:
        """Take the one, if there is one, that nobody else has taken."""
        self._resume = None
        self._loop.add_reader(self.sock.fileno(), self._accept)
        self._take()


def _queued(sock: socket.socket) -> int:
    """How many connections wait to be accepted: tcpi_unacked of a listening socket; of others the most that there can be."""
    if sock.family == socket.AF_UNIX:
        return BACKLOG
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCPI_UNACKED.size)
    return int(_TCPI_UNACKED.unpack(info)[0])
