"""The walk of one client connection: handshake or STARTTLS, backend, tunnel, and at the end its line in the log.

It goes top to bottom once, in ``Connection._walk``; whatever ends it early raises Ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import socket
import time
from dataclasses import dataclass

from fumi_core.proxy_protocol import TLSInfo
from fumi_core.runtime.logs import event, failure
from fumi_edge.backends import Backend, Backends, Name, NoBackend, header
from fumi_edge.certificates import Certificates, TLSSocket
from fumi_edge.ending import NO_BACKEND, Ended, reset_on_close, take_leave
from fumi_edge.handshake import HandshakeError, handshake
from fumi_edge.listener import Listener
from fumi_edge.metrics import EdgeMetrics
from fumi_edge.preamble import Negotiation
from fumi_edge.readiness import Company
from fumi_edge.starttls import Preamble, Replies, Step, Verdict
from fumi_edge.tunnel import Tunnel

log = logging.getLogger("fumi.edge")

BANNER = 300.0
"""Seconds a backend may take for its banner (RFC 5321 §4.5.3.2.1)."""
_GONE = ("client_closed", "client_reset", "handshake_timeout", "handshake_reset")
"""Ends at which nobody is left to hear last words."""
_BROKEN_OFF = ("client_reset", "idle_timeout", "linger", "shutdown")

_process = ""
_numbers = itertools.count(1)


def _new_prefix() -> None:
    global _process
    _process = secrets.token_hex(5)


_new_prefix()
os.register_at_fork(after_in_child=_new_prefix)


def unique_id() -> str:
    """An id for a connection, short and printable, that no other process gives: UNIQUE_ID, and the id in the logs."""
    return f"{_process}-{next(_numbers):x}"


@dataclass(slots=True)
class Service:
    """What all connections of an edge share. Times are in seconds; ``buffer`` is the tunnels' one."""

    certificates: Certificates
    backends: Backends
    metrics: EdgeMetrics
    buffer: memoryview
    proxy_protocol: str
    require_tls: bool
    hide_starttls: bool
    handshake_timeout: float
    idle_timeout: float


