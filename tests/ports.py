"""Ports for servers under test."""

from __future__ import annotations

import errno
import itertools
import random
import socket
from collections.abc import Iterator

# Below those that the kernel gives to whoever asks for any: one of these would often be somebody else's by the time that the
# server is there, for several test runs go on at once and each connection takes one.
FIRST, SPAN = 12_000, 20_000
# Those of a run, which no other run takes: a port is free when it is asked for, and until the server is there.
BLOCK = 1_000
_claims: list[socket.socket] = []


def _block() -> Iterator[int]:
    """The ports of the first block that is to be had, over and over; all of them when there is none."""
    blocks = [range(first, first + BLOCK) for first in range(FIRST, FIRST + SPAN, BLOCK)]
    random.shuffle(blocks)
    for block in blocks:
        # Bound as long as this process lives, and in all of them by the same name.
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0fumi-tests-ports-{block.start}")
        except OSError:
            claim.close()
            continue
        _claims.append(claim)
        return itertools.cycle(block)
    return itertools.cycle([port for block in blocks for port in block])


_numbers = _block()


def free_port(host: str = "127.0.0.1") -> int:
    """A port of this host that nobody has, and a different one each time. Raises OSError for a host that is not here."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while True:
        port = next(_numbers)
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
