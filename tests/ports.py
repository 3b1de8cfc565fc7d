"""Ports for servers under test."""

from __future__ import annotations

import errno
import itertools
import random
import socket

# Below those that the kernel gives to whoever asks for any: one of these would often be somebody else's by the time that the
# server is there, for several test runs go on at once and each connection takes one.
FIRST, SPAN = 12_000, 20_000
_numbers = itertools.count(random.randrange(SPAN))


def free_port(host: str = "127.0.0.1") -> int:
    """A port of this host that nobody has, and a different one each time. Raises OSError for a host that is not here."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        port = FIRST + next(_numbers) % SPAN
        with socket.socket(family) as sock:
            try:
                sock.bind((host, port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise
            return port


def kept_port() -> socket.socket:
    """A socket that has a port of 127.0.0.1 and does nothing with it. Who listens there too, does so by create_server().

    Where nobody does, connecting is refused as long as it is open; at a port that is nobody's, a stranger may come to listen.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    return sock
