"""One connection to an SMTP or LMTP server: sends commands, receives replies, with the timeouts of RFC 5321 §4.5.3.2.

One transaction uses a connection at a time, and each command is owed one reply. An unsolicited reply, a timeout or a cancelled
wait leaves client and server out of step and therefore closes the connection. The cause is a ``Failure``, which every later call
raises.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from fumi_core.client.answers import Answer, AnswerReader, Malformed
from fumi_core.runtime.addresses import THIS_HOST, Networks, SocketAddress, peer_of

CONNECT = 30.0
"""Seconds to connect. The other limits are seconds, too."""
MAIL = 300.0
"""For MAIL's reply (§4.5.3.2.2). On a new connection the banner and EHLO's reply count too."""
RCPT = 300.0
DATA = 120.0
BLOCK = 180.0
"""For the server to take a part of the message (§4.5.3.2.5)."""
RSET = 30.0  # a new connection is faster
END = 600.0
"""For the reply to the whole message (§4.5.3.2.6)."""
ATTEMPT = 0.25  # until the next address of a host name is also tried (RFC 8305 §5)

Dialect = Literal["smtp", "lmtp"]
_THIS_HOST = Networks(THIS_HOST)


class Failure(Exception):
    """The server cannot be used: ``text``, with its enhanced status code, is for the client, the exception's message for the log.

    ``answer`` is an unsolicited rejection that the server sent before it disconnected.
    """

    def __init__(self, text: str, detail: str, answer: Answer | None = None) -> None:
        super().__init__(detail)
        self.text = text
        self.answer = answer


def unreachable(detail: str) -> Failure:
    return Failure("4.4.1 Next hop is not available, try again later", detail)


def lost(detail: str) -> Failure:
    return Failure("4.4.2 Lost connection to the next hop", detail)


def late(detail: str) -> Failure:
    return Failure("4.4.2 Next hop timed out", detail)


def nonsense(detail: str) -> Failure:
    return Failure("4.5.0 Next hop broke the protocol", detail)


async def connect(address: SocketAddress, protocol: Dialect, name: str) -> NextHopConnection:
    """Connect, and send EHLO or LHLO with ``name``. Raises Failure."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT):
            if address.kind == "unix":
                _, connection = await loop.create_unix_connection(NextHopConnection, address.path)
            else:
                _, connection = await loop.create_connection(
                    NextHopConnection, address.host, address.port, happy_eyeballs_delay=ATTEMPT
                )
    except TimeoutError:
        raise unreachable("no connection in time") from None
    except OSError as error:
        raise unreachable(error.strerror or str(error)) from None
    try:
        await connection.greet(protocol, name)
    except BaseException:
        connection.cut()
        raise
    return connection


