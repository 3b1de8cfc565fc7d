"""Ports for servers under test."""

from __future__ import annotations

import contextlib
import errno
import itertools
import random
import socket
import time
from collections.abc import Iterator

# Below the kernel's ephemeral ports: one of those would often be in use by the time that the server starts, since several
# test runs go on at once and each connection takes one. So each run has a share of its own.
FIRST, SHARE, SHARES = 12_000, 1_000, 20


def free_port(host: str = "127.0.0.1") -> int:
    """A free port of this host, a different one each time. Raises OSError for an address that this machine does not have."""
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


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """For as long as the block takes, no other test run on this machine is in one of this name."""
    while (held := _hold(name)) is None:
        time.sleep(0.1)
    with held:
        yield


def _hold(name: str) -> socket.socket | None:
    """What only one can have at a time, until it is closed or the process ends: a name in the kernel, as ports are."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(f"\0fumi-tests-{name}")
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            return None
        raise
    return sock


def _share() -> int:
    """One that no other run has, for as long as this process lives; any, should there be more runs than shares."""
    shares = random.sample(range(SHARES), SHARES)
    for share in shares:
        if (held := _hold(f"ports-{FIRST + share * SHARE}")) is not None:
            held.detach()
            return share
    return shares[0]


_first, _begin = FIRST + _share() * SHARE, random.randrange(SHARE)
_numbers = (_first + number % SHARE for number in itertools.count(_begin))


def kept_port() -> socket.socket:
    """A socket that has a port of 127.0.0.1 and does nothing with it. Who listens there too, does so by create_server().

    Where nobody does, connecting is refused as long as it is open; at a port that is nobody's, a stranger may come to listen.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    return sock
