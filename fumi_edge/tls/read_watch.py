"""Ends a TLS connection whose client, or TLS backend, makes one read last.

OpenSSL returns from a read only with content, or when nothing more has arrived. Until then it works through records without
content, such as key updates (RFC 8446 §4.6.3): each costs it 16 µs, and a client that has made them beforehand 27 bytes. One
client could thus block the event loop for as long as it likes, and Python cannot limit that. Therefore a thread watches for a
read that does not return, and shuts its socket down; OpenSSL then works through what has arrived already, and returns.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import threading
import time
from functools import partial

from fumi_core.runtime.addresses import peer_of
from fumi_core.runtime.daemon_thread import start_thread
from fumi_core.runtime.logs import event

log = logging.getLogger("fumi.edge")

CHECK_SECONDS = 0.25
"""Seconds between two checks."""
MAX_READ_SECONDS = 0.5
"""Seconds of CPU time that one read may take. A read of 64 KiB takes less than a thousandth of that."""


class CurrentRead:
    """The read that is going on in the loop's thread: a tuple of its socket, new for each read, or None."""

    __slots__ = ("disconnected", "now", "thread")

    def __init__(self) -> None:
        self.now: tuple[socket.socket] | None = None
        self.disconnected: tuple[socket.socket] | None = None
        """The last read that was ended. Several edges in one thread have a watch each, which must not report it again."""
        self.thread = 0
        """The thread that is watched. Checks of backends read in other threads, and must not take its reads out of sight."""

    def begins(self, sock: socket.socket) -> None:
        """The calling thread reads from this socket, until ``ends()``."""
        if threading.get_ident() == self.thread:
            self.now = (sock,)

    def ends(self) -> None:
        if threading.get_ident() == self.thread:
            self.now = None


CURRENT_READ = CurrentRead()


class WatchedSocket(ssl.SSLSocket):
    """A TLS socket of which each call that reads is watched. ``read()`` is not: records.py does that, without a call more."""

    def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
        CURRENT_READ.begins(self)
        try:
            return super().recv(buflen, flags)
        finally:
            CURRENT_READ.ends()

    def unwrap(self) -> socket.socket:
        """Send close_notify, and look for the peer's: OpenSSL works through whatever has arrived before it."""
        CURRENT_READ.begins(self)
        try:
            return super().unwrap()
        finally:
            CURRENT_READ.ends()


class ReadWatch:
    """The thread, from ``start()`` to ``close()``."""

    def __init__(self) -> None:
        self._closed = threading.Event()

    def start(self) -> None:
        """Watch the calling thread, which is the event loop's. To be called after the fork.

        Opens two descriptors, so that ending a read needs none. Raises OSError without these or without threads.
        """
        CURRENT_READ.thread = threading.get_ident()
        disconnecting = _Disconnecting()
        try:
            start_thread(partial(self._watch, time.pthread_getcpuclockid(CURRENT_READ.thread), disconnecting), "read watch")
        except OSError:
            disconnecting.close()
            raise

    def close(self) -> None:
        self._closed.set()

    def _watch(self, clock: int, disconnecting: _Disconnecting) -> None:
        """``clock`` returns the CPU time of the loop's thread, which stands still while the process is stopped."""
        last, limit = None, 0.0
        # OSError: the loop's thread has ended, and so has its clock.
        with contextlib.closing(disconnecting), contextlib.suppress(OSError):
            while not self._closed.wait(CHECK_SECONDS):
                now, used = CURRENT_READ.now, time.clock_gettime(clock)
                if now is not last:
                    last, limit = now, used + MAX_READ_SECONDS
                elif now is not None and now is not CURRENT_READ.disconnected and used >= limit:
                    CURRENT_READ.disconnected = now
                    disconnecting.end(now)


class _Disconnecting:
    """Shuts down the socket of a read that is going on, and no other one.

    The read may return at any moment, and the number of its descriptor may then belong to another connection, or to the socket
    pair of close_notify.py. Therefore the descriptor is copied, and the copy is shut down if the same read still goes on after
    that: as long as it does, the loop's thread neither closes nor replaces the descriptor.
    """

    def __init__(self) -> None:
        self._copy, self._nothing = socket.socketpair()

    def close(self) -> None:
        self._copy.close()
        self._nothing.close()

    def end(self, now: tuple[socket.socket]) -> None:
        """Disconnect this read's socket, with a line in the log, if ``CURRENT_READ.now`` still is this read."""
        (sock,) = now
        with contextlib.suppress(OSError):  # the client may have closed in the meantime
            peer, _ = peer_of(sock.getpeername())
            os.dup2(sock.fileno(), self._copy.fileno(), inheritable=False)
            if CURRENT_READ.now is now:
                self._copy.shutdown(socket.SHUT_RDWR)
                side = "client_ip" if getattr(sock, "server_side", True) else "backend_ip"
                event(log, logging.WARNING, "TLS read does not end, disconnected", **{side: peer})
        os.dup2(self._nothing.fileno(), self._copy.fileno(), inheritable=False)
