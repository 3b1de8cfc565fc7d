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
