"""One client's connection: its deadlines, its flow control and its end, around a dialogue.

A connection first expects a PROXY header (where one is required), and is then open. When the dialogue has ended and the client
may still be sending, it lingers: it is half-closed and read to its end, so that no reset destroys the last reply.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from enum import Enum
from time import monotonic
from typing import Protocol

from fumi_core.proxy_protocol import ProxyProtocolError, parse
from fumi_core.runtime.logs import event
from fumi_core.runtime.scoreboard import ConnectionCount
from fumi_core.server.client_facts import ClientFacts, Origin, from_header
from fumi_core.server.dialogue import Dialogue
from fumi_core.server.observer import HeaderResult, Observer, RejectReason
from fumi_core.server.setup import DialogueSetup
from fumi_core.server.transport import Transport
from fumi_core.smtp import replies, states
from fumi_core.smtp.options import Options
from fumi_core.smtp.session import Session, log_fields

_log = logging.getLogger("fumi.core")
_DIRECT = "clients that connect without a proxy need --proxy-protocol off"
_HEADER_HINTS = {
    HeaderResult.TIMEOUT: _DIRECT,
    HeaderResult.MALFORMED: _DIRECT,
    HeaderResult.UNTRUSTED: f"name a proxy with --trusted-proxy; {_DIRECT}",
}
LINGER_SECONDS = 5.0
"""Seconds that a client has to close its side, after it has taken the last reply."""


HANDLER_SECONDS = 900.0
"""Seconds that handlers have at least: more than a client waits for a reply (RFC 5321 §4.5.3.2) and than a delivery takes."""


class Phase(Enum):
    HEADER = "header"
    OPEN = "open"
    LINGERING = "lingering"
    CLOSED = "closed"


_OPEN = Phase.OPEN  # Python takes five times as long to look up an enum's member


class ConnectionOwner(Protocol):
    """What a connection needs from its server."""

    options: Options
    setup: DialogueSetup
    observer: Observer
    logger: logging.Logger | None
    loop: asyncio.AbstractEventLoop
    connection_count: ConnectionCount
    connections: set[Connection]
    draining: bool

    def forget(self, connection: Connection) -> None:
        """Called once, when the connection and its handlers have ended."""


class Connection:
    """One client: bytes, timeouts and flow control around a Dialogue.

    Every connection has a deadline in every state. The table shows what the deadline is, what postpones it, and what happens
    then:

    ============================  ==============================  ============================  =====================
    state                         deadline                        postponed by                  when it has passed
    ============================  ==============================  ============================  =====================
    a PROXY header is expected    proxy_timeout                   nothing                       closed
    a command is expected         socket_timeout                  bytes received, replies       421, lingering
                                                                  taken by the kernel
    a command has begun           socket_timeout                  nothing: it must be complete  421, lingering
                                  from its first bytes on
    a message or chunk arrives    socket_timeout, and             bytes received;               421, lingering
                                  data_timeout in all             nothing
    a handler is running, and no  HANDLER_SECONDS, or longer:     nothing                       cancelled: 451; if it
    message or chunk arrives      data_timeout + socket_timeout                                 does not end, 421
    replies wait for the client   socket_timeout                  all of them taken by the      closed without a reply
    to read, handler or not                                       kernel
    lingering, replies waiting    socket_timeout                  nothing; as below once the    closed
                                                                  kernel has taken them
    lingering                     LINGER_SECONDS                  nothing                       closed
    closing                       unchanged                       nothing                       closed
    closed, a handler is running  the same                        nothing                       cancelled
    ============================  ==============================  ============================  =====================

    A client that has closed its side (a half-close) is in the same states: it gets the replies to what it sent, then the end.
    """

    __slots__ = (
        "_deadline",
        "_dialogue",
        "_ended",
        "_facts",
        "_header",
        "_origin",
        "_paused",
        "_phase",
        "_server",
        "_started",
        "_timer",
        "_transport",
    )

    def __init__(self, server: ConnectionOwner, facts: ClientFacts) -> None:
        """``facts`` are those of the client or, where a PROXY header is expected, of the proxy."""
        self._server = server
        self._facts = facts
        self._origin = facts.origin
        self._phase = Phase.HEADER
        self._header = b""
        self._dialogue: Dialogue | None = None
        self._ended = False
        self._paused = False
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = 0.0
        self._started = monotonic()
        self._transport: Transport

    def start(self, transport: Transport) -> None:
        """Begin the dialogue with the client that the facts describe. The transport's owner is this connection."""
        self._begin(transport)
        self._open(self._facts)

    def expect_header(self, transport: Transport) -> None:
        """Wait for a PROXY header, and begin the dialogue with the client that it names."""
        self._begin(transport)
        peer = self._facts.remote[0]
        if peer in self._server.setup.trusted:
            self._watch(self._server.options.proxy_timeout)
        else:
            self._refuse_header(HeaderResult.UNTRUSTED, f"{peer} is not a trusted proxy")

    def _begin(self, transport: Transport) -> None:
        self._transport = transport
        self._server.connections.add(self)
        self._server.connection_count.opened()
        self._server.observer.connection_opened()

    # Calls by the transport

    def received(self, data: bytes) -> None:
        dialogue = self._dialogue
        if dialogue is not None and self._phase is _OPEN:
            protocol = dialogue.protocol
            if not protocol.line_begun:
                self._deadline = monotonic() + self._server.options.socket_timeout
            try:
                reply = protocol.answer(data)
            except Exception as error:
                dialogue.fail(error)
                return
            if reply is not None:
                self._transport.write(reply)
            if reply is None or dialogue.draining or self._transport.blocked:
                dialogue.proceed()
        elif self._phase is Phase.HEADER:
            self._read_header(data)

    def ended(self) -> None:
        if self._phase is Phase.HEADER:
            self._refuse_header(HeaderResult.CLOSED, "closed before a PROXY header")
        elif self._phase is Phase.OPEN:
            # The client sends no more but may still read: it gets its replies, and then the connection is closed.
            self._ended = True
            self._regulate()
        else:
            self._transport.close()

    def drained(self) -> None:
        if self._phase is Phase.OPEN:
            self._deadline = monotonic() + self._server.options.socket_timeout
            self._proceed()
        elif self._phase is Phase.LINGERING:
            self._watch(LINGER_SECONDS)

    def lost(self) -> None:
        self._phase = Phase.CLOSED
        if self._timer is not None:
            self._timer.cancel()
        self._server.connection_count.closed()
        self._server.observer.connection_closed()
        if self._dialogue is None:
            self._server.forget(self)
        else:
            self._server.connection_count.client_left()
            if self._dialogue.protocol.unused:
                self._origin = Origin.HEALTH_CHECK
            self._dialogue.disconnected(self._closed)
            if self._dialogue is not None:
                self._deadline = math.inf  # only handlers have one from now on
                self._schedule_check(monotonic())

    # The PROXY header

    def _read_header(self, data: bytes) -> None:
        self._header += data
        try:
            found = parse(self._header)
        except ProxyProtocolError as error:
            self._refuse_header(HeaderResult.MALFORMED, str(error))
            return
        if found is None:
            return
        header, length = found
        rest, self._header = self._header[length:], b""
        self._server.observer.proxy_header(str(header.version), HeaderResult.OK)
        self._open(from_header(header, self._facts))
        if rest:
            self.received(rest)

    def _refuse_header(self, result: HeaderResult, problem: str) -> None:
        self._server.observer.proxy_header("none", result)
        # A health check that connects and disconnects is logged at debug only.
        level = logging.DEBUG if result is HeaderResult.CLOSED else logging.WARNING
        fields = log_fields(_session(self._facts, self._server.options))
        event(_log, level, "no valid PROXY header", **fields, error=problem, hint=_HEADER_HINTS.get(result))
        self._phase = Phase.CLOSED
        self._transport.abort()

    # The dialogue

    @property
    def _open_dialogue(self) -> Dialogue | None:
        """The dialogue, as long as the client takes part in it."""
        return self._dialogue if self._phase is Phase.OPEN else None

    def _open(self, facts: ClientFacts) -> None:
        del self._facts  # the session has them from now on, and an idle connection should be small
        server = self._server
        if server.options.max_clients is not None and server.connection_count.clients >= server.options.max_clients:
            server.observer.rejected(RejectReason.MAX_CLIENTS)
            server.setup.tally.replies[421] += 1
            refusal = replies.TOO_MANY_CLIENTS
            self._transport.write(refusal.plain if server.options.hide_enhancedstatuscodes else refusal.data)
            self._linger()
            return
        server.connection_count.client_admitted()
        self._phase = Phase.OPEN
        self._origin = facts.origin
        session = _session(facts, server.options)
        anonymous = facts.origin is Origin.UNNAMED_CLIENT
        self._dialogue = Dialogue(session, server.setup, self._regulate, anonymous=anonymous, greeted=facts.greeted)
        self._watch(server.options.socket_timeout)
        self._dialogue.start()
        if server.draining:
            self._dialogue.drain()

    def _regulate(self) -> None:
        """Called after every change: send output, pause or resume reading, or end."""
        dialogue = self._dialogue
        if dialogue is None or self._phase is not _OPEN:
            return
        protocol, transport = dialogue.protocol, self._transport
        closed = protocol.state is states.CLOSED
        # While replies wait for the client to read, later replies stay in the protocol, which pauses when it has enough.
        if protocol.output and (closed or not transport.blocked):
            self._deadline = monotonic() + self._server.options.socket_timeout
            transport.write(protocol.take_output())
        if closed:
            self._end(dialogue)
        elif self._ended:
            if not (dialogue.busy or protocol.throttled or transport.blocked):
                self._close()
        elif (transport.blocked or dialogue.full) is not self._paused:
            self._paused = not self._paused
            if self._paused:
                transport.pause_reading()
            else:
                transport.resume_reading()
        if protocol.throttled and not transport.blocked:
            # Let other connections run first.
            self._server.loop.call_soon(self._proceed)

    def _proceed(self) -> None:
        dialogue = self._open_dialogue
        if dialogue is not None and dialogue.protocol.throttled:
            dialogue.proceed()
        else:
            self._regulate()

    def _end(self, dialogue: Dialogue) -> None:
        if dialogue.protocol.last is replies.BYE or self._ended:
            self._close()
        else:
            self._linger()

    def _close(self) -> None:
        self._phase = Phase.CLOSED
        self._transport.close()

    def _linger(self) -> None:
        self._phase = Phase.LINGERING
        # The client must first take the replies that wait; drained() then gives it the linger time.
        self._watch(self._server.options.socket_timeout if self._transport.blocked else LINGER_SECONDS)
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        self._transport.write_eof()

    def drain(self) -> None:
        dialogue = self._open_dialogue
        if dialogue is not None:
            dialogue.drain()
        elif self._phase is Phase.HEADER:
            self._transport.abort()

    def check_window(self) -> None:
        self._transport.check_window()

    def kill(self) -> None:
        if self._dialogue is not None:
            self._dialogue.kill()
        self._transport.abort()

    def _closed(self) -> None:
        """The connection has ended, and so have its handlers."""
        server, dialogue = self._server, self._dialogue
        if self._timer is not None:
            self._timer.cancel()
        self._dialogue = None  # it refers to this connection: a cycle that only the garbage collector would break
        server.forget(self)
        if server.logger is not None and dialogue is not None:
            session = dialogue.session
            event(
                server.logger,
                # Health checks come every few seconds: a proxy's own, and connections that close without a command.
                logging.DEBUG if self._origin is Origin.HEALTH_CHECK else logging.INFO,
                "session ended",
                # log_fields(), without its dict: this line is written for every connection.
                id=session.id,
                client_ip=session.remote_address,
                client_port=session.remote_port or None,
                proxy=session.proxy_address,
                helo=session.client_hostname,
                tls=session.tls.version if session.tls else ("yes" if session.secure else None),
                user=session.user,
                messages=dialogue.messages,
                seconds=round(monotonic() - self._started, 3),
            )

    # Timeouts: one timer for each connection. Bytes only move the deadline; the timer is set again when it fires.

    def _watch(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        now = monotonic()
        self._deadline = now + seconds
        self._schedule_check(now)

    def _schedule_check(self, now: float) -> None:
        """Set the timer for the deadline, or sooner, since a message that begins in the meantime may have an earlier deadline."""
        due = min(self._due(), now + self._server.options.data_timeout)
        self._timer = self._server.loop.call_at(due, self._check_deadline)

    def _due(self) -> float:
        """When the client, the message that is arriving, or a handler exceeds its time limit."""
        if self._dialogue is None:
            return self._deadline
        started = self._dialogue.message_started
        limit = math.inf if started is None else started + self._server.options.data_timeout
        return min(self._deadline, limit, self._handlers_due(self._dialogue))

    def _handlers_due(self, dialogue: Dialogue) -> float:
        """When handlers must have ended."""
        options = self._server.options
        limit = max(HANDLER_SECONDS, options.data_timeout + options.socket_timeout)
        return math.inf if dialogue.awaited is None else dialogue.awaited + limit

    def _check_deadline(self) -> None:
        now = monotonic()
        dialogue = self._open_dialogue
        if dialogue is not None and (dialogue.busy or dialogue.full) and not self._transport.blocked:
            # The client waits for the server.
            self._deadline = max(self._deadline, now + self._server.options.socket_timeout)
        if now < self._due():
            self._schedule_check(now)
        elif self._phase is Phase.HEADER:
            self._refuse_header(HeaderResult.TIMEOUT, "no PROXY header in time")
        elif self._dialogue is not None and now >= self._handlers_due(self._dialogue):
            self._dialogue.stop_handlers()
            if self._phase is _OPEN or self._deadline == math.inf:
                self._schedule_check(now)
            elif self._transport.blocked:
                self._transport.abort()  # there is no room for the 421
        elif dialogue is not None:
            dialogue.time_out()
            if self._transport.blocked:
                self._transport.abort()  # there is no room for the 421, and the client is not reading
        else:
            self._transport.abort()


def _session(facts: ClientFacts, options: Options) -> Session:
    session = Session(facts.id or secrets.token_hex(8), options.name)
    session.remote_address, session.remote_port = facts.remote
    session.local_address, session.local_port = facts.local
    session.proxy_address = facts.proxy_address
    session.health_check = facts.origin is Origin.HEALTH_CHECK
    session.secure = facts.secure or options.assume_tls
    session.tls = facts.tls
    return session
