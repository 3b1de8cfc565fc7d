"""The certificates, backends and limits of each listener.

Listeners with the same certificates and TLS policy share one Certificates, and so its ticket keys and its reloads. Listeners with
the same backends share one Backends, and a backend that several of them name is one backend, with one state and one health check.
Limits are shared by all listeners that have none of their own.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from typing import NamedTuple

from fumi_core.runtime.scoreboard import ConnectionCount
from fumi_edge.backends.choice import Backend, Backends
from fumi_edge.backends.health import Checks, pool_problems
from fumi_edge.backends.settings import BackendSettings
from fumi_edge.certificate_reload import CredentialsReloader, FileReloader, Reloader
from fumi_edge.connection.limits import ClientLimits, Limits
from fumi_edge.connection.policy import ListenerSettings
from fumi_edge.connection.resources import Resources, Shared
from fumi_edge.metrics import EdgeMetrics
from fumi_edge.settings import EdgeSettings, ListenerKey
from fumi_edge.tls.certificates import Certificates
from fumi_edge.tls.credentials import ClientSettings, Credentials
from fumi_edge.tls.policy import CertificateSettings


class _Reloading(NamedTuple):
    """Identifies a Reloader, which is kept while this is the same."""

    files: Certificates | Credentials
    interval: float
    listeners: str | None

    def reloader(self, metrics: EdgeMetrics) -> FileReloader:
        if isinstance(self.files, Credentials):
            return CredentialsReloader(self.files, metrics, self.interval)
        return Reloader(self.files, metrics, self.interval, self.listeners)


class Services:
    """The services of an edge for some settings. A reload replaces them as a whole; an open connection keeps its own."""

    def __init__(
        self,
        settings: EdgeSettings,
        certificates: Mapping[CertificateSettings, Certificates],
        metrics: EdgeMetrics,
        connection_count: ConnectionCount,
        before: Services | None = None,
    ) -> None:
        """``certificates`` has those of the settings, loaded. State of ``before`` that is still used is kept."""
        self._settings = settings
        self.certificates = {each: certificates[each] for each in settings.all_certificates}
        for certificates_in_use in self.certificates.values():
            metrics.ciphers(certificates_in_use.ciphers())
        known = () if before is None else before.backends.values()
        self._pools: dict[BackendSettings, Backends] = {}
        for each in settings.all_backends:
            self._pools[each] = Backends(each, metrics, [*known, *self.backends.values()])
        for backend in self.backends.values():
            backend.pools = [pool.all for pool in self._pools.values() if backend in pool.all]
        self._limits: dict[ListenerKey | None, Limits] = {} if before is None else before._limits
        self.count_clients_in(connection_count)
        reloaders: Mapping[_Reloading, FileReloader] = {} if before is None else before._reloaders
        self._reloaders: dict[_Reloading, FileReloader] = {
            each: reloaders.get(each) or each.reloader(metrics) for each in self._reloadings()
        }
        self._checks: Checks | None = None
        self._left: list[Backend] = []
        """Backends that are no longer named and still have connections."""
        if before is not None:
            self._forget(before, metrics)

    def _reloadings(self) -> list[_Reloading]:
        found = []
        for settings, certificates in self.certificates.items():
            names = self._settings.listeners_with(settings) if len(self.certificates) > 1 else None
            found.append(_Reloading(certificates, self._settings.cert_reload_interval, names))
        found += [_Reloading(each, self._settings.cert_reload_interval, None) for each in self.credentials.values()]
        return found

    def _forget(self, before: Services, metrics: EdgeMetrics) -> None:
        """Remove the state of backends and certificates that are no longer used from the metrics."""
        present = self.backends.values()
        self._left = [each for each in (*before._left, *before.backends.values()) if each.connections and each not in present]
        for name in before.backends.keys() - self.backends.keys():
            metrics.drop_backend(name)
        kept = [each.files for each in self._reloaders]
        for each in before._reloaders:
            if each.files not in kept:
                metrics.certificates((), each.files)

    def count_clients_in(self, connection_count: ConnectionCount) -> None:
        """Apply the limits to the clients that are counted there."""
        limits: dict[ListenerKey | None, ClientLimits] = {None: self._settings.limits}
        limits |= {key: each.limits for key, each in self._settings.listeners_by_key.items() if each.limits is not None}
        self._limits = {key: Limits(each, connection_count, self._limits.get(key)) for key, each in limits.items()}

    @property
    def backends(self) -> dict[str, Backend]:
        """All backends, by their names."""
        return {backend.name: backend for pool in self._pools.values() for backend in pool.all}

    def backend_connections(self) -> Mapping[str, int]:
        """The connections to each backend, also to those that are no longer named and still have some. In any thread."""
        counts = {name: backend.connections for name, backend in self.backends.items()}
        for backend in self._left:
            if backend.connections:
                counts[backend.name] = counts.get(backend.name, 0) + backend.connections
        return counts

    @property
    def max_clients(self) -> float:
        """How many clients all workers may have together: the largest limit of a listener; infinity if one has none."""
        limits = [each.limits or self._settings.limits for each in self._settings.listeners] or [self._settings.limits]
        return max(math.inf if each.max_clients is None else each.max_clients for each in limits)

    @property
    def credentials(self) -> dict[ClientSettings, Credentials]:
        """The CAs and certificates for TLS backends."""
        found = [backend.destination.tls.credentials for backend in self.backends.values() if backend.destination.tls]
        return {each.settings: each for each in found}

    def resources(self, shared: Shared, listener: ListenerSettings | None = None, key: ListenerKey | None = None) -> Resources:
        """The resources of a listener's connections; None: of a listener without settings of its own."""
        certificates = (listener and listener.certificates) or self._settings.certificates
        backends = (listener and listener.backends) or self._settings.backends
        limits = self._limits.get(key) or self._limits[None]
        return Resources.of(shared, self.certificates[certificates], self._pools[backends], limits)

    def start(self, before: Services | None = None) -> None:
        """Begin health checks and certificate reloads, except those that ``before`` has begun and that continue."""
        if watched := [pool for pool in self._pools.values() if pool.settings.health_interval]:
            self._checks = Checks(*watched)
        for key, reloader in self._reloaders.items():
            if before is None or key not in before._reloaders:
                reloader.start()

    async def first_check(self) -> None:
        """Wait for the first check of the certificates' files; see ``Reloader.first_check``."""
        await asyncio.gather(*(each.first_check() for each in self._reloaders.values()))

    async def close(self, after: Services | None = None) -> None:
        """End health checks and certificate reloads, except those that continue in ``after``, which replaces these services."""
        for key, reloader in self._reloaders.items():
            if after is None or key not in after._reloaders:
                await reloader.close()
        if self._checks is not None:
            await self._checks.close()

    async def reload(self) -> list[str]:
        """Read all certificate files again. Returns a line for each error."""
        complaints = await asyncio.gather(*(each.reload() for each in self._reloaders.values()))
        return list(dict.fromkeys(line for each in complaints for line in each))

    def renew_ticket_keys(self, now: float) -> None:
        """See ``Certificates.renew_ticket_keys``."""
        for each in self.certificates.values():
            each.renew_ticket_keys(now)

    def local_problem(self) -> str | None:
        """Why some listener cannot be served, from memory (certificates, health checks), or None."""
        now = time.time()
        problems = [each.local_problem(now) for each in self.certificates.values()]
        problems += [pool.local_problem() for pool in self._pools.values() if pool.settings.health_interval]
        return next((each for each in problems if each is not None), None)

    def dependency_problem(self) -> str | None:
        """Why some listener has no backend that works, or None. Without health checks it checks now, which may take seconds."""
        problems = pool_problems([each for each in self._pools if not each.health_interval])
        return next((each for each in problems if each is not None), None)
