"""A TLS socket in the event loop, with the interface of the core's own transport: the direct path of an app in one process.

Theory of operation. Records are decrypted into a buffer that all connections share, and a reply is encrypted where it is written;
only bytes that the kernel does not take are kept. The transport has two halves that end apart:

- The core's half. After ``close()`` the core gets ``lost()`` as soon as its last reply, close_notify and FIN
  have been sent; after ``abort()``, at once.
- The client's half. A client that has not closed its side by then is read to its end, without TLS, since closing a socket with
  unread bytes sends RST, and RST destroys a reply that is still on its way. ``finished`` is then called, and the caller closes
  the socket. A client that does not close is disconnected after LINGER_SECONDS.
"""

from __future__ import annotations

import asyncio
import enum
import socket
from collections.abc import Callable
from typing import Protocol

from fumi_core.runtime.dead_peers import check_window
from fumi_edge.tls.close_notify import CloseNotify
from fumi_edge.tls.policy import TLSSocket
from fumi_edge.tls.records import ENDED, LONG_RECORD, MORE, WANTS_WRITE, read_records, send_end, write_records

LINGER_SECONDS = 30.0
"""Seconds in which a client must close its side after the core has closed the connection."""


class TransportEnd(enum.StrEnum):
    """Why the socket may be closed; the values are reasons in the log."""

    CLIENT_CLOSED = "client_closed"
    CORE_CLOSED = "backend_closed"
    FAILED = "client_reset"
    LINGER = "linger"


class TransportOwner(Protocol):
    """The interface of the core's connections: the receiver of a transport's events (fumi_core.server.transport)."""

    def received(self, data: bytes) -> None:
        """The client sent these bytes, at least one."""

    def ended(self) -> None:
        """The client will send no more. Nothing more is read; writing goes on."""

    def drained(self) -> None:
        """The kernel has taken all output: ``blocked`` is False again."""

    def lost(self) -> None:
        """The connection has ended; no method is called after this."""


