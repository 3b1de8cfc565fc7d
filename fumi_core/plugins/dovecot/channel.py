"""One connection to Dovecot for all requests of a process, opened when it is needed, and again after it was lost.

A request fails with ``Unavailable`` when Dovecot cannot be reached, closes the connection, violates the protocol or does not
answer in time. The log has a line when Dovecot becomes unavailable, and one when it is available again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

from fumi_core.client.exclusive import connect_error, open_connection
from fumi_core.plugins.dovecot.protocol import MAX_NUMBER, Conversation, DovecotReply, Malformed, line
from fumi_core.runtime.addresses import SocketAddress, parse_address
from fumi_core.runtime.logs import event

CONNECT_TIMEOUT = 5.0
"""Seconds until the connection is made and the server's handshake is complete."""
REPLY_TIMEOUT = 30.0
"""Seconds for a request, connecting included. Dovecot delays replies to failed logins, by up to 17 seconds for one client."""

_log = logging.getLogger("fumi.core")


class Unavailable(Exception):
    """There is no reply from Dovecot; the message says why."""


class TooLong(Exception):
    """The request is longer than the lines that Dovecot accepts. It was not sent."""


class Lost(Unavailable):
    """The connection ended before the reply."""


class Request(NamedTuple):
    """``verb`` and ``parameters`` are the command without its number; ``responses`` answer the server's challenges (CONT)."""

    verb: str
    parameters: Sequence[str]
    responses: Sequence[str] = ()


def server_address(plugin: str, text: str) -> SocketAddress:
    """The address of a server. Raises ValueError for a string that is not an address to connect to."""
    try:
        address = parse_address(text)
    except ValueError as error:
        raise ValueError(f"{plugin}: {error}") from None
    if address.kind == "fd" or (address.kind == "tcp" and not address.host):
        raise ValueError(f"{plugin}: {text!r} is not an address to connect to: write unix:/path or HOST:PORT")
    return address


class Channel:
    """The connection of one process to ``address``. It belongs to the event loop of its first request."""

    def __init__(self, address: SocketAddress, conversation: Callable[[], Conversation]) -> None:
        self.address = address
        self._conversation = conversation
        self._link: Link | None = None
        self._connecting: asyncio.Task[Link] | None = None
        self._down = False

    async def request(self, make: Callable[[Conversation], Request]) -> DovecotReply:
        """Send the request that ``make`` returns, and return its final reply. It may depend on the server's handshake.

        A request whose connection is lost is sent once more: Dovecot closes all connections when it restarts. Raises Unavailable,
        TooLong.
        """
        deadline = asyncio.get_running_loop().time() + REPLY_TIMEOUT
        try:
            try:
                reply = await self._request(make, deadline)
            except Lost:
                reply = await self._request(make, deadline)
        except Unavailable as error:
            self.failed(error)
            raise
        if self._down:
            self._down = False
            event(_log, logging.INFO, "Dovecot available", address=self.address)
        return reply

    async def _request(self, make: Callable[[Conversation], Request], deadline: float) -> DovecotReply:
        try:
            async with asyncio.timeout_at(deadline):
                link = await self.connect()
        except TimeoutError:
            raise Unavailable("no connection in time") from None
        return await link.request(make(link.conversation), deadline)

    def failed(self, error: Exception) -> None:
        """Log that Dovecot is unavailable, once until a request succeeds."""
        if not self._down:
            self._down = True
            event(_log, logging.ERROR, "Dovecot unavailable", address=self.address, error=error)

    @property
    def mechanisms(self) -> frozenset[str] | None:
        """The SASL mechanisms that Dovecot offered last; None before the first connection."""
        return self._link.conversation.mechanisms if self._link is not None else None

    async def connect(self) -> Link:
        """Return the open connection, or a new one; callers that wait share one attempt. Raises Unavailable."""
        if self._link is not None and self._link.lost is None:
            return self._link
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
            self._connecting.add_done_callback(self._connected)
        # One waiting client may disconnect; the others still need the connection.
        return await asyncio.shield(self._connecting)

    def _connected(self, task: asyncio.Task[Link]) -> None:
        self._connecting = None
        if not task.cancelled() and task.exception() is None:
            self._link = task.result()

    async def _connect(self) -> Link:
        link: Link | None = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                link = await open_connection(self._make, self.address, CONNECT_TIMEOUT)
                await link.ready
                return link
        except TimeoutError:
            raise Unavailable("no connection in time" if link is None else "no handshake in time") from None
        except OSError as error:
            raise Unavailable(connect_error(error)) from None
        finally:
            if link is not None and not link.conversation.ready:
                link.close("no handshake")

    def _make(self) -> Link:
        return Link(self._conversation())

    def close(self) -> None:
        """Close the connection. Requests under way fail."""
        if self._connecting is not None:
            self._connecting.cancel()
        if self._link is not None:
            self._link.close("closed")