class NextHopConnection(asyncio.Protocol):
    """``extensions`` are those that EHLO offered; ``local`` tells that the server is on this host."""

    def __init__(self) -> None:
        self.extensions: dict[str, str] = {}
        self.local = False
        self._loop = asyncio.get_running_loop()
        self._reader = AnswerReader()
        self._answers: deque[Answer] = deque()
        self._owed = 1  # replies that are outstanding; the banner is the first
        self._failure: Failure | None = None
        self._blocked = False
        self._waiter: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport

    # Calls by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.local = peer_of(transport.get_extra_info("peername"))[0] in _THIS_HOST

    def data_received(self, data: bytes) -> None:
        if self._failure is not None:
            return
        try:
            for answer in self._reader.feed(data):
                if self._owed == 0:
                    self._fail(_unasked(answer))
                    return
                self._owed -= 1
                self._answers.append(answer)
        except Malformed as error:
            self._fail(nonsense(str(error)))
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(lost(f"it closed the connection: {exc}" if exc else "it closed the connection"))

    def pause_writing(self) -> None:
        self._blocked = True

    def resume_writing(self) -> None:
        self._blocked = False
        self._wake()

    # Commands and replies

    async def greet(self, protocol: Dialect, name: str) -> None:
        """Read the banner and send LHLO, or EHLO and, if that is rejected, HELO. Raises Failure."""
        banner = await self.hear(MAIL)
        if banner.code != 220:
            raise unreachable(f"it greeted with {banner}")
        hello = b"LHLO" if protocol == "lmtp" else b"EHLO"
        answer = await self.say(b"%b %b" % (hello, name.encode()), MAIL)
        if answer.positive:
            self.extensions = answer.extensions
        elif protocol == "smtp" and answer.code >= 500:
            answer = await self.say(b"HELO %b" % name.encode(), MAIL)
        if not answer.positive:
            raise unreachable(f"it answered the greeting {answer}")

    async def say(self, line: bytes, seconds: float, good: int = 2) -> Answer:
        """Send a command, given without its CRLF, and return its reply. Raises Failure."""
        self._check()
        self._owed += 1
        self._transport.write(line + b"\r\n")
        return await self.hear(seconds, good)

    async def hear(self, seconds: float, good: int = 2) -> Answer:
        """Return the next outstanding reply: a rejection, or one whose code begins with ``good``. Raises Failure."""
        await self._until(lambda: bool(self._answers), seconds)
        answer = self._answers.popleft()
        if answer.positive and answer.code // 100 != good:
            self._fail(nonsense(f"it said {answer}, out of place"))
            self._check()
        return answer

    async def send(self, data: bytes) -> None:
        """Send a part of the message; returns when there is room for more. Raises Failure, also for an early reply."""
        self._check()
        self._transport.write(data)
        if self._blocked:
            await self._until(lambda: not self._blocked, BLOCK)

    async def finish(
        self, data: bytes, count: int, waiting: Callable[[Sequence[Answer | Failure]], None] | None = None
    ) -> list[Answer | Failure]:
        """Send the last part of the message. Returns ``count`` replies, with a Failure in place of each missing one.

        ``waiting`` is called with the replies so far, at least one, whenever the next one is awaited. Raises Failure.
        """
        self._check()
        self._owed += count
        self._transport.write(data)
        verdicts: list[Answer | Failure] = []
        deadline = self._loop.time() + END
        for _ in range(count):
            if waiting is not None and verdicts and not self._answers:
                waiting(verdicts)
            try:
                verdicts.append(await self.hear(deadline - self._loop.time()))
            except Failure as failure:
                verdicts.append(failure)
        return verdicts

    async def chunk(self, data: bytes) -> Answer:
        """Send a chunk, with others to follow (RFC 3030 §2), and return its reply. Raises Failure."""
        self._check()
        self._owed += 1
        self._transport.write(b"BDAT %d\r\n" % len(data))
        self._transport.write(data)
        return await self.hear(BLOCK)

    # The end of a transaction, and of the connection

    @property
    def usable(self) -> bool:
        return self._failure is None

    @property
    def resetting(self) -> bool:
        """Whether RSET was sent and its reply is still to be read."""
        return self._owed > 0 or bool(self._answers)

    def reset(self) -> None:
        """Send RSET; the next user of the connection must first read its reply."""
        if self.usable:
            self._owed += 1
            self._transport.write(b"RSET\r\n")

    def leave(self) -> None:
        """Send QUIT and close; the reply is not needed."""
        if self.usable:
            self._transport.write(b"QUIT\r\n")
            self._failure = lost("we closed the connection")
            self._transport.close()

    def cut(self) -> None:
        """Abort the connection: a transaction in progress must not be completed."""
        self._fail(lost("we cut the connection"))

    def _fail(self, failure: Failure) -> None:
        if self._failure is None:
            self._failure = failure
            self._transport.abort()
            self._wake()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure.with_traceback(None)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _until(self, ready: Callable[[], Any], seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not ready():
                    self._check()
                    self._waiter = self._loop.create_future()
                    await self._waiter
        except TimeoutError:
            self._fail(late("no answer in time"))
            self._check()
        except asyncio.CancelledError:
            self.cut()
            raise


def _unasked(answer: Answer) -> Failure:
    """A server sends the reason before it disconnects (RFC 5321 §3.8); any other unsolicited reply is an error."""
    if answer.code < 400:
        return nonsense(f"it said {answer}, unasked")
    return Failure(lost("").text, f"it said {answer}, unasked", answer)
