"""The walk of one client connection: handshake or STARTTLS, backend, tunnel, and finally its line in the log.

``Connection._walk`` goes through these steps once, in this order. A step that ends the connection early raises Ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from fumi_core.proxy_protocol import Endpoint, TLSInfo, unique_id_text
from fumi_core.runtime.logs import event, failure
from fumi_core.runtime.taskless import Pause, Walk, in_task
from fumi_edge.backends.choice import Backend, NoBackend, header, own_opening
from fumi_edge.backends.dialing import Opening
from fumi_edge.connection.direct import DirectClient, DirectCore
from fumi_edge.connection.ends import CLOSE_AT_ONCE, INCOMPLETE, SILENCES, End, Ended, NoBanner
from fumi_edge.connection.ids import unique_id
from fumi_edge.connection.inbound import HeaderError, receive_client
from fumi_edge.connection.listener import Listener
from fumi_edge.connection.negotiation import Negotiation
from fumi_edge.connection.role import Role
from fumi_edge.connection.second_banner import BackendRefuses, second_banner
from fumi_edge.connection.starttls import Preamble, Step, Verdict
from fumi_edge.connection.tunnel import Tunnel
from fumi_edge.metrics import BackendError, RejectReason, StarttlsResult
from fumi_edge.sockets.ending import NO_BACKEND, TOO_MANY_CLIENTS, reset_on_close, send_last_reply
from fumi_edge.sockets.readiness import received_since
from fumi_edge.tls.handshake import Handshake, HandshakeError, HandshakeResult, session, text_of
from fumi_edge.tls.policy import TLSSocket
from fumi_edge.tls.transport import TLSTransport, TransportEnd, TransportOwner

log = logging.getLogger("fumi.edge")

_REJECTED = {
    End.INJECTION: RejectReason.INJECTION,
    End.NOT_SMTP: RejectReason.NOT_SMTP,
    End.ERRORS: RejectReason.ERRORS,
}

T = TypeVar("T")


class Connection(Walk):
    """The walk of one client connection. It owns its sockets and closes them."""

    __slots__ = (
        "_backend",
        "_balancer",
        "_before",
        "_client",
        "_counted",
        "_destination",
        "_handshake_deadlines",
        "_host",
        "_loop",
        "_negotiation",
        "_policy",
        "_reader_left",
        "_resources",
        "_resumed",
        "_role",
        "_source",
        "_tunnel",
        "_undecided",
        "_unique_id",
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

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listener: Listener,
        client: socket.socket,
        source: Endpoint,
        destination: Endpoint,
    ) -> None:
        super().__init__(self._run())
        self._loop = loop
        self._resources = listener.resources
        self._policy = listener.policy
        self._handshake_deadlines = listener.handshake_deadlines
        self.listener = listener
        self._client = client
        self._source = source
        self._host = _host_of(source)
        self._destination = destination
        self._balancer: Endpoint | None = None
        self._backend: socket.socket | None = None
        self._negotiation: Negotiation | None = None
        self._reader_left = False
        """Whether the handshake's reader is registered, which the tunnel or transport then replaces, and removes."""
        self._tunnel: Tunnel | TLSTransport | None = None
        self._undecided = listener.starttls
        self._counted = (0, 0)
        self._role = Role.CLIENT
        self._before = 0
        self._resumed = False
        self.id = unique_id()
        self._unique_id = b""
        """The load balancer's address, if there is one."""
        self.admitted = self._host if self._policy.balancers is None else None
        """The address for which the limits count the client; None while it is not known."""
        self.started = time.monotonic()
        self.backend: Backend | None = None
        self.tls: TLSInfo | None = None
        self.received = self.sent = 0
        self.detail: str | None = None

    def ended(self, error: BaseException | None) -> None:
        self.listener.served(self, error)

    async def _run(self) -> None:
        """Serve the client, from accept to the line in the log. Raises only CancelledError, at the edge's stop."""
        reason = End.ERROR
        try:
            reason = await self._walk()
        except Ended as ended:
            reason = ended.reason
            if ended.reply or reason not in CLOSE_AT_ONCE:
                self.sent += len(ended.reply)
                command_timeout = self._policy.idle_timeout if ended.after_command else None
                await in_task(send_last_reply(self._client, ended.reply, command_timeout))
        except asyncio.CancelledError:
            reason = End.SHUTDOWN
            raise
        except Exception as error:
            # A programming error ends this connection and no other.
            failure(log, "connection failed", error, id=self.id, client_ip=self._host, client_port=self._port)
        finally:
            self._close(reason)
            self._report(reason)

    async def _walk(self) -> End:
        """Go through all steps. Returns why the connection ended."""
        if self._policy.balancers is not None:
            await self._identify()
        if self.listener.starttls:
            step = await self._with_backend(self._negotiate)
            if step.verdict is not Verdict.UPGRADE:
                self._decide(StarttlsResult.PLAINTEXT)
                self.received -= len(step.backend)  # the tunnel counts it
                return await self._carry(step.backend, step.client, expectant=False)
            self._retire()
        await self._handshake()
        if self._resources.direct is not None:
            return await self._serve_directly(self._resources.direct)
        if self.listener.starttls:
            return await self._carry(b"", await self._with_backend(self._skip_second_banner), expectant=False)
        return await self._with_backend(self._carry)

    async def _identify(self) -> None:
        """Read the client's address from the load balancer's header, and apply the limits for that address."""
        try:
            client = await in_task(receive_client(self._loop, self._client))
        except HeaderError as error:
            self.detail = str(error)
            if error.silent:
                self._role = Role.PORT_CHECK
                raise Ended(End.CLIENT_CLOSED) from None
            self._resources.rejections.count(RejectReason.PROXY_HEADER, self._host, self.listener.name)
            raise Ended(End.PROXY_HEADER) from None
        self._before = client.length
        self._balancer = self._source
        its_own = client.source in (None, self._source)
        self._source = client.source if client.source is not None else self._source
        self._host = _host_of(self._source)
        self._destination = client.destination if client.destination is not None else self._destination
        if client.unique_id:
            self._unique_id = client.unique_id
            self.id = unique_id_text(client.unique_id)
        if its_own:
            # There is no client to limit. Version 1 of the PROXY protocol has no LOCAL.
            self._role = Role.BALANCER_CHECK if client.local else Role.BALANCER
            return
        reason = self._resources.limits.admit(self._host)
        if reason is not None:
            self._resources.rejections.add(reason, self._host, self.listener.name)
            self._role = Role.REJECTED
            raise Ended(End(reason), TOO_MANY_CLIENTS if self.listener.starttls else b"")
        self.admitted = self._host

    async def _handshake(self) -> None:
        metrics = self.listener.metrics
        begun = time.monotonic()
        try:
            client = self._client = self._resources.certificates.wrap(self._client)
        except OSError as error:
            # An SSLError means that the client has sent bytes, which are unread.
            if isinstance(error, ssl.SSLError) or self.listener.starttls:
                metrics.handshakes[HandshakeResult.RESET].inc()
            else:
                self._role = Role.PORT_CHECK
            raise Ended(End.HANDSHAKE_RESET) from None
        handshake = Handshake(self._loop, client, self._handshake_deadlines, begun)
        try:
            await handshake
            self.tls, self._resumed = session(client, self._resources.certificates.policy, handshake.hello or b"")
        except HandshakeError as error:
            reason = End(f"handshake_{error.result}")
            self.detail = str(error)
            if reason in SILENCES and not received_since(client, self._before):
                self._role = Role.PORT_CHECK
            else:
                metrics.handshakes[error.result].inc()
            raise Ended(reason) from None
        finally:
            handshake.close()
            self._reader_left = handshake.done
        if self.listener.starttls:
            self._decide(StarttlsResult.UPGRADED)
        metrics.handshakes[HandshakeResult.OK].inc()
        self._resources.metrics.handshake_seconds.observe(time.monotonic() - begun)
        self._resources.metrics.tls_session(self.tls, self._resumed)

    async def _with_backend(self, talk: Callable[[], Awaitable[T]]) -> T:
        """Connect and ``talk()``. If the backend closes before its banner, try another one; the client notices nothing.

        The next address of its name comes before other backends.
        """
        silent: dict[Backend, str] = {}
        while True:
            backend = await self._connect(silent)
            try:
                return await talk()
            except NoBanner as silence:
                assert self._backend is not None
                reason = backend.closed_without_banner(self._backend, silence.error)
                if not backend.destination.avoid(self._backend):
                    silent[backend] = reason
                self._leave_backend()

    async def _connect(self, silent: Mapping[Backend, str]) -> Backend:
        """Connect to a backend, if possible to the same as before, with a header that holds all that is known of the client."""
        version = self._resources.backends.settings.proxy_protocol
        # The core in this process must not take an unnamed client for the load balancer, which it may trust. Other servers get
        # the load balancer's address, since Postfix, for one, rejects a header without any.
        unnamed = self._role is Role.BALANCER and self._resources.direct is not None
        source = None if unnamed else self._source
        unique_id = self._unique_id or self.id.encode("ascii")
        opening: Opening = header(version, source, self._destination, unique_id, self.tls, self._resumed)
        if self._role is Role.BALANCER_CHECK:
            # A load balancer's own check is passed on to the backend as such.
            opening = own_opening(version)
        try:
            self._backend, self.backend = await self._resources.backends.connect(opening, self.backend, silent)
            return self.backend
        except NoBackend as error:
            self.detail = str(error)
            upgraded = self.listener.starttls and self.tls is not None
            raise Ended(End.NO_BACKEND, NO_BACKEND, after_command=upgraded) from None

    async def _negotiate(self) -> Step:
        preamble = Preamble(self._policy.require_tls, self._policy.hide_starttls)
        assert self._backend is not None
        hangup_watch, idle_timeout = self._resources.hangup_watch, self._policy.idle_timeout
        negotiation = self._negotiation = Negotiation(self._client, self._backend, preamble, hangup_watch, idle_timeout)
        try:
            return await in_task(negotiation.run())
        except Ended as ended:
            if negotiation.failure is not None:
                self._backend_failed(negotiation.failure)
            if ended.reason in _REJECTED:
                self._resources.rejections.count(_REJECTED[ended.reason], self._host, self.listener.name)
            if ended.reason is End.INJECTION:
                self._decide(StarttlsResult.INJECTION)
            elif ended.reason in SILENCES and not negotiation.received and not received_since(self._client, self._before):
                self._role = Role.PORT_CHECK
            elif ended.reason is not End.NOT_SMTP and not preamble.refused:
                self._decide(StarttlsResult.PLAINTEXT)
            if preamble.in_content:
                # The backend would read QUIT as a part of the message, which its bytes might complete.
                self._leave_backend()
            else:
                self._retire()
            raise
        finally:
            self.received, self.sent = negotiation.received, negotiation.sent
            self._negotiation = None

    def _backend_failed(self, error: OSError) -> None:
        """Count and log an error of the backend's TLS, if the error is one."""
        assert self._backend is not None
        assert self.backend is not None
        failure = self.backend.tls_failure(self._backend, error)
        if failure is not None:
            self.detail = f"backend: {failure}"

    def _decide(self, result: StarttlsResult) -> None:
        """Count the result of a STARTTLS port's client, once."""
        if self._undecided:
            self._undecided = False
            if self._role.counts(result):
                self._resources.metrics.starttls[result].inc()

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

    async def _skip_second_banner(self) -> bytes:
        """Read the second banner, which the client must not get. Returns the bytes after it. Raises NoBanner or Ended."""
        assert self._backend is not None
        assert self.backend is not None
        hangup_watch, idle_timeout = self._resources.hangup_watch, self._policy.idle_timeout
        try:
            return await in_task(second_banner(self._client, self._backend, hangup_watch, idle_timeout))
        except BackendRefuses as refusal:
            self.detail = str(refusal)
            self.backend.count_error(BackendError.BANNER, refusal.summary)
            self._retire()
            raise Ended(End.BACKEND_REFUSED, refusal.reply or NO_BACKEND, after_command=True) from None

    async def _carry(self, upstream: bytes = b"", downstream: bytes = b"", expectant: bool = True) -> End:
        """Carry bytes until one side ends; the arguments are the Tunnel's. Returns why it ended. Raises NoBanner or Ended."""
        assert self._backend is not None
        resources = self._resources
        tunnel = Tunnel(
            self._loop, resources.buffer, resources.close_notify, self._client, self._backend, self._policy.idle_timeout,
            upstream, downstream, expectant,
        )  # fmt: skip
        self._tunnel = tunnel
        self._reader_left = False
        try:
            reason = await tunnel.run()
            if tunnel.unanswered and not tunnel.received:
                raise NoBanner(tunnel.failure)
            if tunnel.failure is not None:
                self._backend_failed(tunnel.failure)
            elif tunnel.client_failure is not None:
                self.detail = text_of(tunnel.client_failure)
            if not tunnel.unanswered:
                return reason
            # A client that has sent bytes cannot be moved to another backend, but can get a 421.
            raise Ended(reason, NO_BACKEND)
        finally:
            self.received += tunnel.received
            self.sent += tunnel.sent
            self._tunnel = None

    async def _serve_directly(self, core: DirectCore) -> End:
        finished: Pause[TransportEnd] = Pause()
        end = self._begin_dialogue(core, finished)
        transport = self._tunnel
        assert isinstance(transport, TLSTransport)
        try:
            return End(await finished)
        except asyncio.CancelledError:
            end()
            raise
        finally:
            transport.abort()
            if transport.failure is not None:
                self.detail = text_of(transport.failure)
            self.received += transport.received
            self.sent += transport.sent
            self._tunnel = None

    def _begin_dialogue(self, core: DirectCore, finished: Pause[TransportEnd]) -> Callable[[], None]:
        """Give the client to the core. Returns what ends its connection at once.

        Not in the coroutine, whose frame would keep the facts and ``make`` for the whole session: 0.5 of 20.3 KiB
        of an idle session (row all-in-one-memory).
        """
        client, tls, loop, close_notify = self._client, self.tls, self._loop, self._resources.close_notify
        assert isinstance(client, TLSSocket)
        assert tls is not None

        def make(owner: TransportOwner) -> TLSTransport:
            self._reader_left = False
            self._tunnel = made = TLSTransport(loop, client, core.buffer, owner, close_notify, finished.end)
            return made

        self.backend = self._resources.backends.all[0]  # for the log
        facts = DirectClient(
            self.id, self._source, self._destination, tls, self._balancer,
            upgraded=self.listener.starttls, check=self._role is Role.BALANCER_CHECK, unnamed=self._role is Role.BALANCER,
        )  # fmt: skip
        return core.serve(facts, make)

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

    def _close(self, reason: End) -> None:
        # First, so that a client that sees the close can connect again at once.
        self._resources.limits.leave(self.admitted)
        if self._backend is not None:
            if reason in INCOMPLETE:
                reset_on_close(self._backend)
            self._leave_backend()
        if isinstance(self._client, TLSSocket) and reason in (End.IDLE_TIMEOUT, End.SHUTDOWN):
            with contextlib.suppress(OSError, ValueError):
                self._client.unwrap()
        if self._reader_left:
            # If it stayed registered after the close, the next connection with this descriptor would not be watched.
            self._loop.remove_reader(self._client.fileno())
        self._client.close()

    @property
    def _port(self) -> int | None:
        """The client's port; None on a Unix socket."""
        return None if isinstance(self._source, str) else self._source[1]

    def _report(self, reason: End) -> None:
        seconds = time.monotonic() - self.started
        self._count(self.received, self.sent)
        metrics = self._resources.metrics
        metrics.session_seconds.observe(seconds)
        self._decide(StarttlsResult.REFUSED)
        tls = self.tls
        active = tls is not None or self.received > 0
        # The requested name is logged even if the handshake failed: that is when it is needed most.
        sni = self._client.server_name if isinstance(self._client, TLSSocket) else None
        event(
            log, self._role.log_level(active), "connection ended",
            id=self.id, client_ip=self._host, client_port=self._port, listener=self.listener.name,
            tls=tls and tls.version, cipher=tls and tls.cipher, sni=sni,
            backend=self.backend and self.backend.name, bytes_in=self.received, bytes_out=self.sent,
            seconds=round(seconds, 3), reason=reason, error=self.detail,
        )  # fmt: skip


def _host_of(source: Endpoint) -> str:
    return "unix" if isinstance(source, str) else source[0]
