"""How the clients of a listener are served. A listener has one policy at a time; a connection keeps the one it began with."""

from __future__ import annotations

from dataclasses import dataclass

from fumi_core.runtime.addresses import Networks, SocketAddress
from fumi_edge.backends.settings import BackendSettings
from fumi_edge.connection.limits import ClientLimits
from fumi_edge.tls.policy import CertificateSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerPolicy:
    """Rules and time limits for the clients of one listener. Times are in seconds.

    ``balancers`` are the networks of the load balancers, which must send a PROXY header; others are disconnected. None: clients
    connect directly. ``require_tls`` and ``hide_starttls`` apply where clients begin in plaintext.
    """

    balancers: Networks | None = None
    require_tls: bool = False
    hide_starttls: bool = False
    handshake_timeout: float = 10.0
    idle_timeout: float = 900.0


@dataclass(frozen=True, slots=True)
class ListenerSettings:
    """An address to listen on, whether its clients begin in plaintext (``starttls``), and the policy for them.

    ``certificates``, ``backends`` and ``limits`` are the listener's own; None: those of the edge. ``setting`` is the flag or the
    table that names the listener, for errors.
    """

    address: SocketAddress
    starttls: bool
    policy: ListenerPolicy
    certificates: CertificateSettings | None = None
    backends: BackendSettings | None = None
    limits: ClientLimits | None = None
    setting: str = "listener"
