"""One client's connection: its deadlines, its flow control and its end, around a dialogue.

A connection first expects a PROXY header (where one is required), and is then open. When the dialogue has ended and the client
may still be sending, it lingers: it is half-closed and read to its end, so that no reset destroys the last reply.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from enum import Enum
from time import monotonic
from typing import Protocol

from fumi_core.proxy_protocol import ProxyHeader, ProxyProtocolError, parse, unique_id_text
from fumi_core.runtime.addresses import peer_of
from fumi_core.runtime.logs import event
from fumi_core.runtime.scoreboard import ConnectionCount
from fumi_core.server.dialogue import Dialogue, Service
from fumi_core.server.observer import Observer
from fumi_core.server.transport import Transport
from fumi_core.smtp import replies
from fumi_core.smtp.options import Options
from fumi_core.smtp.session import Session, log_fields

_log = logging.getLogger("fumi.core")
_DIRECT = "clients that connect without a proxy need --proxy-protocol off"
_HEADER_HINTS = {"timeout": _DIRECT, "malformed": _DIRECT, "untrusted": f"name a proxy with --trusted-proxy; {_DIRECT}"}
LINGER_SECONDS = 5.0
"""Seconds that a client has to close its side, after it has taken the last reply."""


class Phase(Enum):
    HEADER = "header"
    OPEN = "open"
    LINGERING = "lingering"
    CLOSED = "closed"


class Owner(Protocol):
    """What a connection needs from its server."""

    options: Options
    service: Service
    observer: Observer
    logger: logging.Logger | None
    loop: asyncio.AbstractEventLoop
    buffer: memoryview
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
    a command is expected         socket_timeout                  octets received, replies      421, lingering
                                                                  taken by the kernel
    a command has begun           socket_timeout                  nothing: it must be complete  421, lingering
                                  from its first octets on
    a message or chunk arrives    socket_timeout, and             octets received;              421, lingering
                                  data_timeout in all             nothing
    a handler is running          none: the client waits for us   -                             -
    replies wait for the client   socket_timeout                  all of them taken by the      closed without a reply
    to read, handler or not                                       kernel
    lingering, replies waiting    socket_timeout                  nothing; then as below        closed
    lingering                     LINGER_SECONDS                  nothing                       closed
    closing                       unchanged                       nothing                       closed
    ============================  ==============================  ============================  =====================

    A client that has closed its side (a half-close) is in the same states: it gets the replies to what it sent, then the end.
    """

    __slots__ = (
        "_anonymous",
        "_deadline",
        "_dialogue",
        "_ended",
        "_header",
        "_paused",
        "_phase",
        "_probe",
        "_server",
        "_session",
        "_started",
        "_timer",
        "_transport",
    )

    def __init__(self, server: Owner, sock: socket.socket, peer: tuple[str, int], own: tuple[str, int]) -> None:
        """``peer`` and ``own`` are the addresses of the socket's two ends."""
        self._server = server
        self._phase = Phase.HEADER
        self._header = b""
        self._dialogue: Dialogue | None = None
        self._ended = False
        self._probe = False
        self._anonymous = False
        """The PROXY header did not name the client, so its address is unknown."""
        self._paused = False
        self._timer: asyncio.TimerHandle | None = None
        self._deadline = 0.0
        self._started = monotonic()
        self._session = session = Session(secrets.token_hex(8), server.options.name)
        session.remote_address, session.remote_port = peer
        session.local_address, session.local_port = own
        self._transport = Transport(server.loop, sock, server.buffer, self)

    def start(self) -> None:
        server, session = self._server, self._session
        server.connections.add(self)
        server.connection_count.opened()
        server.observer.connection_opened()
        if server.options.proxy_protocol == "off":
            session.secure = server.options.assume_tls
            self._open()
        elif session.remote_address not in server.service.trusted:
            self._refuse_header("none", "untrusted", f"{session.remote_address} is not a trusted proxy")
        else:
            self._watch(server.options.proxy_timeout)

    # Calls by the transport

    def received(self, count: int) -> None:
        data = bytes(self._server.buffer[:count])
        if self._phase is Phase.OPEN:
            dialogue = self._dialogue
            assert dialogue is not None
            if not dialogue.protocol.line_begun:
                self._deadline = monotonic() + self._server.options.socket_timeout
            dialogue.receive(data)
        elif self._phase is Phase.HEADER:
            self._read_header(data)

    def ended(self) -> None:
        if self._phase is Phase.HEADER:
            self._refuse_header("none", "closed", "closed before a PROXY header")
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
            self._probe = self._probe or self._dialogue.protocol.unused
            self._dialogue.gone(self._closed)

    # The PROXY header

    def _read_header(self, data: bytes) -> None:
        self._header += data
        try:
            found = parse(self._header)
        except ProxyProtocolError as error:
            self._refuse_header("none", "malformed", str(error))
            return
        if found is None:
            return
        header, length = found
        rest, self._header = self._header[length:], b""
        self._server.observer.proxy_header(str(header.version), "ok")
        self._identify(header)
        self._open()
        if rest and self._phase is Phase.OPEN:
            self._dialogue.receive(rest)  # type: ignore[union-attr]

    def _identify(self, header: ProxyHeader) -> None:
        """Set the client from the PROXY header. For LOCAL it is the proxy itself, with the connection's own addresses."""
        session = self._session
        session.proxy_address = session.remote_address
        session.secure = self._server.options.assume_tls
        if header.command == "LOCAL":
            self._probe = True
            return
        self._anonymous = header.source is None
        session.remote_address, session.remote_port = _endpoint(header.source, session.remote_address, session.remote_port)
        session.local_address, session.local_port = _endpoint(header.destination, session.local_address, session.local_port)
        session.tls = header.tls
        session.secure = session.secure or header.tls is not None
        if header.unique_id:
            session.id = unique_id_text(header.unique_id)

    def _refuse_header(self, version: str, result: str, problem: str) -> None:
        self._server.observer.proxy_header(version, result)
        # A health check that connects and disconnects is logged at debug only.
        level = logging.DEBUG if result == "closed" else logging.WARNING
        hint = _HEADER_HINTS.get(result)
        event(_log, level, "no valid PROXY header", **log_fields(self._session), error=problem, hint=hint)
        self._phase = Phase.CLOSED
        self._transport.abort()

    # The dialogue

    def _open(self) -> None:
        server = self._server
        if server.options.max_clients is not None and server.connection_count.clients >= server.options.max_clients:
            server.observer.rejected("max_clients")
            counts = server.service.tally.replies
            counts[421] = counts.get(421, 0) + 1
            refusal = replies.TOO_MANY_CLIENTS
            self._transport.write(refusal.plain if server.options.hide_enhancedstatuscodes else refusal.data)
            self._linger()
            return
        server.connection_count.client_admitted()
        self._phase = Phase.OPEN
        self._dialogue = Dialogue(self._session, server.service, self._regulate, anonymous=self._anonymous)
        self._watch(server.options.socket_timeout)
        self._dialogue.start()
        if server.draining:
            self._dialogue.drain()

    def _regulate(self) -> None:
        """Called after every change: send output, pause or resume reading, or end."""
        dialogue = self._dialogue
        if self._phase is not Phase.OPEN or dialogue is None:
            return
        # While replies wait for the client to read, later replies stay in the protocol, which pauses when it has enough.
        if not self._transport.blocked or dialogue.closed:
            output = dialogue.protocol.take_output()
            if output:
                self._deadline = monotonic() + self._server.options.socket_timeout
                self._transport.write(output)
        if dialogue.closed:
            self._end(dialogue)
        elif self._ended:
            if not (dialogue.busy or dialogue.protocol.throttled or self._transport.blocked):
                self._close()
        elif (self._transport.blocked or dialogue.full) is not self._paused:
            self._paused = not self._paused
            if self._paused:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()
        if dialogue.protocol.throttled and not self._transport.blocked:
            # Let other connections run first.
            self._server.loop.call_soon(self._proceed)

    def _proceed(self) -> None:
        if self._phase is Phase.OPEN and self._dialogue is not None and self._dialogue.protocol.throttled:
            self._dialogue.proceed()
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
        if self._dialogue is not None and self._phase is Phase.OPEN:
            self._dialogue.drain()
        elif self._phase is Phase.HEADER:
            self._transport.abort()

    def kill(self) -> None:
        if self._dialogue is not None:
            self._dialogue.kill()
        self._transport.abort()

    def _closed(self) -> None:
        """The connection has ended, and so have its handlers."""
        server, session, dialogue = self._server, self._session, self._dialogue
        self._dialogue = None  # it refers to this connection: a cycle that only the garbage collector would break
        server.forget(self)
        if server.logger is not None and dialogue is not None:
            event(
                server.logger,
                # Health checks come every few seconds: a proxy's own, and connections that close without a command.
                logging.DEBUG if self._probe else logging.INFO,
                "session ended",
                **log_fields(session),
                proxy=session.proxy_address,
                helo=session.client_hostname,
                tls=session.tls.version if session.tls else ("yes" if session.secure else None),
                user=session.user,
                messages=dialogue.messages,
                seconds=round(monotonic() - self._started, 3),
            )

    # Timeouts: one timer for each connection, set again only when it fires

    def _watch(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        now = monotonic()
        self._deadline = now + seconds
        self._look_again(now)

    def _look_again(self, now: float) -> None:
        """Set the timer for the deadline, or sooner, since a message that begins in the meantime may have an earlier deadline."""
        due = min(self._due(), now + self._server.options.data_timeout)
        self._timer = self._server.loop.call_at(due, self._look)

    def _due(self) -> float:
        """When the client, or the message that is arriving, exceeds its time limit."""
        started = self._dialogue.message_started if self._dialogue is not None else None
        return self._deadline if started is None else min(self._deadline, started + self._server.options.data_timeout)

    def _look(self) -> None:
        now = monotonic()
        dialogue = self._dialogue
        if self._phase is Phase.OPEN and dialogue and (dialogue.busy or dialogue.full) and not self._transport.blocked:
            # The client waits for us.
            self._deadline = max(self._deadline, now + self._server.options.socket_timeout)
        if now < self._due():
            self._look_again(now)
        elif self._phase is Phase.HEADER:
            self._refuse_header("none", "timeout", "no PROXY header in time")
        elif self._phase is Phase.OPEN and dialogue is not None:
            dialogue.time_out()
            if self._transport.blocked:
                self._transport.abort()  # there is no room for the 421, and the client is not reading
        else:
            self._transport.abort()


def _endpoint(place: tuple[str, int] | str | None, address: str, port: int) -> tuple[str, int]:
    """One side's address from the header, or the connection's own address where the header has none."""
    if place is None:
        return address, port
    if isinstance(place, str):
        # The client may choose a Unix socket's path: it must not look like an address, nor break a log line.
        return "unix:" + "".join(each if each.isascii() and each.isprintable() else "?" for each in place), 0
    return peer_of(place)
