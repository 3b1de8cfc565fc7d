"""All settings of an edge, as one value: ``program/`` makes it from the flags, and ``app.py`` from the options of an app."""

from __future__ import annotations

from dataclasses import dataclass, field

from fumi_core.runtime.addresses import SocketAddress
from fumi_core.runtime.listening import ListenAddress
from fumi_edge.backends.settings import BackendSettings
from fumi_edge.connection.limits import ClientLimits
from fumi_edge.connection.policy import ListenerSettings
from fumi_edge.tls.pem import Pair
from fumi_edge.tls.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeSettings:
    """What an Edge does. It never changes: ``Edge.apply`` takes another one. Times are in seconds.

    The ``certificates`` are served under the ``tls`` policy. Their files are checked every ``cert_reload_interval``; with 0 they
    are read in ``Edge.reload`` only. ``metrics`` is the address where the metrics are served, if any. ``socket_mode`` holds the
    permissions of Unix listeners; None leaves them to the umask.
    """

    certificates: tuple[Pair, ...]
    backends: BackendSettings
    tls: Policy = field(default_factory=Policy)
    cert_reload_interval: float = 10.0
    listeners: tuple[ListenerSettings, ...] = ()
    limits: ClientLimits = field(default_factory=ClientLimits)
    drain_timeout: float = 30.0
    metrics: SocketAddress | None = None
    socket_mode: int | None = None

    @property
    def listen_addresses(self) -> list[ListenAddress]:
        """All addresses to listen on, with their flags: the listeners', in their order, and the one for the metrics."""
        clients = [ListenAddress("--starttls-listen" if each.starttls else "--listen", each.address) for each in self.listeners]
        return clients + ([ListenAddress("--metrics", self.metrics)] if self.metrics else [])
