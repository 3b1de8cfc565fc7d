"""Backends: which one a client gets, whether it is up, and the PROXY header that opens a connection (fumi_core.proxy_protocol).

A backend is up unless the last attempt to connect for a client has failed or the health checks (health.py) have failed. A
backend that is down is tried after all the others, but it is tried: it may have recovered since the last check. After a failed
attempt alone, without failed checks, this lasts AVOID_SECONDS.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from time import monotonic, time
from types import MappingProxyType
from typing import NamedTuple

from fumi_core.proxy_protocol import PP2_TYPE_UNIQUE_ID, Endpoint, ProxyHeader, TLSInfo, encode_tlvs, tls_tlvs, v2_header
from fumi_core.runtime.logs import event
from fumi_edge.backends.dialing import LOCAL_ERRORS, Destination, Opening, error_text, reason_of
from fumi_edge.backends.settings import BackendSettings
from fumi_edge.backends.tls import TLSError, explained
from fumi_edge.metrics import BackendError, BackendMetrics, EdgeMetrics

log = logging.getLogger("fumi.edge.backends")

AVOID_SECONDS = 5.0
"""Seconds for which a backend is tried only after the others when a connection to it has failed."""

_NEVER = float("-inf")


class Remark(NamedTuple):
    """The result of a check or connection: its time, in seconds since 1970, and the text of the error, or None."""

    at: float
    error: str | None


class NoBackend(Exception):
    """No backend could be reached; the message is the error of the last attempt."""


def header(
    version: str, source: Endpoint | None, destination: Endpoint, unique_id: bytes, tls: TLSInfo | None, resumed: bool = False
) -> bytes:
    """The PROXY header for one client connection; ``version`` is v2, v1 or off. Without ``tls`` it has no SSL TLV.

    With ``source`` None the header names no client. ``resumed``: the TLS session, and with it the client certificate, is from an
    earlier connection.
    """
    if version == "off":
        return b""
    place = None if source is None else destination
    transport = "UNKNOWN" if source is None else "UNIX" if isinstance(source, str) else "TCP6" if ":" in source[0] else "TCP4"
    if version == "v1":
        return ProxyHeader(1, "PROXY", transport, source, place).to_bytes()
    of_client = encode_tlvs(((PP2_TYPE_UNIQUE_ID, unique_id),))
    return v2_header(transport, source, place, of_client + _of_tls(tls, resumed) if tls else of_client)


@lru_cache(256)
def _of_tls(tls: TLSInfo, resumed: bool) -> bytes:
    """The encoded TLVs. Most clients of a server have the same TLS version and cipher, and request the same name."""
    return encode_tlvs(tls_tlvs(tls, resumed))


def own_opening(version: str) -> Opening:
    """The header of the edge's own connections, such as health checks. ``version`` is v2, v1 or off.

    Version 2 has LOCAL for them. Version 1 has only UNKNOWN, which Postfix, Haraka and chasquid reject; therefore the addresses
    of the connection itself are sent, as HAProxy's checks do.
    """
    if version == "v1":
        return lambda own, backend: header("v1", own, backend, b"", None)
    return b"" if version == "off" else ProxyHeader(2, "LOCAL").to_bytes()


class Backend:
    """One backend: its destination, whether it is up, and the number of its open connections."""

    __slots__ = (
        "_checked",
        "_failed_at",
        "_problem",
        "_unhealthy",
        "changed_at",
        "connections",
        "destination",
        "last_check",
        "last_error",
        "metrics",
        "name",
        "pools",
        "up",
    )

    def __init__(self, destination: Destination, metrics: BackendMetrics) -> None:
        self.destination = destination
        self.name = destination.name
        self.metrics = metrics
        self.connections = 0
        self.up = True
        self.pools: Sequence[Sequence[Backend]] = [[self]]
        """The backends of each Backends that this one is in."""
        self.changed_at: float | None = None
        """When it last went down or came up, in seconds since 1970."""
        self.last_check: Remark | None = None
        """The last check: when, and its error, or None."""
        self.last_error: Remark | None = None
        """The last error of a connection or a check."""
        self._failed_at = _NEVER
        self._checked = self._unhealthy = False
        self._problem = "not checked yet"
        metrics.up.set(1)

    def usable(self, now: float) -> bool:
        """Whether to try it before doubtful ones: it is up, or down only for an attempt that failed AVOID_SECONDS ago or earlier.

        ``now`` is loop time.
        """
        return self.up or (not self._unhealthy and now - self._failed_at >= AVOID_SECONDS)

    def local_problem(self) -> str | None:
        """Why it is down, or that it is not checked yet; None if it is up. From memory."""
        return None if self.up and self._checked else f"backend {self.name}: {self._problem}"

    def trying(self, now: float) -> None:
        """Note an attempt to connect. After a failure only one attempt is made at a time: other clients avoid the backend."""
        if self._failed_at != _NEVER:
            self._failed_at = now

    def connected(self, seconds: float) -> None:
        self.metrics.connect_seconds.observe(seconds)
        if self._failed_at != _NEVER:
            self._failed_at = _NEVER
            self._update_state()

    def count_error(self, reason: BackendError, detail: object) -> None:
        """Count an error of a connection or a check, which alone does not mean that the backend is down."""
        self.metrics.errors[reason].inc()
        self.last_error = Remark(time(), str(detail))

    def failed(self, now: float, reason: BackendError, detail: object) -> None:
        """Note a failed attempt to connect."""
        self.count_error(reason, detail)
        self._failed_at = now
        self._update_state(reason, detail)

    def closed_without_banner(self, sock: socket.socket, error: OSError | None) -> str:
        """Count a connection that was closed before its banner, because of ``error`` if there is one. Returns the reason."""
        failure = None if error is None else explained(sock, error)
        if not isinstance(failure, TLSError):
            self.count_error(BackendError.BANNER, "closed the connection without a banner")
            return "no banner"
        if failure.reason is BackendError.CERTIFICATE:
            # In TLS 1.3 the backend rejects the edge's certificate after the handshake.
            self.failed(monotonic(), failure.reason, failure)
        else:
            self.count_error(failure.reason, failure)
        return str(failure)

    def tls_failure(self, sock: socket.socket, error: OSError) -> str | None:
        """Count the error that has ended a connection, if it is one of TLS, and return its text; otherwise None."""
        failure = explained(sock, error)
        if not isinstance(failure, TLSError):
            return None
        self.count_error(failure.reason, failure)
        return str(failure)

    def healthy(self) -> None:
        """Note a successful check."""
        self._failed_at, self._checked, self._unhealthy = _NEVER, True, False
        self.last_check = Remark(time(), None)
        self._update_state()

    def check_failed(self, reason: BackendError, detail: str) -> None:
        """Note a failed check; after too many, ``unhealthy()`` is called."""
        self.count_error(reason, detail)
        self.last_check = self.last_error

    def unhealthy(self, reason: BackendError, detail: object) -> None:
        """Note that the checks have failed."""
        self._checked = self._unhealthy = True
        self._update_state(reason, detail)

    def unchecked(self) -> None:
        """Note that there are no checks: the results of earlier ones no longer count."""
        self._checked = self._unhealthy = False
        self.last_check = None
        self._update_state()

    def undecided(self, detail: str) -> None:
        """Note that a check could not be made because this process or this host lacks resources."""
        self.check_failed(BackendError.OTHER, detail)
        self._problem = detail

    def _update_state(self, reason: BackendError | None = None, detail: object = "") -> None:
        self._problem = str(detail) or self._problem
        up = not self._unhealthy and self._failed_at == _NEVER
        if up is self.up:
            return
        self.up = up
        self.changed_at = time()
        self.metrics.up.set(up)
        if up:
            event(log, logging.INFO, "backend up", backend=self.name)
        else:
            left = min(sum(each.up for each in pool) for pool in self.pools)
            level = logging.WARNING if left else logging.ERROR
            event(log, level, "backend down", backend=self.name, reason=reason, error=detail, backends_up=left)


class Backends:
    """The backends of one listener or several, and the choice among them for each client."""

    def __init__(self, settings: BackendSettings, metrics: EdgeMetrics, known: Iterable[Backend] = ()) -> None:
        """``known`` are backends that exist already: those with a name that is in the settings are used."""
        self.settings = settings
        found = {each.name: each for each in known}
        self.all: list[Backend] = [
            found.get(each.name) or Backend(each, metrics.backend(each.name)) for each in settings.destinations
        ]
        for backend, destination in zip(self.all, settings.destinations, strict=True):
            if backend.destination != destination:
                backend.destination = destination
            if not settings.health_interval:
                backend.unchecked()
            backend.pools = [self.all]
        self._turn = -1

    def local_problem(self) -> str | None:
        """Why no backend is up according to the last checks, with the reason of each; None if one is up."""
        problems = [problem for backend in self.all if (problem := backend.local_problem()) is not None]
        return "; ".join(problems) if len(problems) == len(self.all) else None

    def candidates(self, now: float, preferred: Backend | None = None) -> Sequence[Backend]:
        """The backends in the order in which to try them. ``preferred`` comes first while it is usable."""
        if len(self.all) == 1:
            return self.all
        usable = [backend for backend in self.all if backend.usable(now)]
        doubtful = [backend for backend in self.all if not backend.usable(now)]
        if preferred in usable:
            usable.sort(key=lambda backend: backend is not preferred)
        elif usable and self.settings.balance != "first":
            turn = self._turn = (self._turn + 1) % len(usable)
            usable = usable[turn:] + usable[:turn]
            if self.settings.balance == "leastconn":
                # Sorting is stable: backends with equally many connections take turns.
                usable.sort(key=lambda backend: backend.connections)
        return usable + doubtful

    async def connect(
        self, opening: Opening, preferred: Backend | None = None, tried: Mapping[Backend, str] = MappingProxyType({})
    ) -> tuple[socket.socket, Backend]:
        """Return a connection on which ``opening``, the PROXY header, has been sent. It is counted until ``release()``.

        Backends in ``tried`` are skipped; they have failed for the reasons there. Raises NoBackend when no other can be
        connected to.
        """
        loop = asyncio.get_running_loop()
        failure = list(tried.values())[-1] if tried else ""
        for backend in self.candidates(monotonic(), preferred):
            if backend not in tried:
                try:
                    return await self._connect(loop, backend, opening), backend
                except OSError as error:
                    failure = error_text(error)
        raise NoBackend(failure)

    async def _connect(self, loop: asyncio.AbstractEventLoop, backend: Backend, opening: Opening) -> socket.socket:
        begun = monotonic()
        backend.trying(begun)
        backend.connections += 1
        sock = None
        try:
            sock = await backend.destination.connect(loop, self.settings.connect_timeout, opening)
        except OSError as error:
            if error.errno in LOCAL_ERRORS:
                backend.count_error(BackendError.OTHER, error_text(error))
            else:
                backend.failed(monotonic(), reason_of(error), error_text(error))
            raise
        finally:
            if sock is None:
                backend.connections -= 1
        backend.connected(monotonic() - begun)
        return sock

    def release(self, backend: Backend) -> None:
        """Count the end of a connection to this backend."""
        backend.connections -= 1
