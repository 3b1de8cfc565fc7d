"""What the server knows about a client before the dialogue begins, as one value.

For a direct connection it comes from the socket and the options, behind a proxy from the PROXY header.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from fumi_core.proxy_protocol import Endpoint, ProxyHeader, TLSInfo, unique_id_text
from fumi_core.runtime.addresses import peer_of


class Origin(Enum):
    """Where a connection comes from."""

    CLIENT = "client"
    """A client, whose address is known."""
    UNNAMED_CLIENT = "unnamed client"
    """A client that the PROXY header does not name: the address is the proxy's."""
    HEALTH_CHECK = "health check"
    """The proxy itself (PROXY header with LOCAL), or a client that disconnected without a command."""


class ClientFacts(NamedTuple):
    """``remote`` and ``local`` are the addresses and ports of the client and of the server that it connected to.

    ``secure`` tells whether the client uses TLS, ``tls`` with which parameters, where known. ``proxy_address`` is the TLS
    proxy's, None without one. ``id`` is the session's; None if the server is to choose one. ``greeted``: the client had its
    banner before it upgraded with STARTTLS, and does not expect a second one (RFC 3207 §4.2).
    """

    remote: tuple[str, int]
    local: tuple[str, int]
    secure: bool = False
    tls: TLSInfo | None = None
    proxy_address: str | None = None
    id: str | None = None
    origin: Origin = Origin.CLIENT
    greeted: bool = False


def from_header(header: ProxyHeader, connection: ClientFacts) -> ClientFacts:
    """The facts in a PROXY header on a connection with these facts of its own, which are used where the header has none."""
    proxied = connection._replace(proxy_address=connection.remote[0])
    if header.command == "LOCAL":
        return proxied._replace(origin=Origin.HEALTH_CHECK)
    return proxied._replace(
        remote=connection.remote if header.source is None else address_of(header.source),
        local=connection.local if header.destination is None else address_of(header.destination),
        secure=connection.secure or header.tls is not None,
        tls=header.tls,
        id=unique_id_text(header.unique_id) if header.unique_id else None,
        origin=Origin.UNNAMED_CLIENT if header.source is None else Origin.CLIENT,
    )


def address_of(place: Endpoint) -> tuple[str, int]:
    """The address and port of one end, for the session; a Unix socket's path is its address, and its port is 0."""
    if isinstance(place, str):
        # The client may choose a Unix socket's path: it must not look like an address, nor break a log line.
        return "unix:" + "".join(each if each.isascii() and each.isprintable() else "?" for each in place), 0
    return peer_of(place)
