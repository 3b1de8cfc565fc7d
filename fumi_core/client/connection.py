"""One connection to an SMTP or LMTP server: sends commands, receives replies, with the timeouts of RFC 5321 §4.5.3.2.

One transaction uses a connection at a time, and each command is owed one reply. An unsolicited reply, a timeout or a cancelled
wait leaves client and server out of step and therefore closes the connection. The cause is a ``Failure``, which every later call
raises.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from fumi_core.client.exclusive import ExclusiveConnection, connect_error, open_connection
from fumi_core.client.replies import Malformed, ReceivedReply, ReplyReader
from fumi_core.runtime.addresses import THIS_HOST, Networks, SocketAddress, peer_of

CONNECT_TIMEOUT = 30.0
"""In seconds, as the following."""
MAIL_TIMEOUT = 300.0
"""For MAIL's reply (§4.5.3.2.2). On a new connection the banner and EHLO's reply count too."""
RCPT_TIMEOUT = 300.0
DATA_TIMEOUT = 120.0
BLOCK_TIMEOUT = 180.0
"""For the server to take a part of the message (§4.5.3.2.5)."""
RSET_TIMEOUT = 30.0  # a new connection is faster
END_TIMEOUT = 600.0
"""For the reply to the whole message (§4.5.3.2.6)."""

Dialect = Literal["smtp", "lmtp"]
_THIS_HOST = Networks(THIS_HOST)


class Failure(Exception):
    """The server cannot be used: ``text``, with its enhanced status code, is for the client, the exception's message for the log.

    ``reply`` is an unsolicited rejection that the server sent before it disconnected.
    """

    def __init__(self, text: str, detail: str, reply: ReceivedReply | None = None) -> None:
        super().__init__(detail)
        self.text = text
        self.reply = reply


def unreachable(detail: str) -> Failure:
    return Failure("4.4.1 Next hop is not available, try again later", detail)


def lost(detail: str) -> Failure:
    return Failure("4.4.2 Lost connection to the next hop", detail)


def timed_out(detail: str) -> Failure:
    return Failure("4.4.2 Next hop timed out", detail)


def protocol_error(detail: str) -> Failure:
    return Failure("4.5.0 Next hop protocol error", detail)


async def connect(address: SocketAddress, protocol: Dialect, name: str, timeout: float) -> NextHopConnection:
    """Connect within ``timeout`` seconds, and send EHLO or LHLO with ``name``. Raises Failure."""
    try:
        connection = await open_connection(NextHopConnection, address, timeout)
    except TimeoutError:
        raise unreachable("no connection in time") from None
    except OSError as error:
        raise unreachable(connect_error(error)) from None
    try:
        await connection.greet(protocol, name)
    except BaseException:
        connection.abort()
        raise
    return connection


class NextHopConnection(ExclusiveConnection[Failure]):
    """``extensions`` are those that EHLO offered; ``local`` tells that the server is on this host."""

    def __init__(self) -> None:
        super().__init__()
        self.extensions: dict[str, str] = {}
        self.local = False
        self._reader = ReplyReader()
        self._replies: deque[ReceivedReply] = deque()
        self._outstanding = 1  # number of outstanding replies; the banner is the first

    def _lost(self, detail: str) -> Failure:
        return lost(detail)

    def _timed_out(self) -> Failure:
        return timed_out("no reply in time")

    # Calls by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.local = peer_of(transport.get_extra_info("peername"))[0] in _THIS_HOST

    def data_received(self, data: bytes) -> None:
        if self._failure is not None:
            return
        try:
            for reply in self._reader.feed(data):
                if self._outstanding == 0:
                    self._fail(_unsolicited(reply))
                    return
                self._outstanding -= 1
                self._replies.append(reply)
        except Malformed as error:
            self._fail(protocol_error(str(error)))
        self._wake()

    # Commands and replies

    async def greet(self, protocol: Dialect, name: str) -> None:
        """Read the banner and send LHLO, or EHLO and, if that is rejected, HELO. Raises Failure."""
        banner = await self.receive_reply(MAIL_TIMEOUT)
        if banner.code != 220:
            raise unreachable(f"unexpected banner: {banner}")
        hello = b"LHLO" if protocol == "lmtp" else b"EHLO"
        reply = await self.send_command(b"%b %b" % (hello, name.encode()), MAIL_TIMEOUT)
        if reply.positive:
            self.extensions = reply.extensions
        elif protocol == "smtp" and reply.code >= 500:
            reply = await self.send_command(b"HELO %b" % name.encode(), MAIL_TIMEOUT)
        if not reply.positive:
            raise unreachable(f"unexpected reply to EHLO: {reply}")

    async def send_command(self, line: bytes, seconds: float, good: int = 2) -> ReceivedReply:
        """Send a command, given without its CRLF, and return its reply. Raises Failure."""
        self._raise_failure()
        self._outstanding += 1
        self._transport.write(line + b"\r\n")
        return await self.receive_reply(seconds, good)

    async def receive_reply(self, seconds: float, good: int = 2) -> ReceivedReply:
        """Return the next outstanding reply: a rejection, or one whose code begins with ``good``. Raises Failure."""
        await self._wait_until(lambda: bool(self._replies), seconds)
        reply = self._replies.popleft()
        if reply.positive and reply.code // 100 != good:
            self._fail(protocol_error(f"unexpected reply {reply}"))
            self._raise_failure()
        return reply

    async def send(self, data: bytes) -> None:
        """Send a part of the message; returns when there is room for more. Raises Failure, also for an early reply."""
        self._raise_failure()
        self._transport.write(data)
        await self._wait_for_room(BLOCK_TIMEOUT)

    async def finish(
        self, data: bytes, count: int, on_wait: Callable[[Sequence[ReceivedReply | Failure]], None] | None = None
    ) -> list[ReceivedReply | Failure]:
        """Send the last part of the message. Returns ``count`` replies, with a Failure in place of each missing one.

        ``on_wait`` is called with the replies so far, at least one, whenever the next one is awaited. Raises Failure.
        """
        self._raise_failure()
        self._outstanding += count
        self._transport.write(data)
        verdicts: list[ReceivedReply | Failure] = []
        deadline = self._loop.time() + END_TIMEOUT
        for _ in range(count):
            if on_wait is not None and verdicts and not self._replies:
                on_wait(verdicts)
            try:
                verdicts.append(await self.receive_reply(deadline - self._loop.time()))
            except Failure as failure:
                verdicts.append(failure)
        return verdicts

    async def send_chunk(self, data: bytes) -> ReceivedReply:
        """Send a chunk, with others to follow (RFC 3030 §2), and return its reply. Raises Failure."""
        self._raise_failure()
        self._outstanding += 1
        self._transport.write(b"BDAT %d\r\n" % len(data))
        self._transport.write(data)
        return await self.receive_reply(BLOCK_TIMEOUT)

    # The end of a transaction, and of the connection

    @property
    def resetting(self) -> bool:
        """Whether RSET was sent and its reply is still to be read."""
        return self._outstanding > 0 or bool(self._replies)

    def reset(self) -> None:
        """Send RSET; the next user of the connection must first read its reply."""
        if self.usable:
            self._outstanding += 1
            self._transport.write(b"RSET\r\n")

    def quit(self) -> None:
        """Send QUIT and close; the reply is not needed."""
        self._close(b"QUIT\r\n")


def _unsolicited(reply: ReceivedReply) -> Failure:
    """A server sends the reason before it disconnects (RFC 5321 §3.8); any other unsolicited reply is an error."""
    if reply.code < 400:
        return protocol_error(f"unsolicited reply {reply}")
    return Failure(lost("").text, f"unsolicited reply {reply}", reply)
