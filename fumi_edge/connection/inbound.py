"""The PROXY header that a layer-4 balancer in front of the edge sends before anything else (fumi_core.proxy_protocol).

It is read from the kernel to its last byte and not one further: what follows is the client's, and TLS reads it from there.
"""

from __future__ import annotations

import asyncio
import socket
from typing import NamedTuple

from fumi_core.proxy_protocol import V2_MAX_LENGTH, ProxyHeader, ProxyProtocolError, parse
from fumi_core.runtime.addresses import peer_of
from fumi_edge.backends.dialing import Name
from fumi_edge.sockets.readiness import readable

TIMEOUT = 5.0
"""Seconds a balancer has for its header."""
LOOPBACK = ("127.0.0.0/8", "::1/128", "unix")
"""Who may send one when nobody is named."""


class HeaderError(Exception):
    """No header came, or none that can be believed; the text says why. ``silent``: the balancer sent nothing at all."""

    def __init__(self, problem: str, silent: bool = False) -> None:
        super().__init__(problem)
        self.silent = silent


class Client(NamedTuple):
    """What a header says of the client. Names are None for the balancer itself, and where it could not say.

    ``length`` is the header's, in octets.
    """

    source: Name | None
    destination: Name | None
    unique_id: bytes
    local: bool
    length: int


async def receive_client(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> Client:
    """Read the header. Raises HeaderError."""
    received = bytearray()
    try:
        async with asyncio.timeout(TIMEOUT):
            return _client(*await _receive(loop, sock, received))
    except TimeoutError:
        raise HeaderError("no PROXY header in time", silent=not received) from None
    except ProxyProtocolError as error:
        raise HeaderError(str(error)) from None
    except OSError:
        raise HeaderError("the connection broke off", silent=not received) from None


async def _receive(loop: asyncio.AbstractEventLoop, sock: socket.socket, received: bytearray) -> tuple[ProxyHeader, int]:
    """The header and its length; ``received`` is for what came of it so far."""
    while True:
        try:
            ahead = sock.recv(V2_MAX_LENGTH, socket.MSG_PEEK)
        except BlockingIOError:
            await readable(loop, sock.fileno())
            continue
        if not ahead:
            raise HeaderError("closed before a PROXY header", silent=not received)
        found = parse(bytes(received) + ahead)
        if found is not None:
            header, length = found
            sock.recv(length - len(received))
            return header, length
        # All of it is the header's. Taken out, it does not wake us again.
        received += sock.recv(len(ahead))


def _client(header: ProxyHeader, length: int) -> Client:
    """The balancer is layer 4: what it says of TLS is not ours, and not passed on."""
    if header.command == "LOCAL":
        return Client(None, None, b"", True, length)
    source, destination = header.source, header.destination
    if isinstance(source, tuple) and isinstance(destination, tuple):
        plain, other = peer_of(source), peer_of(destination)
        if (":" in plain[0]) == (":" in other[0]):
            source, destination = plain, other
    return Client(source, destination, header.unique_id or b"", False, length)