class TLSTransport:
    """A non-blocking TLS socket after its handshake, read from the beginning on. Errors end it with ``lost()``; no method raises.

    ``received`` and ``sent`` count the bytes of the content, without TLS. ``finished`` is called once, with the reason.
    """

    __slots__ = (
        "_backlog",
        "_buffer",
        "_close_notify",
        "_closing",
        "_deadline",
        "_end_seen",
        "_ended",
        "_finished",
        "_half_close",
        "_loop",
        "_owner",
        "_reading",
        "_sock",
        "_streaming",
        "_unsent_end",
        "_wants_read",
        "_wants_write",
        "_watched",
        "failure",
        "received",
        "sent",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: TLSSocket,
        buffer: memoryview,
        owner: TransportOwner,
        close_notify: CloseNotify,
        finished: Callable[[TransportEnd], None],
    ) -> None:
        """The socket stays the caller's, who closes it when ``finished`` is called. The handshake's reader is replaced."""
        self._loop = loop
        self._sock = sock
        self._buffer = buffer
        self._owner: TransportOwner | None = owner
        self._close_notify = close_notify
        self._unsent_end: bytes | None = None
        """What is left of close_notify once it is being sent; b"" when our side is closed."""
        self._finished: Callable[[TransportEnd], None] | None = finished
        self._backlog = b""
        self._reading = True
        self._streaming = False
        """See ``read_records()``."""
        self._ended = False
        """The client has closed its side."""
        self._half_close = False
        """Our side is to be closed, after the backlog."""
        self._closing = False
        self._wants_read = self._wants_write = False
        self._end_seen: TransportEnd | None = None
        """The end that came first."""
        self._deadline: float | None = None
        self.failure: OSError | None = None
        """The error of reading from the client."""
        self.received = self.sent = 0
        self._watched = (True, False)
        loop.add_reader(self._sock.fileno(), self._readable)

    # Calls by the core

    @property
    def blocked(self) -> bool:
        """Whether output waits for the client to read."""
        return bool(self._backlog)

    def write(self, data: bytes) -> None:
        """Send now, or as soon as the client reads."""
        if self._backlog:
            self._backlog += data
        elif not self._closing:
            self._backlog = data
            self._write()
            if self._backlog:
                self._watch()

    def write_eof(self) -> None:
        """Send close_notify and FIN after all output."""
        if not self._closing:
            self._half_close = True
            if not self._backlog:
                self._end()

    def pause_reading(self) -> None:
        self._reading = False
        self._watch()

    def resume_reading(self) -> None:
        self._reading = True
        self._watch()

    def close(self) -> None:
        """Read no more, send the waiting output, close_notify and FIN, and close."""
        if not self._closing:
            self._closing = self._half_close = True
            if not self._backlog:
                self._end()
            self._watch()

    def abort(self) -> None:
        """Close at once; waiting output is lost, and the client sees that the connection is incomplete."""
        self._fail(TransportEnd.CORE_CLOSED)

    # Calls by the edge and by the event loop

    def tick(self, now: float) -> None:
        """Disconnect a client that does not close its side. The edge calls it every few seconds; ``now`` is the loop's time."""
        if self._deadline is not None and now >= self._deadline:
            self._fail(TransportEnd.LINGER)
        else:
            self.check_window()

    def check_window(self) -> None:
        check_window(self._sock)

    def _readable(self) -> None:
        if self._wants_read:
            self._wants_read = False
            self._flush()
        if self._closing:
            if self._end_sent and not self._ended:
                self._discard()
        elif self._reading and not self._ended:
            self._read()

    def _read(self) -> None:
        try:
            count, then = read_records(self._sock, self._buffer, self._streaming)
        except OSError as error:
            self.failure = error
            self._fail(TransportEnd.FAILED)
            return
        self._streaming = count >= LONG_RECORD
        if then is not MORE:
            self._ended, self._wants_write = then is ENDED, then is WANTS_WRITE
            self._watch()
        owner = self._owner
        if count and owner is not None:
            self.received += count
            owner.received(bytes(self._buffer[:count]))
        if isinstance(then, OSError):
            self.failure = then
            self._fail(TransportEnd.FAILED)
        if self._ended and not self._closing and owner is not None:
            self._end_seen = TransportEnd.CLIENT_CLOSED
            owner.ended()

    def _discard(self) -> None:
        """Our side is closed: read what the client still sends, without TLS, so that no RST destroys the last reply."""
        try:
            self._ended = not socket.socket.recv_into(self._sock, self._buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._ended = True
        if self._ended:
            self._finish(TransportEnd.CORE_CLOSED)

    @property
    def _end_sent(self) -> bool:
        return self._unsent_end == b""

    def _writable(self) -> None:
        if self._wants_write:
            self._wants_write = False
            self._readable()
        self._flush()

    def _flush(self) -> None:
        """Send queued output. The core gets ``drained()`` when all is sent."""
        waited = bool(self._backlog)
        if waited:
            self._write()
        if not self._backlog and self._half_close and not self._end_sent:
            self._end()
        self._watch()
        if waited and not self._backlog and self._owner is not None:
            self._owner.drained()

    def _write(self) -> None:
        try:
            taken, self._wants_read = write_records(self._sock, self._backlog)
        except OSError:
            self._fail(TransportEnd.FAILED)
            return
        self.sent += taken
        self._backlog = self._backlog[taken:]

    def _end(self) -> None:
        try:
            if not self._end_sent:
                self._unsent_end = send_end(self._sock, self._close_notify, self._unsent_end)
        except OSError:
            self._fail(TransportEnd.FAILED)
            return
        if self._end_sent and self._closing:
            self._lose()
            self._deadline = self._loop.time() + LINGER_SECONDS
            if self._ended:
                self._finish(TransportEnd.CORE_CLOSED)

    def _watch(self) -> None:
        """Make the loop watch the socket for exactly the events that are waited for."""
        if self._closing:
            reading = self._end_sent and not self._ended
        else:
            reading = self._reading and not self._ended and not self._wants_write
        writing = not self._wants_read and (bool(self._backlog) or (self._half_close and not self._end_sent))
        wanted = reading or self._wants_read, writing or self._wants_write
        if wanted == self._watched or self._finished is None:
            return
        before, self._watched = self._watched, wanted
        for now, was, add, remove, call in (
            (wanted[0], before[0], self._loop.add_reader, self._loop.remove_reader, self._readable),
            (wanted[1], before[1], self._loop.add_writer, self._loop.remove_writer, self._writable),
        ):
            if now and not was:
                add(self._sock.fileno(), call)
            elif was and not now:
                remove(self._sock.fileno())

    # The end

    def _fail(self, reason: TransportEnd) -> None:
        self._closing = True
        self._backlog = b""
        self._lose()
        self._finish(reason)

    def _lose(self) -> None:
        # The core is called later, since it may be the caller; in lost() it drops its reference to this object.
        owner, self._owner = self._owner, None
        if owner is not None:
            self._loop.call_soon(owner.lost)

    def _finish(self, reason: TransportEnd) -> None:
        finished, self._finished = self._finished, None
        if finished is None:
            return
        if self._watched[0]:
            self._loop.remove_reader(self._sock.fileno())
        if self._watched[1]:
            self._loop.remove_writer(self._sock.fileno())
        self._deadline = None
        self._loop.call_soon(finished, self._end_seen or reason)
