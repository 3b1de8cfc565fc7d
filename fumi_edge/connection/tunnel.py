"""Two sockets, one buffer: the hot loop.

Theory of operation. A tunnel is two flows, client to backend and backend to client. A flow reads from its source into a buffer
that all tunnels of a loop share, and at once writes these bytes to its sink. Bytes that the sink does not take become the flow's
leftover, and a flow with a leftover does not read: this is the back-pressure and the bound on memory. Two rules keep bytes from
being lost; each was broken once:

- A flow reads only in ``_pump``, and ``_pump`` is never entered while there is a leftover. A callback may have been scheduled
  before the leftover existed, so it checks the state of the flow and does not trust the event.
- The contents of the shared buffer are sent or copied before the callback returns.

A flow whose source has ended is CLOSING until its leftover is sent and its sink has got the end (close_notify and FIN), then
CLOSED. The other flow goes on: half-close works both ways. A flow whose sink has failed is DISCARDING: it goes on reading,
because closing a socket with unread bytes sends RST, and RST destroys a reply that is still on its way.

Either socket may have TLS. A read may then need to write first and a write may need to read (records.py); the flow waits for the
other kind of readiness on that socket. A backend's TLS that fails, or ends without close_notify, is cut short: the client gets
what was read until then, and an end without close_notify.

It replaces asyncio's streams, two tasks that copy between ``start_server(ssl=…)`` and ``open_connection()``. Its CPU, as a ratio
to that of a proxy made of these, which has no limits, metrics or log, is 0.83 (0.78 … 0.91) in the row edge-handshake of
``ops/bench`` (5 rounds), 0.54 (0.53 … 0.88) in edge-bytes-up and 0.69 (0.62 … 0.79) in edge-bytes-down (3 rounds, on a busy
machine, Python 3.11.7). Delete it when edge-bytes-up and edge-bytes-down with asyncio's streams are within 3 %, and these can
half-close over TLS. No private names are used.
"""

from __future__ import annotations

import asyncio
import enum
import socket
import ssl

from fumi_core.runtime.dead_peers import check_window
from fumi_core.runtime.taskless import Pause
from fumi_edge.connection.ends import End
from fumi_edge.tls.close_notify import CloseNotify
from fumi_edge.tls.records import ENDED, LONG_RECORD, MORE, RECORD_SIZE, WANTS_WRITE, After, read_records, send_end, write_records

BUFFER_SIZE = 128 * 1024
"""Bytes that one wake-up moves from a socket without TLS: eight records."""
TLS_READ_SIZE = 3 * RECORD_SIZE
"""Bytes that one wake-up moves from a socket with TLS, in one send: a single segment even on the loopback interface (MTU 65,536).

Four records leave a small segment behind. One MiB costs 890 µs with eight records, 840 with three, 910 with two and 1,020 with
one (row edge-bytes-up, medians of 3 rounds on a busy machine, Python 3.11.2). ``SSLSocket._sslobj.read``, which saves a Python
frame for each record, is worth less than 1 % (10 rounds).
"""
LINGER_SECONDS = 30.0
"""Seconds after which a client that does not close, although the backend has closed, is disconnected.

They are counted from its last bytes while the backend still takes them, and from the backend's end otherwise.
"""


class FlowState(enum.IntEnum):
    OPEN = 0
    DISCARDING = 1
    CLOSING = 2
    CLOSED = 3


_OPEN, _DISCARDING, _CLOSING, _CLOSED = FlowState.OPEN, FlowState.DISCARDING, FlowState.CLOSING, FlowState.CLOSED


class _End:
    """One of the two sockets, and whether the loop watches it for reading and for writing.

    ``tls`` is the socket if it has TLS, and ``unsent_end`` what is left of close_notify, once it is being sent.
    """

    __slots__ = ("inward", "outward", "reading", "sock", "tls", "unsent_end", "writing")

    inward: _Flow
    outward: _Flow

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.tls = sock if isinstance(sock, ssl.SSLSocket) else None
        self.unsent_end: bytes | None = None
        self.reading = self.writing = False


class _Flow:
    """One direction. ``total`` counts the bytes read from the source."""

    __slots__ = ("leftover", "sink", "source", "state", "streaming", "total", "wants_read", "wants_write")

    def __init__(self, source: _End, sink: _End, leftover: bytes) -> None:
        self.source = source
        self.sink = sink
        self.leftover = leftover
        self.state = _OPEN
        self.total = len(leftover)
        self.streaming = False  # TLS: see read_records()
        self.wants_read = False  # TLS: writing to the sink waits for the sink to be readable
        self.wants_write = False  # TLS: reading from the source waits for the source to be writable
        source.inward = sink.outward = self


