"""Connections made in the network namespace of another process."""

from __future__ import annotations

import ctypes
import os
import smtplib
import socket
import ssl
import threading

Address = tuple[str, int]


def connect(pid: int, address: Address, timeout: float = 60, source: Address | None = None) -> socket.socket:
    """Connect from the network of this process. Raises OSError."""
    made: list[socket.socket | OSError] = []

    def inside() -> None:
        try:
            with open(f"/proc/{pid}/ns/net") as namespace:
                assert ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
            made.append(socket.create_connection(address, timeout, source))
        except OSError as error:
            made.append(error)

    # A thread of its own, which alone changes to that network.
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    (connected,) = made
    if isinstance(connected, OSError):
        raise connected
    return connected


class Client(smtplib.SMTP):
    """An SMTP client in the network of this process; with port 465, over TLS."""

    def __init__(self, pid: int, address: Address, tls: ssl.SSLContext, name: str) -> None:
        """``name`` is the server's, which its certificate must have."""
        self._pid = pid
        self._address = address
        self._tls = tls
        super().__init__(name, address[1], "client.example", timeout=60)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        connected = connect(self._pid, self._address, timeout)
        return self._tls.wrap_socket(connected, server_hostname=host) if port == 465 else connected
