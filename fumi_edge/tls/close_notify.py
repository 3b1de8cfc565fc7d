"""TLS's end of one direction (close_notify, RFC 8446 §6.1) as bytes, made without reading from the connection.

Python sends close_notify only by ``unwrap()``, which then reads at once for the client's. OpenSSL takes application data that it
finds there for a fatal error, and what the client was still sending is lost. No look beforehand helps: the data may arrive
between the look and the read. So for that one call the socket's descriptor stands for one end of a socket pair, where there is
nothing to read, and the record is taken from the other end.
"""

from __future__ import annotations

import os
import socket
import ssl


class CloseNotify:
    """Makes the records for all connections of one event loop; ``open()`` it in the process that serves."""

    def __init__(self) -> None:
        self._pair: tuple[socket.socket, socket.socket] | None = None
        self._spare = -1

    def open(self) -> None:
        """Takes three descriptors, so that none is needed when a connection ends. Raises OSError."""
        self._pair = inner, outer = socket.socketpair()
        inner.setblocking(False)
        outer.setblocking(False)
        self._spare = os.dup(inner.fileno())

    def close(self) -> None:
        if self._pair is not None:
            for sock in self._pair:
                sock.close()
            os.close(self._spare)
            self._pair = None

    def record(self, sock: ssl.SSLSocket) -> bytes:
        """The record that ends our side of ``sock``; empty when the TLS of it has failed. It can still be read from."""
        assert self._pair is not None
        inner, outer = self._pair
        fd = sock.fileno()
        # The event loop notices nothing: the connection is still open, and this descriptor is its own again in a moment.
        os.dup2(fd, self._spare, inheritable=False)
        try:
            os.dup2(inner.fileno(), fd, inheritable=False)
            sock.unwrap()
        except (OSError, ValueError):
            pass  # SSLWantReadError, as a rule: the record is written, and the client's is not there
        finally:
            os.dup2(self._spare, fd, inheritable=False)
            os.dup2(inner.fileno(), self._spare, inheritable=False)
        try:
            return outer.recv(65536)
        except BlockingIOError:
            return b""
