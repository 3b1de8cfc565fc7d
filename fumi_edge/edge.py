"""The edge: listeners, certificates, backends and metrics, started and stopped together in one event loop."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry

from fumi_core.runtime.acceptor import DescriptorLimit
from fumi_core.runtime.addresses import Networks, SocketAddress, bind, check_inherited, name_of
from fumi_core.runtime.logs import event
from fumi_core.runtime.scoreboard import ConnectionCount, count_of_one_process
from fumi_core.version import VERSION
from fumi_edge.backends.choice import Backend, Backends
from fumi_edge.backends.dialing import Destination, Name
from fumi_edge.backends.health import Checks, Manner, dependency_problems
from fumi_edge.certificate_reload import Reloader
from fumi_edge.connection.limits import Limits, Rate, Rejections
from fumi_edge.connection.listener import Listener
from fumi_edge.connection.tunnel import BUFFER
from fumi_edge.connection.walk import Connection, Service
from fumi_edge.metrics import EdgeMetrics
from fumi_edge.sockets.readiness import HangupWatch
from fumi_edge.tls.certificates import Certificates
from fumi_edge.tls.close_notify import CloseNotify

T = TypeVar("T")
log = logging.getLogger("fumi.edge")

HEARTBEAT = 5.0
"""Seconds between two checks of all connections, for idleness and for the metrics."""
SHORTEST_BEAT = 0.05


class Edge:
    """A TLS proxy in the running event loop: ``await start()``, ``await close()``.

    Times are in seconds. ``proxy_protocol`` is the version sent to backends: v2, v1 or off. ``max_clients``,
    ``max_clients_per_ip`` and ``rate_per_ip``: None means no limit. ``health_interval`` 0 turns health checks off,
    ``health_timeout`` is their time limit for the banner. ``balancers`` are the networks of load balancers, which must send a
    PROXY header; None when clients connect directly. ``socket_mode`` holds the permissions of Unix listeners; None leaves them
    to the umask. Certificate files are checked every ``cert_reload_interval``; with 0 they are read in ``reload()`` only.
    """

    def __init__(
        self,
        *,
        certificates: Certificates,
        backends: Sequence[Destination],
        listen: Sequence[SocketAddress] = (),
        starttls_listen: Sequence[SocketAddress] = (),
        proxy_protocol: str = "v2",
        balance: str = "leastconn",
        health_interval: float = 5.0,
        balancers: Networks | None = None,
        require_tls: bool = False,
        hide_starttls: bool = False,
        handshake_timeout: float = 10.0,
        connect_timeout: float = 5.0,
        health_timeout: float = 10.0,
        idle_timeout: float = 900.0,
        cert_reload_interval: float = 10.0,
        max_clients: int | None = None,
        max_clients_per_ip: int | None = None,
        rate_per_ip: Rate | None = None,
        drain_timeout: float = 30.0,
        metrics: SocketAddress | None = None,
        socket_mode: int | None = None,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self.certificates = certificates
        self.listeners: list[Listener] = []
        self.metrics_sockets: list[socket.socket] = []
        """The listening sockets for the metrics in ``registry``; opened by ``bind()``."""
        self.registry = registry or CollectorRegistry()
        self.drain_timeout = drain_timeout
        self.max_clients = max_clients
        self.metrics = EdgeMetrics(self.registry, certificates.ciphers(), VERSION)
        self._reloader = Reloader(certificates, self.metrics, cert_reload_interval)
        self._reloads: set[asyncio.Task[list[str]]] = set()
        self._service = Service(
            certificates=certificates,
            backends=Backends(backends, connect_timeout, self.metrics, balance),
            limits=Limits(max_clients, max_clients_per_ip, rate_per_ip, time.monotonic),
            rejections=Rejections(self.metrics.rejected),
            metrics=self.metrics,
            hangup_watch=HangupWatch(),
            close_notify=CloseNotify(),
            buffer=memoryview(bytearray(BUFFER)),
            proxy_protocol=proxy_protocol,
            require_tls=require_tls,
            hide_starttls=hide_starttls,
            handshake_timeout=handshake_timeout,
            idle_timeout=idle_timeout,
        )
        self._listen = [(address, False) for address in listen] + [(address, True) for address in starttls_listen]
        self._socket_mode = socket_mode
        self._balancers = balancers
        self._health_interval = health_interval
        self._manner = Manner(proxy_protocol, connect_timeout, health_timeout)
        self._checks: Checks | None = None
        self._metrics_address = metrics
        self._connections: dict[asyncio.Task[None], Connection] = {}
        self._bound: list[tuple[socket.socket, str, bool]] | None = None
        self._connection_count = count_of_one_process()
        self._descriptor_limit = DescriptorLimit(2)
        self._heartbeat: asyncio.TimerHandle | None = None

    def bind(self) -> None:
        """Open all listening sockets. Raises OSError, with the address in its message, and then leaves none open."""
        bound: list[tuple[socket.socket, str, bool]] = []
        metrics = () if self._metrics_address is None else (("serve metrics", self._metrics_address),)
        for purpose, address in (*(("listen", address) for address, _ in self._listen), *metrics):
            _at(purpose, address, check_inherited)
        try:
            for address, starttls in self._listen:
                bound += [(sock, name_of(address, sock), starttls) for sock in _bind("listen", address, self._socket_mode)]
            if self._metrics_address is not None:
                self.metrics_sockets = _bind("serve metrics", self._metrics_address, self._socket_mode)
        except BaseException:
            for sock, _, _ in bound:
                sock.close()
            raise
        self._bound = bound
        for _, name, starttls in bound:
            _announce(name, starttls)
        if self._metrics_address is not None:
            sock = self.metrics_sockets[0]
            event(log, logging.INFO, "serving metrics", port=_port(sock), address=name_of(self._metrics_address, sock))

    def unbind(self) -> None:
        """Close the listening sockets for clients, in a process that does not serve them."""
        for sock, _, _ in self._bound or ():
            sock.close()

    async def start(self, connection_count: ConnectionCount | None = None) -> None:
        """Begin to serve; ``connection_count`` counts the connections, of all workers if there are several.

        Calls ``bind()`` if it was not called before. Raises OSError as ``bind()``.
        """
        if self._bound is None:
            self.bind()
        self.begin(connection_count)
        await self._reloader.first_look()
        for bound in self._bound or ():
            self._serve_at(*bound)

    def begin(self, connection_count: ConnectionCount | None = None) -> None:
        """Start health checks, certificate reloads and the heartbeat; for a caller that adds listeners by ``listen()``."""
        service = self._service
        self._connection_count = service.limits.connection_count = connection_count or self._connection_count
        service.hangup_watch.open(asyncio.get_running_loop())
        service.close_notify.open()
        backends = service.backends
        each = 1 + max(backend.destination.descriptors for backend in backends.all)
        # An upgrade by STARTTLS opens a second connection to a backend while the first one closes.
        self._descriptor_limit = DescriptorLimit(each, lambda: backends.retiring)
        backends.full = lambda: self._descriptor_limit.reached(self._connection_count.connections)
        if self._health_interval:
            self._checks = Checks(service.backends, self._health_interval, self._manner)
        self._reloader.start()
        self._beat()

    def listen(self, sock: socket.socket, name: str, starttls: bool) -> None:
        """Serve the clients of one more listening, non-blocking socket, which the edge takes over."""
        self._serve_at(sock, name, starttls)
        _announce(name, starttls)

    def _serve_at(self, sock: socket.socket, name: str, starttls: bool) -> None:
        service, connection_count, descriptor_limit = self._service, self._connection_count, self._descriptor_limit
        listener = Listener(
            sock,
            name,
            starttls,
            self._balancers,
            service.limits,
            service.rejections,
            self.metrics,
            connection_count,
            descriptor_limit,
            self._serve,
        )
        self.listeners.append(listener)

    @property
    def modes(self) -> Mapping[str, bool]:
        """The names of the bound listeners, and whether their clients begin in plaintext."""
        return {name: starttls for _, name, starttls in self._bound or ()}

    @property
    def backends(self) -> Sequence[Backend]:
        return self._service.backends.all

    def reload(self) -> asyncio.Task[list[str]]:
        """Reload the certificates; connections are unaffected. The task returns a line for each error."""
        task = asyncio.get_running_loop().create_task(self._reloader.reload())
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
            if self._connections:
                event(log, logging.INFO, "draining", connections=len(self._connections))
                await asyncio.wait(self._connections, timeout=self.drain_timeout)
        finally:
            await self._break_off()

    async def _break_off(self) -> None:
        for task in list(self._connections):
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections)
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if self._checks is not None:
            await self._checks.close()
        self._service.rejections.close()
        await self._reloader.close()
        await self._service.backends.close()
        self._service.hangup_watch.close()
        self._service.close_notify.close()

    def _serve(self, listener: Listener, client: socket.socket, source: Name, destination: Name) -> None:
        """Start an accepted connection on its walk."""
        connection = Connection(self._service, listener, client, source, destination)
        task = asyncio.get_running_loop().create_task(connection.run())
        self._connections[task] = connection
        listener.metrics.active.inc()
        self._connection_count.opened()
        task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        connection = self._connections.pop(task)
        connection.listener.metrics.active.dec()
        self._connection_count.closed()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("connection failed", exc_info=error)

    def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self.certificates.renew_ticket_keys(time.time())
        for connection in self._connections.values():
            connection.tick(now)
        self._heartbeat = loop.call_later(max(SHORTEST_BEAT, min(HEARTBEAT, self._service.idle_timeout / 4)), self._beat)

    def local_problem(self) -> str | None:
        """Why this edge cannot serve, from memory (certificates, health checks), or None. May be called in any thread."""
        problem = self.certificates.local_problem(time.time())
        return self._service.backends.local_problem() if problem is None and self._health_interval else problem

    def dependency_problem(self) -> str | None:
        """Why no backend works, or None. Without health checks it checks the backends now, which may take seconds."""
        if self._health_interval:
            return None
        backends = self._service.backends.all
        problems = dependency_problems([backend.destination for backend in backends], self._manner, one=True)
        return None if None in problems else f"backend {backends[-1].name}: {problems[-1]}"


def _announce(name: str, starttls: bool) -> None:
    event(log, logging.INFO, "listening", listener=name, mode="starttls" if starttls else "tls")


def _bind(purpose: str, address: SocketAddress, mode: int | None) -> list[socket.socket]:
    return _at(purpose, address, lambda address: bind(address, mode))


def _at(purpose: str, address: SocketAddress, act: Callable[[SocketAddress], T]) -> T:
    try:
        return act(address)
    except OSError as error:
        raise OSError(error.errno, f"cannot {purpose} on {address}: {error.strerror or error}") from None


def _port(sock: socket.socket) -> int | None:
    name = sock.getsockname()
    return name[1] if isinstance(name, tuple) else None
