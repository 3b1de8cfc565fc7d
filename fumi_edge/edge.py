"""The edge: listeners, certificates, backends and metrics, started and stopped together in one event loop."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from prometheus_client import CollectorRegistry

from fumi_core.proxy_protocol import Endpoint
from fumi_core.runtime.acceptor import DescriptorLimit
from fumi_core.runtime.listening import name_of, open_listeners
from fumi_core.runtime.logs import event
from fumi_core.runtime.scoreboard import ConnectionCount, count_of_one_process
from fumi_core.version import VERSION
from fumi_edge.backends.choice import Backend
from fumi_edge.backends.retiring import Retiring
from fumi_edge.connection.direct import DirectCore
from fumi_edge.connection.limits import Rejections
from fumi_edge.connection.listener import Listener
from fumi_edge.connection.policy import ListenerPolicy, ListenerSettings
from fumi_edge.connection.resources import Resources, Shared
from fumi_edge.connection.tunnel import BUFFER_SIZE
from fumi_edge.connection.walk import Connection
from fumi_edge.metrics import EdgeMetrics
from fumi_edge.services import Services
from fumi_edge.settings import EdgeSettings, ListenerKey
from fumi_edge.sockets.readiness import HangupWatch
from fumi_edge.tls.certificates import Certificates
from fumi_edge.tls.close_notify import CloseNotify
from fumi_edge.tls.credentials import ClientSettings, Credentials
from fumi_edge.tls.policy import CertificateSettings
from fumi_edge.tls.read_watch import ReadWatch

log = logging.getLogger("fumi.edge")

HEARTBEAT_SECONDS = 5.0
"""Seconds between two checks of all connections, for idleness and for the metrics."""
SHORTEST_HEARTBEAT_SECONDS = 0.05


class _Bound(NamedTuple):
    sock: socket.socket
    name: str
    key: ListenerKey
    settings: ListenerSettings


class Edge:
    """A TLS proxy in the running event loop: ``await start()``, ``await close()``."""

    def __init__(
        self,
        settings: EdgeSettings,
        certificates: Mapping[CertificateSettings, Certificates],
        registry: CollectorRegistry | None = None,
        direct: DirectCore | None = None,
    ) -> None:
        """``certificates`` has those of the settings, loaded. ``registry`` gets the metrics.

        ``direct`` is a core in this process, which serves the clients over TLS; the backends then get only those without TLS.
        """
        self.settings = settings
        self.listeners: list[Listener] = []
        self.metrics_sockets: list[socket.socket] = []
        """The listening sockets for the metrics in ``registry``; opened by ``bind()``."""
        self.registry = registry or CollectorRegistry()
        metrics, count = EdgeMetrics(self.registry, [], VERSION), count_of_one_process()
        self._services = Services(settings, certificates, metrics, count)
        self._shared = _shared(metrics, count, direct)
        metrics.backend_connections(lambda: self._services.backend_connections())
        metrics.connections_limit(lambda: (self._shared.descriptor_limit.connections, self._services.max_clients))
        self._reloads: set[asyncio.Task[list[str]]] = set()
        self._connections: set[Connection] = set()
        self._all_ended: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop
        self._guard: asyncio.Task[None] | None = None
        self._read_watch = ReadWatch()
        self._bound: list[_Bound] | None = None
        self._heartbeat: asyncio.TimerHandle | None = None
        self._heartbeat_seconds = HEARTBEAT_SECONDS

    def bind(self) -> None:
        """Open all listening sockets. Raises ListenError, and then leaves none open."""
        listeners, metrics = self.settings.listeners_by_key, self.settings.metrics
        opened = open_listeners(self.settings.listen_addresses, self.settings.socket_mode)
        if metrics is not None:
            self.metrics_sockets = opened.pop()
        self._bound = [
            _Bound(sock, name_of(each.address, sock), key, each)
            for (key, each), sockets in zip(listeners.items(), opened, strict=True)
            for sock in sockets
        ]
        for each in self._bound:
            _announce(each.name, each.settings.starttls, each.settings.policy)
        if metrics is not None:
            sock = self.metrics_sockets[0]
            event(log, logging.INFO, "serving metrics", address=name_of(metrics, sock))

    def unbind(self) -> None:
        """Close the listening sockets for clients, in a process that does not serve them."""
        for each in self._bound or ():
            each.sock.close()

    async def start(self, connection_count: ConnectionCount | None = None) -> None:
        """Begin to serve; ``connection_count`` counts the connections, of all workers if there are several.

        Calls ``bind()`` if it was not called before. Raises ListenError as ``bind()``.
        """
        if self._bound is None:
            self.bind()
        self.begin(connection_count)
        await self._services.first_check()
        for sock, name, key, settings in self._bound or ():
            resources = self._services.resources(self._shared, settings, key)
            self._serve_at(resources, sock, name, settings.starttls, settings.policy)

    def begin(self, connection_count: ConnectionCount | None = None) -> None:
        """Start health checks, certificate reloads and the heartbeat; for a caller that adds listeners by ``listen()``."""
        self._loop = asyncio.get_running_loop()
        self._guard = self._loop.create_task(self._cancel_with_the_loop())
        self._shared.hangup_watch.open(self._loop)
        self._shared.close_notify.open()
        self._read_watch.start()
        # Now, since the descriptors that these have opened are not available for clients.
        retiring = self._shared.retiring
        count = connection_count or self._shared.connection_count
        each = 1 + max(backend.destination.descriptors for backend in self._services.backends.values())
        # An upgrade by STARTTLS opens a second connection to a backend while the first one closes.
        limit = DescriptorLimit(each, retiring.__len__)
        retiring.full = lambda: limit.reached(count.connections)
        self._shared = replace(self._shared, connection_count=count, descriptor_limit=limit)
        self._services.count_clients_in(count)
        self._services.start()
        self._beat()

    def listen(self, sock: socket.socket, name: str, starttls: bool, policy: ListenerPolicy) -> None:
        """Serve the clients of one more listening, non-blocking socket, which the edge takes over."""
        self._serve_at(self._services.resources(self._shared), sock, name, starttls, policy)
        _announce(name, starttls, policy)

    def _serve_at(self, resources: Resources, sock: socket.socket, name: str, starttls: bool, policy: ListenerPolicy) -> None:
        self.listeners.append(Listener(resources, sock, name, starttls, policy, self._serve, self._served))
        self._beat_for(policy)

    async def apply(self, settings: EdgeSettings, certificates: Mapping[CertificateSettings, Certificates] | None = None) -> None:
        """Use other settings for the connections that are accepted from now on; open connections keep theirs.

        ``certificates`` has those of the settings, loaded; None if they are the present ones. A listener that is not in the
        settings keeps its own. The addresses and ``socket_mode`` are for the next start.
        Returns when the health checks by the old settings have ended.
        """
        found = settings.listeners_by_key
        # Also for workers that this process forks later.
        self._bound = self._bound and [each._replace(settings=found.get(each.key, each.settings)) for each in self._bound]
        bound = {each.sock: each for each in self._bound or ()}
        # The listeners that are served, which differ from the settings if addresses have changed.
        listeners = settings.listeners if self._bound is None else {each.key: each.settings for each in self._bound}.values()
        served = replace(settings, listeners=tuple(listeners))
        before, loaded = self._services, {**self._services.certificates, **(certificates or {})}
        self.settings = settings
        self._services = Services(served, loaded, self._shared.metrics, self._shared.connection_count, before)
        for unused in loaded.keys() - self._services.certificates.keys():
            loaded[unused].close()
        for listener in self.listeners:
            each = bound.get(listener.sock)
            if each is None:
                listener.use(self._services.resources(self._shared), listener.policy)
            else:
                listener.use(self._services.resources(self._shared, each.settings, each.key), each.settings.policy)
            self._beat_for(listener.policy)
        if self._heartbeat is not None:
            self._services.start(before)
        await before.close(self._services)

    @property
    def bound(self) -> Mapping[str, ListenerSettings]:
        """The bound listeners, by their names."""
        return {each.name: each.settings for each in self._bound or ()}

    @property
    def certificates(self) -> Mapping[CertificateSettings, Certificates]:
        """All certificates in use."""
        return self._services.certificates

    @property
    def is_direct(self) -> bool:
        """Whether a core in this process serves the clients, so that there are no other backends."""
        return self._shared.direct is not None

    @property
    def credentials(self) -> Mapping[ClientSettings, Credentials]:
        """The CAs and certificates for TLS backends."""
        return self._services.credentials

    @property
    def backends(self) -> Mapping[str, Backend]:
        """All backends, by their names."""
        return self._services.backends

    def reload(self) -> asyncio.Task[list[str]]:
        """Reload the certificates; connections are unaffected. The task returns a line for each error."""
        task = asyncio.get_running_loop().create_task(self._services.reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloaded)
        return task

    def _reloaded(self, task: asyncio.Task[list[str]]) -> None:
        self._reloads.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("reload failed", exc_info=error)

    async def close(self) -> None:
        """Stop accepting, wait up to ``drain_timeout`` for connections to end, then close the rest; if cancelled, at once."""
        try:
            await asyncio.gather(*(listener.close() for listener in self.listeners))
            await self._wait_for_connections(self.settings.drain_timeout)
        finally:
            await self._close_connections()

    async def _close_connections(self) -> None:
        self._cancel_connections()
        await self._wait_for_connections(None)
        if self._guard is not None:
            self._guard.cancel()
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        self._shared.rejections.close()
        await self._services.close()
        await self._shared.retiring.close()
        self._shared.hangup_watch.close()
        self._shared.close_notify.close()
        self._read_watch.close()

    def _serve(self, listener: Listener, client: socket.socket, source: Endpoint, destination: Endpoint) -> None:
        """Start an accepted connection on its walk."""
        connection = Connection(self._loop, listener, client, source, destination)
        self._connections.add(connection)
        listener.metrics.active.inc()
        self._shared.connection_count.opened()
        connection.start()

    def _served(self, connection: Connection, error: BaseException | None) -> None:
        self._connections.remove(connection)
        connection.listener.metrics.active.dec()
        self._shared.connection_count.closed()
        if self._all_ended is not None and not self._connections and not self._all_ended.done():
            self._all_ended.set_result(None)
        if error is not None and not isinstance(error, asyncio.CancelledError):
            log.error("connection failed", exc_info=error)

    async def _wait_for_connections(self, seconds: float | None) -> None:
        if self._connections:
            self._all_ended = self._loop.create_future()
            await asyncio.wait([self._all_ended], timeout=seconds)

    def _cancel_connections(self) -> None:
        for connection in list(self._connections):
            connection.cancel()

    async def _cancel_with_the_loop(self) -> None:
        """asyncio.run() cancels all tasks at its end, this one too. It ends what is not a task: connections, and a thread."""
        try:
            await self._loop.create_future()
        except asyncio.CancelledError:
            self._cancel_connections()
            self._read_watch.close()
            raise

    def _beat(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        now = self._loop.time()
        self._services.renew_ticket_keys(time.time())
        for connection in list(self._connections):
            connection.tick(now)
        self._heartbeat = self._loop.call_later(self._heartbeat_seconds, self._beat)

    def _beat_for(self, policy: ListenerPolicy) -> None:
        """Check all connections at least four times in the policy's idle timeout, if possible."""
        seconds = max(SHORTEST_HEARTBEAT_SECONDS, policy.idle_timeout / 4)
        if seconds < self._heartbeat_seconds:
            self._heartbeat_seconds = seconds
            self._beat()

    def local_problem(self) -> str | None:
        """Why some listener cannot be served, from memory (certificates, health checks), or None. May be called in any thread."""
        return self._services.local_problem()

    def dependency_problem(self) -> str | None:
        """Why some listener has no backend that works, or None. Without health checks it checks now, which may take seconds."""
        return None if self._shared.direct is not None else self._services.dependency_problem()


def _shared(metrics: EdgeMetrics, count: ConnectionCount, direct: DirectCore | None) -> Shared:
    return Shared(
        retiring=Retiring(),
        rejections=Rejections(metrics.rejected),
        metrics=metrics,
        hangup_watch=HangupWatch(),
        close_notify=CloseNotify(),
        buffer=memoryview(bytearray(BUFFER_SIZE)),
        connection_count=count,
        descriptor_limit=DescriptorLimit(2),
        direct=direct,
    )


def _announce(name: str, starttls: bool, policy: ListenerPolicy) -> None:
    header = "off" if policy.balancers is None else "required"
    event(log, logging.INFO, "listening", listener=name, mode="starttls" if starttls else "tls", proxy_protocol=header)
