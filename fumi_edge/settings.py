"""All settings of an edge, as one value: ``program/`` makes it from the flags, and ``app.py`` from the options of an app."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fumi_core.runtime.addresses import SocketAddress
from fumi_core.runtime.listening import ListenAddress
from fumi_edge.backends.settings import BackendSettings
from fumi_edge.connection.limits import ClientLimits
from fumi_edge.connection.policy import ListenerSettings
from fumi_edge.tls.policy import CertificateSettings

ListenerKey = tuple[SocketAddress, bool, int]
"""A listener's address, ``starttls``, and how many listeners before it have both the same (with port 0)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeSettings:
    """The settings of an Edge, which are replaced as a whole by ``Edge.apply``. Times are in seconds.

    ``certificates``, ``backends`` and ``limits`` are those of every listener without its own. The files of certificates are
    checked every ``cert_reload_interval``; with 0 they are read in ``Edge.reload`` only. ``metrics`` is the address where the
    metrics are served, if any. ``socket_mode`` holds the permissions of Unix listeners; None leaves them to the umask.
    """

    certificates: CertificateSettings
    backends: BackendSettings
    cert_reload_interval: float = 10.0
    listeners: tuple[ListenerSettings, ...] = ()
    limits: ClientLimits = field(default_factory=ClientLimits)
    drain_timeout: float = 30.0
    metrics: SocketAddress | None = None
    socket_mode: int | None = None

    @property
    def listen_addresses(self) -> list[ListenAddress]:
        """All addresses to listen on, with their flags: the listeners', in their order, and the one for the metrics."""
        clients = [ListenAddress(each.setting, each.address) for each in self.listeners]
        return clients + ([ListenAddress("--metrics", self.metrics)] if self.metrics else [])

    @property
    def listeners_by_key(self) -> dict[ListenerKey, ListenerSettings]:
        """The listeners, each with a key by which it is found in other settings."""
        seen: Counter[tuple[SocketAddress, bool]] = Counter()
        found: dict[ListenerKey, ListenerSettings] = {}
        for each in self.listeners:
            place = each.address, each.starttls
            found[*place, seen[place]] = each
            seen[place] += 1
        return found

    @property
    def all_certificates(self) -> list[CertificateSettings]:
        """The different certificates of the edge and of its listeners."""
        return list(dict.fromkeys([self.certificates, *(each.certificates for each in self.listeners if each.certificates)]))

    @property
    def all_backends(self) -> list[BackendSettings]:
        """The different backends of the edge and of its listeners."""
        return list(dict.fromkeys([self.backends, *(each.backends for each in self.listeners if each.backends)]))

    def listeners_with(self, certificates: CertificateSettings) -> str:
        """The addresses of the listeners that serve these certificates, separated by commas."""
        return ",".join(str(each.address) for each in self.listeners if (each.certificates or self.certificates) == certificates)
