"""The direct path: a core in this process serves a client over TLS on the client's own socket, without a backend connection.

The core gets the facts of a PROXY header as values, and a transport that decrypts what it reads and encrypts what it writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from fumi_core.proxy_protocol import Endpoint, TLSInfo
from fumi_edge.tls.transport import TLSTransport, TransportOwner


class DirectClient(NamedTuple):
    """A client after its handshake. ``balancer`` is the address of the load balancer through which it came, None without one.

    ``upgraded``: it had a banner before TLS (RFC 3207 §4.2). ``check``: it is the load balancer's own check. ``unnamed``: the
    load balancer's header does not name it, and ``source`` is the load balancer's address.
    """

    id: str
    source: Endpoint
    destination: Endpoint
    tls: TLSInfo
    balancer: Endpoint | None
    upgraded: bool
    check: bool
    unnamed: bool


class DirectCore(Protocol):
    """A core in this process."""

    @property
    def buffer(self) -> memoryview:
        """Where the clients' records are decrypted, one read after the other."""

    def serve(self, client: DirectClient, transport: Callable[[TransportOwner], TLSTransport]) -> Callable[[], None]:
        """Begin a dialogue with the client. ``transport`` is called once, at once, with the receiver of its events.

        Returns a function that ends it at once, with a 421 if the client can still get one.
        """
