"""The walk of one client connection: handshake or STARTTLS, backend, tunnel, and finally its line in the log.

``Connection._walk`` goes through these steps once, in this order. A step that ends the connection early raises Ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fumi_core.proxy_protocol import TLSInfo, unique_id_text
from fumi_core.runtime.logs import event, failure
from fumi_edge.backends.choice import Backend, NoBackend, header, own_opening
from fumi_edge.backends.dialing import Name, Opening
from fumi_edge.backends.replies import Replies
from fumi_edge.connection.inbound import HeaderError, receive_client
from fumi_edge.connection.listener import Listener
from fumi_edge.connection.negotiation import Negotiation
from fumi_edge.connection.starttls import Preamble, Step, Verdict
from fumi_edge.connection.tunnel import Tunnel
from fumi_edge.metrics import LIMITS
from fumi_edge.sockets.ending import NO_BACKEND, TOO_MANY_CLIENTS, Ended, NoBanner, reset_on_close, take_leave
from fumi_edge.sockets.readiness import received_since
from fumi_edge.tls.handshake import HandshakeError, handshake
from fumi_edge.tls.policy import TLSSocket

log = logging.getLogger("fumi.edge")

BANNER = 300.0
"""Seconds in which a backend must send its banner (RFC 5321 §4.5.3.2.1)."""
_GONE = ("client_closed", "client_reset", "handshake_timeout", "handshake_reset", "proxy_header", *LIMITS)
"""Ends without a reply after which the connection is closed at once: the client is gone, or must not cost any more time."""
_SILENCES = ("client_closed", "client_reset", "idle_timeout", "handshake_timeout", "handshake_reset")
"""Ends that, if the client has sent no bytes, mean a check of the port."""
_BROKEN_OFF = ("client_reset", "idle_timeout", "linger", "shutdown")

T = TypeVar("T")

_process = ""
_numbers = itertools.count(1)


def _new_prefix() -> None:
    global _process
    _process = secrets.token_hex(5)


_new_prefix()
os.register_at_fork(after_in_child=_new_prefix)


def unique_id() -> str:
    """A short, printable id for a connection, unique over all processes: the UNIQUE_ID TLV, and the id in the logs."""
    return f"{_process}-{next(_numbers):x}"


class Connection:
    """One client connection. It owns its sockets and closes them."""

    __slots__ = (
        "_backend",
        "_before",
        "_client",
        "_counted",
        "_destination",
        "_level",
        "_local",
        "_negotiation",
        "_policy",
        "_resources",
        "_resumed",
        "_source",
        "_tunnel",
        "_undecided",
        "_unique_id",
        "_unnamed",
        "admitted",
        "backend",
        "detail",
        "id",
        "listener",
        "received",
        "sent",
        "started",
        "tls",
    )

    def __init__(self, listener: Listener, client: socket.socket, source: Name, destination: Name) -> None:
        self._resources = listener.resources
        self._policy = listener.policy
        self.listener = listener
        self._client = client
        self._source = source
        self._destination = destination
        self._backend: socket.socket | None = None
        self._negotiation: Negotiation | None = None
        self._tunnel: Tunnel | None = None
        self._undecided = listener.starttls
        self._counted = (0, 0)
        self._level = logging.INFO
        self._local = False
        self._unnamed = False
        self._before = 0
        self._resumed = False
        self.id = unique_id()
        self._unique_id = self.id.encode("ascii")
        self.admitted = self._host() if self._policy.balancers is None else None
        """The address for which the limits count the client; None while it is not known."""
        self.started = time.monotonic()
        self.backend: Backend | None = None
        self.tls: TLSInfo | None = None
        self.received = self.sent = 0
        self.detail: str | None = None

    async def run(self) -> None:
        """Serve the client, from accept to the line in the log. Raises only CancelledError, when the edge shuts down."""
        reason = "error"
        try:
            reason = await self._walk()
        except Ended as ended:
            reason = ended.reason
            if ended.reply or reason not in _GONE:
                self.sent += len(ended.reply)
                await take_leave(self._client, ended, self._policy.idle_timeout)
        except asyncio.CancelledError:
            reason = "shutdown"
            raise
        except Exception as error:
            # A programming error ends this connection and no other.
            failure(log, "connection failed", error, id=self.id, client_ip=self._host())
        finally:
            self._close(reason)
            self._report(reason)

    async def _walk(self) -> str:
        """Go through all steps. Returns why the connection ended."""
        if self._policy.balancers is not None:
            await self._identify()
        if not self.listener.starttls:
            await self._handshake()
            return await self._with_backend(self._carry_from_the_start)
        step = await self._with_backend(self._negotiate)
        if step.verdict is Verdict.UPGRADE:
            self._retire()
            await self._handshake()
            return await self._carry(b"", await self._with_backend(self._swallow_banner))
        self._decide("plaintext")
        self.received -= len(step.backend)  # the tunnel counts it
        return await self._carry(step.backend, step.client)

    async def _identify(self) -> None:
        """Read the client's address from the load balancer's header, and apply the limits for that address."""
        try:
            client = await receive_client(asyncio.get_running_loop(), self._client)
        except HeaderError as error:
            self.detail = str(error)
            if error.silent:
                # The load balancer only checks the port.
                self._level = logging.DEBUG
                self._unnamed = True
                raise Ended("client_closed") from None
            self._resources.metrics.rejected["proxy_header"].inc()
            raise Ended("proxy_header") from None
        self._before = client.length
        its_own = client.source in (None, self._source)
        self._source = client.source if client.source is not None else self._source
        self._destination = client.destination if client.destination is not None else self._destination
        if client.unique_id:
            self._unique_id = client.unique_id
            self.id = unique_id_text(client.unique_id)
        if client.local:
            self._local = True
            self._level = logging.DEBUG
        if its_own:
            # The load balancer's own connection, which version 1 cannot mark as such: there is no client to limit.
            self._unnamed = True
            return
        reason = self._resources.limits.admit(self._host())
        if reason is not None:
            self._resources.rejections.add(reason, self._host(), self.listener.name)
            self._level = logging.DEBUG
            raise Ended(reason, TOO_MANY_CLIENTS if self.listener.starttls else b"")
        self.admitted = self._host()

    async def _handshake(self) -> None:
        metrics = self.listener.metrics
        begun = time.monotonic()
        try:
            client = self._client = self._resources.certificates.wrap(self._client)
        except OSError as error:
            # An SSLError means that the client has sent bytes, which are unread.
            if isinstance(error, ssl.SSLError) or self.listener.starttls:
                metrics.handshakes["reset"].inc()
            else:
                self._probed()
            raise Ended("handshake_reset") from None
        try:
            self.tls = await handshake(asyncio.get_running_loop(), client, self._policy.handshake_timeout)
        except HandshakeError as error:
            reason = f"handshake_{error.result}"
            self.detail = str(error)
            if reason in _SILENCES and not received_since(client, self._before):
                self._probed()
            else:
                metrics.handshakes[error.result].inc()
            raise Ended(reason) from None
        self._resumed = bool(client.session_reused)
        if self.listener.starttls:
            self._decide("upgraded")
        metrics.handshakes["ok"].inc()
        self._resources.metrics.handshake_seconds.observe(time.monotonic() - begun)
        self._resources.metrics.tls_session(self.tls, self._resumed)

    async def _with_backend(self, talk: Callable[[], Awaitable[T]]) -> T:
        """Connect and ``talk()``. If the backend closes before its banner, try the next one; the client notices nothing."""
        silent: list[Backend] = []
        while True:
            backend = await self._connect(silent)
            try:
                return await talk()
            except NoBanner:
                backend.metrics.errors["banner"].inc()
                silent.append(backend)
                self._leave_backend()

    async def _connect(self, silent: list[Backend]) -> Backend:
        """Connect to a backend, if possible to the same as before, with a header that holds all that is known of the client."""
        version = self._resources.backends.settings.proxy_protocol
        opening: Opening = header(version, self._source, self._destination, self._unique_id, self.tls, self._resumed)
        if self._local:
            # A load balancer's own check is passed on to the backend as such.
            opening = own_opening(version)
        try:
            self._backend, self.backend = await self._resources.backends.connect(opening, self.backend, silent)
            return self.backend
        except NoBackend as error:
            self.detail = str(error)
            upgraded = self.listener.starttls and self.tls is not None
            raise Ended("no_backend", NO_BACKEND, when_asked=upgraded) from None

    async def _negotiate(self) -> Step:
        preamble = Preamble(self._policy.require_tls, self._policy.hide_starttls)
        assert self._backend is not None
        hangup_watch, idle_timeout = self._resources.hangup_watch, self._policy.idle_timeout
        negotiation = self._negotiation = Negotiation(self._client, self._backend, preamble, hangup_watch, idle_timeout)
        try:
            return await negotiation.run()
        except Ended as ended:
            if ended.reason in ("injection", "not_smtp", "errors"):
                self._resources.metrics.rejected[ended.reason].inc()
            if ended.reason == "injection":
                self._decide("injection")
            elif ended.reason in _SILENCES and not negotiation.received and not received_since(self._client, self._before):
                self._probed()
            elif ended.reason != "not_smtp" and not preamble.refused:
                self._decide("plaintext")
            if preamble.in_content:
                # The backend would read a QUIT as a part of the message, and it might complete the message.
                self._leave_backend()
            else:
                self._retire()
            raise
        finally:
            self.received, self.sent = negotiation.received, negotiation.sent
            self._negotiation = None

    def _decide(self, result: str) -> None:
        """Count the result of a STARTTLS port's client, once. The result of a client that gets nowhere is "refused".

        A load balancer's check, which never upgrades, is not counted as plaintext or refused.
        """
        if self._undecided:
            self._undecided = False
            if self._unnamed and result in ("plaintext", "refused"):
                return
            self._resources.metrics.starttls[result].inc()

    def _probed(self) -> None:
        """Treat a connection without a byte from the client as a check of the port: logged at level debug, not as refused."""
        self._level = logging.DEBUG
        self._undecided = False

    def _retire(self) -> None:
        """End the backend connection that carried plaintext: the backend gets QUIT, and no SMTP state survives."""
        if self._backend is not None:
            self._resources.retiring.retire(self._backend)
            self._leave_backend(close=False)

    def _leave_backend(self, close: bool = True) -> None:
        if self._backend is not None and self.backend is not None:
            if close:
                self._backend.close()
            self._backend = None
            self._resources.backends.release(self.backend)

    async def _swallow_banner(self) -> bytes:
        """Read the second banner, which the client must not get. Returns the bytes after it. Raises NoBanner or Ended."""
        assert self.backend is not None
        replies = Replies()
        banner: bytes | None = None
        # A backend that sends no banner in time counts as a refusal too.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(BANNER, self._policy.idle_timeout)):
                while banner is None and (data := await self._backend_said()):
                    banner = replies.feed(data)
                if banner is None and not replies.rest:
                    raise NoBanner
        if banner is not None and banner.startswith(b"220"):
            return replies.rest
        self.backend.metrics.errors["banner"].inc()
        self._retire()
        self.detail = (banner or b"no banner in time").decode("ascii", "replace").strip()
        raise Ended("backend_refused", banner or NO_BACKEND, when_asked=True)

    async def _backend_said(self) -> bytes:
        assert self._backend is not None
        while True:
            try:
                await self._resources.hangup_watch.readable(self._client, self._backend)
            except ConnectionResetError:
                raise Ended("client_reset") from None
            try:
                return self._backend.recv(4096)
            except BlockingIOError:
                continue
            except OSError:
                return b""

    async def _carry_from_the_start(self) -> str:
        return await self._carry(b"", b"", expectant=True)

    async def _carry(self, upstream: bytes, downstream: bytes, expectant: bool = False) -> str:
        assert self._backend is not None
        loop = asyncio.get_running_loop()
        resources = self._resources
        tunnel = Tunnel(
            loop, resources.buffer, resources.close_notify, self._client, self._backend, self._policy.idle_timeout,
            upstream, downstream, expectant,
        )  # fmt: skip
        self._tunnel = tunnel
        try:
            reason = await tunnel.run()
            if reason == "no_banner":
                raise NoBanner
            if reason == "no_answer":
                raise Ended("backend_closed", NO_BACKEND)
            return reason
        finally:
            self.received += tunnel.received
            self.sent += tunnel.sent
            self._tunnel = None

    def tick(self, now: float) -> None:
        """Check for idleness and add the bytes so far to the metrics. The edge calls it every few seconds; ``now`` in seconds."""
        if self._negotiation is not None:
            self._count(self._negotiation.received, self._negotiation.sent)
        if self._tunnel is not None:
            self._tunnel.tick(now)
            self._count(self.received + self._tunnel.received, self.sent + self._tunnel.sent)

    def _count(self, received: int, sent: int) -> None:
        counted = self._counted
        self._counted = received, sent
        self._resources.metrics.moved(received - counted[0], sent - counted[1])

    def _close(self, reason: str) -> None:
        # First, so that a client that sees the close can connect again at once.
        self._resources.limits.leave(self.admitted)
        if self._backend is not None:
            if reason in _BROKEN_OFF:
                reset_on_close(self._backend)
            self._leave_backend()
        if isinstance(self._client, TLSSocket) and reason in ("idle_timeout", "shutdown"):
            with contextlib.suppress(OSError, ValueError):
                self._client.unwrap()
        if (fd := self._client.fileno()) >= 0:
            # The handshake leaves its reader registered for the tunnel to replace. If it stayed registered after the close, the
            # next connection with this descriptor would not be watched.
            asyncio.get_running_loop().remove_reader(fd)
        self._client.close()

    def _report(self, reason: str) -> None:
        seconds = time.monotonic() - self.started
        self._count(self.received, self.sent)
        metrics = self._resources.metrics
        metrics.session_seconds.observe(seconds)
        self._decide("refused")
        if self._unnamed and self.tls is None and not self.received:
            self._level = logging.DEBUG  # a load balancer's check
        if log.isEnabledFor(self._level):
            tls = self.tls
            # The requested name is logged even if the handshake failed: that is when it is needed most.
            sni = self._client.server_name if isinstance(self._client, TLSSocket) else None
            event(
                log, self._level, "connection ended",
                id=self.id, client_ip=self._host(), client_port=self._port(), listener=self.listener.name,
                tls=tls and tls.version, cipher=tls and tls.cipher, sni=sni,
                backend=self.backend and self.backend.name, bytes_in=self.received, bytes_out=self.sent,
                seconds=round(seconds, 3), reason=reason, error=self.detail,
            )  # fmt: skip

    def _host(self) -> str:
        return "unix" if isinstance(self._source, str) else self._source[0]

    def _port(self) -> int | None:
        return None if isinstance(self._source, str) else self._source[1]
