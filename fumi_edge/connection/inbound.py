"""Reads the PROXY header that a layer-4 load balancer in front of the edge sends first (fumi_core.proxy_protocol).

Exactly the header is taken from the kernel: the bytes after it are the client's, and TLS reads them from the socket.
"""

from __future__ import annotations

import asyncio
import socket
from typing import NamedTuple

from fumi_core.proxy_protocol import V2_MAX_LENGTH, Endpoint, ProxyHeader, ProxyProtocolError, parse
from fumi_core.runtime.addresses import peer_of
from fumi_edge.sockets.readiness import readable

HEADER_TIMEOUT = 5.0
"""Seconds in which a load balancer must send its header."""


class HeaderError(Exception):
    """There is no valid header; the message is the reason. ``silent``: the load balancer sent no bytes at all."""

    def __init__(self, problem: str, silent: bool = False) -> None:
        super().__init__(problem)
        self.silent = silent


class Client(NamedTuple):
    """The client's data in a header. The addresses are None in a LOCAL header, and when the load balancer did not know them.

    ``length`` is the length of the header in bytes.
    """

    source: Endpoint | None
    destination: Endpoint | None
    unique_id: bytes
    local: bool
    length: int


async def receive_client(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> Client:
    """Read the header. Raises HeaderError."""
    received = bytearray()
    try:
        async with asyncio.timeout(HEADER_TIMEOUT):
            return _client(*await _receive(loop, sock, received))
    except TimeoutError:
        raise HeaderError("no PROXY header in time", silent=not received) from None
    except ProxyProtocolError as error:
        raise HeaderError(str(error)) from None
    except OSError:
        raise HeaderError("the connection was reset", silent=not received) from None


async def _receive(loop: asyncio.AbstractEventLoop, sock: socket.socket, received: bytearray) -> tuple[ProxyHeader, int]:
    """Return the header and its length in bytes. Received parts of an incomplete header are added to ``received``."""
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
        # The header is incomplete, so all these bytes belong to it. Left in the kernel, they would wake the loop again.
        received += sock.recv(len(ahead))


def _client(header: ProxyHeader, length: int) -> Client:
    """Return the client. The header's TLS data is dropped: it cannot be about TLS that ends in the edge."""
    if header.command == "LOCAL":
        return Client(None, None, b"", True, length)
    source, destination = header.source, header.destination
    if isinstance(source, tuple) and isinstance(destination, tuple):
        plain, other = peer_of(source), peer_of(destination)
        if (":" in plain[0]) == (":" in other[0]):
            source, destination = plain, other
    return Client(source, destination, header.unique_id or b"", False, length)
