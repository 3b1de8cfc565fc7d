"""Backends: which one, how it has been doing, and the PROXY header that opens every connection (fumi_core.proxy_protocol).

Two things are known of a backend, and it is up when neither speaks against it: whether the last attempt to connect failed, which
every client finds out, and what the health checks (health.py) say. One that is not up is asked only after all the others,
but it is asked: between a check and the next it may have come back.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache

from fumi_core.proxy_protocol import PP2_TYPE_UNIQUE_ID, ProxyHeader, TLSInfo, tls_tlvs
from fumi_core.runtime.logs import event
from fumi_edge.backends.dialing import OURS, Destination, Name, Opening, quit_and_close, reason_of, words_of
from fumi_edge.metrics import BackendMetrics, EdgeMetrics
from fumi_edge.sockets.ending import reset_on_close

log = logging.getLogger("fumi.edge.backends")

BALANCES = ("leastconn", "roundrobin", "first")
"""How one is chosen of those that are up: the fewest connections, each in turn, or the first as they were given."""
AVOID = 5.0
"""Seconds for which a backend that could not be connected to is only asked after the others."""
QUIT_SECONDS = 1.0
"""Seconds that backends which were told QUIT have to close when the edge stops."""
RETIRING = 1024
"""Connections to backends that may be waiting for the backend to close; one more is broken off."""

_NEVER = float("-inf")


class NoBackend(Exception):
    """No backend could be reached; the message is what the last one tried came to."""


def header(version: str, source: Name, destination: Name, unique_id: bytes, tls: TLSInfo | None, resumed: bool = False) -> bytes:
    """The PROXY header for one client connection; ``version`` is v2, v1 or off. Without ``tls`` it has no SSL TLV.

    ``resumed`` says that the TLS session is an earlier connection's, and the client's certificate with it.
    """
    if version == "off":
        return b""
    transport = "UNIX" if isinstance(source, str) else "TCP6" if ":" in source[0] else "TCP4"
    if version == "v1":
        return ProxyHeader(1, "PROXY", transport, source, destination).to_bytes()
    tlvs = (PP2_TYPE_UNIQUE_ID, unique_id), *(_of_tls(tls, resumed) if tls else ())
    return ProxyHeader(2, "PROXY", transport, source, destination, tlvs).to_bytes()


# Most clients of a server have the same version and cipher, and ask for the same name.
_of_tls = lru_cache(256)(tls_tlvs)


def own_opening(version: str) -> Opening:
    """The header of a connection of the edge's own, which stands for no client. ``version`` is v2, v1 or off.

    Version 1 has no word for that but UNKNOWN, which Postfix, Haraka and chasquid reject. So the connection's own addresses are
    sent, as HAProxy's checks do.
    """
    if version == "v1":
        return lambda own, backend: header("v1", own, backend, b"", None)
    return b"" if version == "off" else ProxyHeader(2, "LOCAL").to_bytes()


class Backend:
    """One backend: where it is, how it has been doing, and how many connections to it are open."""

    __slots__ = (
        "_checked",
        "_failed_at",
        "_trouble",
        "_unhealthy",
        "connections",
        "destination",
        "metrics",
        "name",
        "siblings",
        "up",
    )

    def __init__(self, destination: Destination, metrics: BackendMetrics) -> None:
        self.destination = destination
        self.name = destination.name
        self.metrics = metrics
        self.connections = 0
        self.up = True
        self.siblings: Sequence[Backend] = (self,)
        """All backends of the edge, this one included."""
        self._failed_at = _NEVER
        self._checked = self._unhealthy = False
        self._trouble = "not checked yet"
        metrics.up.set(1)

    def usable(self, now: float) -> bool:
        """Whether a client may be sent there: it is up, or might be again."""
        return self.up or (not self._unhealthy and now - self._failed_at >= AVOID)

    @property
    def problem(self) -> str | None:
        """Why the checks do not call it up, or None when they do."""
        return None if self.up and self._checked else f"backend {self.name}: {self._trouble}"

    def trying(self, now: float) -> None:
        """Somebody tries to connect. If it failed before, one attempt is enough: the others stay away until that has ended."""
        if self._failed_at != _NEVER:
            self._failed_at = now

    def connected(self, seconds: float) -> None:
        self.metrics.connect_seconds.observe(seconds)
        if self._failed_at != _NEVER:
            self._failed_at = _NEVER
            self._judge()

    def failed(self, now: float, reason: str, detail: object) -> None:
        """No connection came about. ``reason`` is one of BACKEND_ERRORS."""
        self.metrics.errors[reason].inc()
        self._failed_at = now
        self._judge(reason, detail)

    def healthy(self) -> None:
        """A check went well."""
        self._failed_at, self._checked, self._unhealthy = _NEVER, True, False
        self._judge()

    def unhealthy(self, reason: str, detail: object) -> None:
        """The checks have found that it does not work."""
        self._checked = self._unhealthy = True
        self._judge(reason, detail)

    def undecided(self, detail: str) -> None:
        """A check could not be made, for a reason of our own."""
        self.metrics.errors["other"].inc()
        self._trouble = detail

    def _judge(self, reason: str = "", detail: object = "") -> None:
        self._trouble = str(detail) or self._trouble
        up = not self._unhealthy and self._failed_at == _NEVER
        if up is self.up:
            return
        self.up = up
        self.metrics.up.set(up)
        if up:
            event(log, logging.INFO, "backend up", backend=self.name)
        else:
            left = sum(each.up for each in self.siblings)
            level = logging.WARNING if left else logging.ERROR
            event(log, level, "backend down", backend=self.name, reason=reason, error=detail, backends_up=left)


class Backends:
    """All backends of an edge; ``balance`` is one of BALANCES."""

    def __init__(
        self, destinations: Iterable[Destination], connect_timeout: float, metrics: EdgeMetrics, balance: str = "leastconn"
    ) -> None:
        self.all = [Backend(each, metrics.backend(each.name)) for each in destinations]
        for each in self.all:
            each.siblings = self.all
        self._timeout = connect_timeout
        self._balance = balance
        self._turn = -1
        self._retiring: set[asyncio.Task[bytes]] = set()
        self.full: Callable[[], bool] = lambda: False
        """Returns True when the descriptors that are left are needed for the clients that are here."""

    @property
    def retiring(self) -> int:
        """Connections that wait for their backend to close."""
        return len(self._retiring)

    def problem(self) -> str | None:
        """Why no backend is up, as far as the checks know, or None."""
        problems = [backend.problem for backend in self.all]
        return None if None in problems else problems[-1]

    def candidates(self, now: float, preferred: Backend | None = None) -> Sequence[Backend]:
        """The backends in the order in which to try them. ``preferred`` comes first while it is usable."""
        if len(self.all) == 1:
            return self.all
        usable = [backend for backend in self.all if backend.usable(now)]
        doubtful = [backend for backend in self.all if not backend.usable(now)]
        if preferred in usable:
            usable.sort(key=lambda backend: backend is not preferred)
        elif usable and self._balance != "first":
            turn = self._turn = (self._turn + 1) % len(usable)
            usable = usable[turn:] + usable[:turn]
            if self._balance == "leastconn":
                # Sorting is stable: those that have the same take turns.
                usable.sort(key=lambda backend: backend.connections)
        return usable + doubtful

    async def connect(
        self, opening: Opening, preferred: Backend | None = None, tried: Collection[Backend] = ()
    ) -> tuple[socket.socket, Backend]:
        """A connection on which ``opening``, the PROXY header, has been sent; it counts until ``release()``.

        Raises NoBackend when there is none to be had but those that were ``tried``.
        """
        loop = asyncio.get_running_loop()
        failure = "no banner"
        for backend in self.candidates(loop.time(), preferred):
            if backend not in tried:
                try:
                    return await self._connect(loop, backend, opening), backend
                except OSError as error:
                    failure = words_of(error)
        raise NoBackend(failure)

    async def _connect(self, loop: asyncio.AbstractEventLoop, backend: Backend, opening: Opening) -> socket.socket:
        begun = loop.time()
        backend.trying(begun)
        backend.connections += 1
        sock = None
        try:
            sock = await backend.destination.connect(loop, self._timeout, opening)
        except OSError as error:
            if error.errno in OURS:
                backend.metrics.errors["other"].inc()
            else:
                backend.failed(loop.time(), reason_of(error), words_of(error))
            raise
        finally:
            if sock is None:
                backend.connections -= 1
        backend.connected(loop.time() - begun)
        return sock

    def release(self, backend: Backend) -> None:
        """A connection to it has ended."""
        backend.connections -= 1

    def retire(self, sock: socket.socket) -> None:
        """Take leave of a backend in the background, or without waiting for it where too many are waited for."""
        if len(self._retiring) >= RETIRING or self.full():
            reset_on_close(sock)
            sock.close()
            return
        task = asyncio.get_running_loop().create_task(quit_and_close(sock))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def close(self) -> None:
        """Let those that are taking leave end, for a moment."""
        if self._retiring:
            _, pending = await asyncio.wait(self._retiring, timeout=QUIT_SECONDS)
            for task in pending:
                task.cancel()