class Tunnel:
    """Carries bytes until both sides have ended; ``await tunnel.run()`` returns how it ended.

    The sockets are non-blocking, and the caller closes them. ``upstream`` and ``downstream`` are bytes already received for the
    backend and for the client. ``expectant``: no bytes have been received yet; if the backend closes without sending any, the
    tunnel ends and the client notices nothing.
    """

    __slots__ = (
        "_buffer",
        "_client",
        "_close_notify",
        "_deadline",
        "_done",
        "_down",
        "_expectant",
        "_finished",
        "_idle_timeout",
        "_loop",
        "_moved",
        "_moved_at",
        "_reason",
        "_unacknowledged",
        "_up",
        "client_failure",
        "failure",
        "unanswered",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        buffer: memoryview,
        close_notify: CloseNotify,
        client: socket.socket,
        backend: socket.socket,
        idle_timeout: float,
        upstream: bytes = b"",
        downstream: bytes = b"",
        expectant: bool = False,
    ) -> None:
        self._loop = loop
        self._buffer = buffer
        self._close_notify = close_notify
        self._client = _End(client)
        server = _End(backend)
        self._up = _Flow(self._client, server, upstream)
        self._down = _Flow(server, self._client, downstream)
        self._done: Pause[End] = Pause()
        self._finished: End | None = None
        """The reason that run() will return."""
        self._reason: End | None = None
        self._expectant = expectant
        self.unanswered = False
        """Whether an expectant tunnel has ended because the backend closed without sending any bytes."""
        self.failure: OSError | None = None
        """The error of the backend's TLS."""
        self.client_failure: OSError | None = None
        """The error of reading from the client."""
        self._idle_timeout = idle_timeout
        self._deadline: float | None = None
        self._moved, self._moved_at = 0, loop.time()
        self._unacknowledged = True
        """Whether a peer may not have acknowledged all bytes at the last tick; an idle tunnel costs no system calls then."""

    @property
    def received(self) -> int:
        """Bytes from the client so far."""
        return self._up.total

    @property
    def sent(self) -> int:
        """Bytes from the backend for the client so far."""
        return self._down.total

    async def run(self) -> End:
        """Carry bytes until the tunnel ends. Returns why it ended."""
        ends = (self._client, self._up.sink)
        for end in ends:
            # Replaces the handshake's reader, if it is still registered, without a system call.
            self._loop.add_reader(end.sock.fileno(), self._readable, end)
            end.reading = True
        try:
            for flow in (self._up, self._down):
                if flow.leftover:
                    self._flush(flow)
                    self._watch(flow.source)
                    self._watch(flow.sink)
            if self._finished:
                self._end()
            return await self._done
        finally:
            for end in ends:
                if end.reading:
                    self._loop.remove_reader(end.sock.fileno())
                if end.writing:
                    self._loop.remove_writer(end.sock.fileno())
                # The flows and the ends refer to each other; without this only the garbage collector would free them.
                del end.inward, end.outward

    def tick(self, now: float) -> None:
        """End a tunnel that is idle or lingers. The edge calls it every few seconds; ``now`` is the loop's time."""
        moved = self._up.total + self._down.total
        if moved != self._moved:
            self._moved, self._moved_at, self._unacknowledged = moved, now, True
            if self._deadline is not None and self._up.state is _OPEN:
                self._deadline = now + LINGER_SECONDS
        if self._unacknowledged:
            self._unacknowledged = check_window(self._client.sock) | check_window(self._up.sink.sock)
        if self._deadline is not None:
            if now >= self._deadline:
                self._reason = End.LINGER
                self._finish(self._reason)
        elif now - self._moved_at >= self._idle_timeout:
            self._reason = End.IDLE_TIMEOUT
            self._finish(self._reason)
        if self._finished:
            self._loop.call_soon(self._end)  # the caller goes on with its own work

    def _finish(self, reason: End) -> None:
        self._finished = self._finished or self._reason or reason

    def _end(self) -> None:
        """Let run() return. It is the last thing that a callback does, because the sockets are closed then."""
        assert self._finished is not None
        self._done.end(self._finished)

    # Readiness

    def _readable(self, end: _End) -> None:
        if self._finished:
            return
        flow = end.inward
        if end.outward.wants_read:
            self._flush(end.outward)
            self._watch(end.outward.source)
        if (flow.state is _OPEN or flow.state is _DISCARDING) and not flow.leftover and not flow.wants_write:
            self._pump(flow)
        else:
            self._watch(end)
        if self._finished:
            self._end()

    def _writable(self, end: _End) -> None:
        if self._finished:
            return
        if end.inward.wants_write:
            end.inward.wants_write = False
            if not end.inward.leftover:
                self._pump(end.inward)
        flow = end.outward
        if (flow.leftover or flow.state is _CLOSING) and self._flush(flow) and flow.state is _OPEN:
            # The source probably has more bytes: while the sink is the slower side, neither registration has to change.
            self._pump(flow)
        self._watch(end)
        self._watch(flow.source)
        if self._finished:
            self._end()

    def _watch(self, end: _End) -> None:
        """Make the loop watch a socket for exactly the events that its two flows wait for."""
        inward, outward = end.inward, end.outward
        read = outward.wants_read or (inward.state <= _DISCARDING and not inward.leftover and not inward.wants_write)
        if read is not end.reading:
            end.reading = read
            if read:
                self._loop.add_reader(end.sock.fileno(), self._readable, end)
            else:
                self._loop.remove_reader(end.sock.fileno())
        write = inward.wants_write or (not outward.wants_read and (bool(outward.leftover) or outward.state is _CLOSING))
        if write is not end.writing:
            end.writing = write
            if write:
                self._loop.add_writer(end.sock.fileno(), self._writable, end)
            else:
                self._loop.remove_writer(end.sock.fileno())

    # Moving bytes

    def _pump(self, flow: _Flow) -> None:
        """Read at most one buffer and pass it on. Only for a flow without a leftover."""
        assert not flow.leftover
        source, buffer = flow.source, self._buffer
        after: After | OSError
        try:
            if source.tls is None:
                count, after = _receive(source.sock, buffer)
            else:
                count, after = read_records(source.tls, buffer[:TLS_READ_SIZE], flow.streaming)
                flow.streaming = count >= LONG_RECORD
        except OSError as error:
            self._source_failed(flow, error)
            return
        flow.wants_write = after is WANTS_WRITE
        if count:
            flow.total += count
            if flow.state is _OPEN:
                data = buffer[:count]
                taken = self._put(flow, data)
                if taken < count and flow.state is _OPEN:
                    flow.leftover = bytes(data[taken:])
        if after is MORE:
            if flow.leftover:
                self._watch(source)
                self._watch(flow.sink)
        elif after is ENDED:
            self._source_ended(flow)
        elif isinstance(after, OSError):
            self._source_failed(flow, after)
        else:
            self._watch(source)
            self._watch(flow.sink)

    def _put(self, flow: _Flow, data: memoryview | bytes) -> int:
        """Write to the sink. Returns the number of bytes that it took; all of them if the sink has failed."""
        sink = flow.sink
        try:
            if sink.tls is None:
                return sink.sock.send(data)
            taken, flow.wants_read = write_records(sink.tls, data)
            return taken
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            if flow is self._up and isinstance(error, ConnectionResetError):
                # The kernel reports a reset once: a later read of this socket would see only the end.
                self._reason = self._reason or End.BACKEND_RESET
            self._sink_failed(flow)
            return len(data)

    def _flush(self, flow: _Flow) -> bool:
        """Write the leftover and, if the source has ended, the end. True when nothing is left to write."""
        if flow.leftover:
            flow.leftover = flow.leftover[self._put(flow, flow.leftover) :]
        if not flow.leftover and flow.state is _CLOSING and self._end_sink(flow):
            flow.state = _CLOSED
            self._closed(flow)
        return not flow.leftover and flow.state is not _CLOSING

    # Ends

    def _source_ended(self, flow: _Flow) -> None:
        up, down = self._up, self._down
        if self._expectant and flow is down and up.state is _OPEN and not down.total:
            self.unanswered = True
            self._reason = End.BACKEND_CLOSED
            self._finish(self._reason)
            return
        self._reason = self._reason or (End.CLIENT_CLOSED if flow is self._up else End.BACKEND_CLOSED)
        if flow.state is _DISCARDING:
            flow.state = _CLOSED
            self._closed(flow)
        else:
            flow.state = _CLOSING
            self._flush(flow)
        self._watch(flow.source)
        self._watch(flow.sink)

    def _source_failed(self, flow: _Flow, error: OSError) -> None:
        """End the tunnel when the client was reset. After a reset of the backend the client still gets the bytes read so far."""
        if flow is self._up:
            self.client_failure = error
            self._finish(End.CLIENT_RESET)
            return
        if flow.source.tls is not None:
            self.failure = error  # also a reset, which anybody on the way can send: the client must not see a whole stream
        self._reason = self._reason or End.BACKEND_RESET
        self._source_ended(flow)

    def _sink_failed(self, flow: _Flow) -> None:
        """When the backend takes no more bytes, discard the client's, but go on sending it the backend's: they may say why."""
        if flow is self._down:
            self._finish(End.CLIENT_RESET)
        elif flow.state is _CLOSING:
            flow.state = _CLOSED
            self._closed(flow)
        else:
            flow.state = _DISCARDING

    def _end_sink(self, flow: _Flow) -> bool:
        """Send the sink the end of the stream. False when that has to wait."""
        sink = flow.sink
        try:
            if sink.tls is not None and (self.failure is None or flow is self._up):
                sink.unsent_end = send_end(sink.tls, self._close_notify, sink.unsent_end)
                return not sink.unsent_end
            # Not sink.sock.shutdown(), after which a TLS socket could not be read either.
            socket.socket.shutdown(sink.sock, socket.SHUT_WR)
        except OSError:
            self._sink_failed(flow)
        return True

    def _closed(self, flow: _Flow) -> None:
        if self._up.state is _CLOSED and self._down.state is _CLOSED:
            assert self._reason is not None  # a source has ended
            self._finish(self._reason)
        elif flow is self._down:
            self._deadline = self._loop.time() + LINGER_SECONDS


def _receive(sock: socket.socket, buffer: memoryview) -> tuple[int, After]:
    try:
        count = sock.recv_into(buffer)
    except (BlockingIOError, InterruptedError):
        return 0, MORE
    return count, MORE if count else ENDED
