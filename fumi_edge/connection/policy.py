"""How the clients of a listener are served. A listener has one policy at a time, and a connection keeps the one it began with."""

from __future__ import annotations

from dataclasses import dataclass

from fumi_core.runtime.addresses import Networks, SocketAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerPolicy:
    """What the clients of one listener may do, and for how long. Times are in seconds.

    ``balancers`` are the networks of the load balancers, which must send a PROXY header; nobody else may connect. None: clients
    connect directly. ``require_tls`` and ``hide_starttls`` apply where clients begin in plaintext.
    """

    balancers: Networks | None = None
    require_tls: bool = False
    hide_starttls: bool = False
    handshake_timeout: float = 10.0
    idle_timeout: float = 900.0


@dataclass(frozen=True, slots=True)
class ListenerSettings:
    """An address to listen on, whether its clients begin in plaintext (``starttls``), and the policy for them."""

    address: SocketAddress
    starttls: bool
    policy: ListenerPolicy