class Connection:
    """One client connection. It owns its sockets and closes them."""

    __slots__ = (
        "_backend",
        "_client",
        "_counted",
        "_destination",
        "_service",
        "_source",
        "_tunnel",
        "_undecided",
        "backend",
        "detail",
        "id",
        "listener",
        "received",
        "sent",
        "started",
        "tls",
    )

    def __init__(self, service: Service, listener: Listener, client: socket.socket, source: Name, destination: Name) -> None:
        self._service = service
        self.listener = listener
        self._client = client
        self._source = source
        self._destination = destination
        self._backend: socket.socket | None = None
        self._tunnel: Tunnel | None = None
        self._undecided = listener.starttls
        self._counted = (0, 0)
        self.id = unique_id()
        self.started = time.monotonic()
        self.backend: Backend | None = None
        self.tls: TLSInfo | None = None
        self.received = self.sent = 0
        self.detail: str | None = None

    async def run(self) -> None:
        """From accept to the log. Raises nothing but CancelledError, when the edge shuts down."""
        reason = "error"
        try:
            reason = await self._walk()
        except Ended as ended:
            reason = ended.reason
            if reason not in _GONE:
                self.sent += len(ended.reply)
                await take_leave(self._client, ended, self._service.idle_timeout)
        except asyncio.CancelledError:
            reason = "shutdown"
            raise
        except Exception as error:
            # A fault of ours costs this connection and no other.
            failure(log, "connection failed", error, id=self.id, client=self._client_name())
        finally:
            self._close(reason)
            self._report(reason)

    async def _walk(self) -> str:
        """The whole way down; returns why the connection ended."""
        upstream = downstream = b""
        if self.listener.starttls:
            await self._connect()
            step = await self._negotiate()
            if step.verdict is Verdict.UPGRADE:
                self._retire()
                await self._handshake()
                await self._connect()
                downstream = await self._swallow_banner()
            else:
                self._decide("plaintext")
                upstream, downstream = step.backend, step.client
                self.received -= len(upstream)  # the tunnel counts it
        else:
            await self._handshake()
            await self._connect()
        return await self._carry(upstream, downstream)

    async def _handshake(self) -> None:
        metrics = self.listener.metrics
        begun = time.monotonic()
        try:
            client = self._client = self._service.certificates.wrap(self._client)
        except OSError:
            metrics.handshakes["reset"].inc()
            raise Ended("handshake_reset") from None
        try:
            self.tls = await handshake(asyncio.get_running_loop(), client, self._service.handshake_timeout)
        except HandshakeError as error:
            metrics.handshakes[error.result].inc()
            self.detail = str(error)
            raise Ended(f"handshake_{error.result}") from None
        if self.listener.starttls:
            self._decide("upgraded")
        metrics.handshakes["ok"].inc()
        self._service.metrics.handshake_seconds.observe(time.monotonic() - begun)
        self._service.metrics.tls_session(self.tls, bool(client.session_reused))

    async def _connect(self) -> None:
        """Connect to a backend, telling it what is known of the client by now."""
        opening = header(self._service.proxy_protocol, self._source, self._destination, self.id, self.tls)
        try:
            self._backend, self.backend = await self._service.backends.connect(opening)
        except NoBackend:
            upgraded = self.listener.starttls and self.tls is not None
            raise Ended("no_backend", NO_BACKEND, when_asked=upgraded) from None

    async def _negotiate(self) -> Step:
        preamble = Preamble(self._service.require_tls, self._service.hide_starttls)
        assert self._backend is not None
        negotiation = Negotiation(self._client, self._backend, preamble, self._service.idle_timeout)
        try:
            return await negotiation.run()
        except Ended as ended:
            if ended.reason in ("injection", "not_smtp", "errors"):
                self._service.metrics.rejected[ended.reason].inc()
            if ended.reason == "injection":
                self._decide("injection")
            elif ended.reason != "not_smtp" and not preamble.refused:
                self._decide("plaintext")
            self._retire()
            raise
        finally:
            self.received, self.sent = negotiation.received, negotiation.sent

    def _decide(self, result: str) -> None:
        """Count, once, what has become of a STARTTLS port's client; whoever gets nowhere was refused."""
        if self._undecided:
            self._undecided = False
            self._service.metrics.starttls[result].inc()

    def _retire(self) -> None:
        """Leave the backend that heard plaintext: it gets QUIT, and nothing of what was said lives on."""
        if self._backend is not None:
            self._service.backends.retire(self._backend)
            self._backend = None

    async def _swallow_banner(self) -> bytes:
        """Read the second banner, which the client is not to see; returns what came behind it."""
        assert self._backend is not None
        assert self.backend is not None
        loop = asyncio.get_running_loop()
        replies = Replies()
        company = Company(loop, self._client)
        banner: bytes | None = None
        try:
            async with asyncio.timeout(min(BANNER, self._service.idle_timeout)):
                while banner is None:
                    await company.readable(self._backend.fileno())
                    data = self._backend.recv(4096)
                    if not data:
                        break
                    banner = replies.feed(data)
        except ConnectionResetError:
            raise Ended("client_reset") from None
        except OSError:
            banner = None
        if banner is not None and banner.startswith(b"220"):
            return replies.rest
        self.backend.metrics.errors["banner"].inc()
        raise Ended("backend_refused", banner or NO_BACKEND, when_asked=True)

    async def _carry(self, upstream: bytes, downstream: bytes) -> str:
        assert self._backend is not None
        loop = asyncio.get_running_loop()
        buffer, idle_timeout = self._service.buffer, self._service.idle_timeout
        tunnel = self._tunnel = Tunnel(loop, buffer, self._client, self._backend, idle_timeout, upstream, downstream)
        try:
            return await tunnel.run()
        finally:
            self.received += tunnel.received
            self.sent += tunnel.sent
            self._tunnel = None

    def tick(self, now: float) -> None:
        """Called now and then while the connection lasts: idleness, and the bytes so far for the metrics."""
        if self._tunnel is not None:
            self._tunnel.tick(now)
            self._count(self.received + self._tunnel.received, self.sent + self._tunnel.sent)

    def _count(self, received: int, sent: int) -> None:
        counted = self._counted
        self._counted = received, sent
        self._service.metrics.moved(received - counted[0], sent - counted[1])

    def _close(self, reason: str) -> None:
        if self._backend is not None:
            if reason in _BROKEN_OFF:
                reset_on_close(self._backend)
            self._backend.close()
        if isinstance(self._client, TLSSocket) and reason in ("idle_timeout", "shutdown"):
            with contextlib.suppress(OSError, ValueError):
                self._client.unwrap()
        if (fd := self._client.fileno()) >= 0:
            # The handshake leaves its reader for the tunnel to replace; left behind, it would deafen the descriptor's next owner.
            asyncio.get_running_loop().remove_reader(fd)
        self._client.close()

    def _report(self, reason: str) -> None:
        seconds = time.monotonic() - self.started
        self._count(self.received, self.sent)
        metrics = self._service.metrics
        metrics.session_seconds.observe(seconds)
        self._decide("refused")
        if log.isEnabledFor(logging.INFO):
            tls = self.tls
            event(
                log, logging.INFO, "connection ended",
                id=self.id, client=self._client_name(), listener=self.listener.name,
                tls=tls and tls.version, cipher=tls and tls.cipher, sni=tls and tls.sni,
                backend=self.backend and self.backend.name, bytes_in=self.received, bytes_out=self.sent,
                seconds=round(seconds, 3), reason=reason, detail=self.detail,
            )  # fmt: skip

    def _client_name(self) -> str:
        if isinstance(self._source, str):
            return "unix"
        host, port = self._source
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