class Link(asyncio.Protocol):
    """One connection. ``ready`` is done when the server's handshake is complete; ``lost`` says why the connection ended."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.lost: str | None = None
        self._loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self._last_reply = self._loop.time()  # when the server sent its last reply
        self._room = asyncio.Event()  # the server reads requests, or the connection has ended
        self._room.set()
        self._number = 0
        self._waiting: dict[int, _Waiting] = {}
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self.conversation.greeting())

    def data_received(self, data: bytes) -> None:
        if self.lost is not None:
            return
        try:
            for reply in self.conversation.feed(data):
                self._take(reply)
        except Malformed as error:
            self.close(f"unexpected data: {error}")
        if self.conversation.ready and not self.ready.done():
            self.ready.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.close(f"connection lost: {exc}" if exc else "connection closed")

    def pause_writing(self) -> None:
        self._room.clear()

    def resume_writing(self) -> None:
        self._room.set()

    def _take(self, reply: DovecotReply) -> None:
        self._last_reply = self._loop.time()
        waiting = self._waiting.get(reply.number)
        if waiting is None:
            if not 0 < reply.number <= self._number:
                raise Malformed(f"a reply to request {reply.number}, which was not sent")
            return  # to a request that was cancelled
        if reply.verb != "CONT":
            del self._waiting[reply.number]
            waiting.finish(reply)
        elif waiting.responses:
            self._transport.write(line("CONT", str(reply.number), waiting.responses.pop(0)))
        else:
            raise Malformed("a challenge that the mechanism does not have")

    async def request(self, request: Request, deadline: float) -> DovecotReply:
        """Send a request; return the reply that ends it. ``deadline`` is the loop's time. Raises Unavailable, TooLong."""
        begun = self._loop.time()
        if not self._room.is_set():
            await self._wait_for_room(begun, deadline)
        if self.lost is None and self._number >= MAX_NUMBER:
            self.close("all numbers of requests are used")
        if self.lost is not None:
            raise Lost(self.lost)
        number = self._number + 1
        command = line(request.verb, str(number), *request.parameters)
        longest = max(len(command), *(len(line("CONT", str(number), each)) for each in request.responses), 0)
        if longest > self.conversation.max_request:
            raise TooLong
        self._number = number
        self._waiting[number] = waiting = _Waiting(self._loop.create_future(), list(request.responses))
        self._transport.write(command)
        try:
            async with asyncio.timeout_at(deadline):
                return await waiting.answer
        except TimeoutError:
            raise self._late(begun) from None
        finally:
            if self._waiting.pop(number, None) is not None and self.lost is None and "CONT" in self.conversation.verbs:
                self._transport.write(line("CANCEL", str(number)))

    async def _wait_for_room(self, begun: float, deadline: float) -> None:
        """Wait while the server does not read: requests of clients that have disconnected must not accumulate here."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._room.wait()
        except TimeoutError:
            raise self._late(begun) from None

    def _late(self, begun: float) -> Unavailable:
        """The error of a request, begun at that time, that got no reply in time."""
        if self._last_reply < begun:
            # No request got a reply meanwhile: the server hangs. A new connection may reach a new process.
            self.close("no reply in time")
        return Unavailable("no reply in time")

    def close(self, reason: str) -> None:
        """Close the connection. All requests under way raise Lost."""
        if self.lost is not None:
            return
        self.lost = reason
        self._room.set()
        self._transport.abort()
        for each in self._waiting.values():
            each.fail(Lost(reason))
        if not self.ready.done():
            self.ready.set_exception(Unavailable(reason))
            self.ready.exception()  # there may be no caller that waits for it


class _Waiting(NamedTuple):
    """A request without its final reply."""

    answer: asyncio.Future[DovecotReply]
    responses: list[str]

    def finish(self, reply: DovecotReply) -> None:
        if not self.answer.done():
            self.answer.set_result(reply)

    def fail(self, error: Exception) -> None:
        with contextlib.suppress(asyncio.InvalidStateError):
            self.answer.set_exception(error)
