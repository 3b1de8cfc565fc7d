"""One connection to a filter: sends what happens, and waits for the answer to each step.

An answer that comes too late, that nobody waits for or that breaks the protocol ends the connection. The reason is a
``MilterFailure``, which every later call raises.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

from fumi_core.client.connection import NEXT_ADDRESS_SECONDS
from fumi_core.plugins.milter import wire
from fumi_core.plugins.milter.agreement import Agreement, Stage, offer, read_agreement
from fumi_core.plugins.milter.wire import Change, Malformed, PacketReader, ReplyCode, Verdict, parse_answer
from fumi_core.runtime.addresses import SocketAddress

CHECK_TIMEOUT = 5.0
"""Seconds that ``problem()`` has to connect, and for the answer."""
HIGH_WATER_BYTES = 256 * 1024
"""Bytes of answers that may wait to be read; above that, the socket is not read."""


class MilterFailure(Exception):
    """The filter cannot be asked, or has not answered in a way that can be followed. The message says why."""


async def connect(address: SocketAddress, connect_timeout: float, command_timeout: float) -> MilterConnection:
    """Connect and negotiate. Raises MilterFailure."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(connect_timeout):
            if address.kind == "unix":
                _, connection = await loop.create_unix_connection(MilterConnection, address.path)
            else:
                _, connection = await loop.create_connection(
                    MilterConnection, address.host, address.port, happy_eyeballs_delay=NEXT_ADDRESS_SECONDS
                )
    except TimeoutError:
        raise MilterFailure("no connection in time") from None
    except OSError as error:
        # asyncio's own text for a refused connection is "Connect call failed".
        number = error.errno or 0
        raise MilterFailure(os.strerror(number) if number > 0 else error.strerror or str(error)) from None
    try:
        await connection.negotiate(command_timeout)
    except BaseException:
        connection.abort()
        raise
    return connection


async def problem(address: SocketAddress) -> str | None:
    """Why the filter cannot be asked, in a few words; None when it can."""
    try:
        connection = await connect(address, CHECK_TIMEOUT, CHECK_TIMEOUT)
    except MilterFailure as failure:
        return str(failure)
    connection.quit()
    return None


class MilterConnection(asyncio.Protocol):
    """``agreement`` is there after ``negotiate()``."""

    agreement: Agreement

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._reader = PacketReader()
        self._packets: deque[tuple[bytes, bytes]] = deque()
        self._unread = 0
        self._asking = False
        self._failure: MilterFailure | None = None
        self._blocked = False
        self._waiter: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport

    # Calls by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._failure is not None:
            return
        if not self._asking:
            self._fail("an answer without a question")
            return
        try:
            for packet in self._reader.feed(data):
                self._packets.append(packet)
                self._unread += len(packet[1])
        except Malformed as error:
            self._fail(str(error))
        if self._unread > HIGH_WATER_BYTES:
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"connection lost: {exc}" if exc else "connection closed")

    def pause_writing(self) -> None:
        self._blocked = True

    def resume_writing(self) -> None:
        self._blocked = False
        self._wake()

    # Questions and answers

    async def negotiate(self, seconds: float) -> None:
        """Raises MilterFailure."""
        self._asking = True
        self._transport.write(offer())
        letter, data = await self._receive(seconds)
        try:
            self.agreement = read_agreement(letter, data)
        except Malformed as error:
            self._fail(str(error))
        self._end_of_answer()

    async def ask(
        self,
        stage: Stage,
        data: bytes,
        macros: Mapping[str, str],
        seconds: float,
        change: Callable[[Change], Awaitable[None]] | None = None,
    ) -> Verdict | ReplyCode:
        """Report a step, and return the answer: CONTINUE if the filter does not want the step, or does not answer it.

        ``seconds`` is for each packet of the answer. ``change`` is called for each change of the message. Raises MilterFailure.
        """
        self._raise_failure()
        packets = wire.macros(stage.letter, macros) if macros else b""
        wanted = self.agreement.wants(stage)
        self._asking = wanted and self.agreement.answers(stage)
        self._transport.write(packets + wire.packet(stage.letter, data) if wanted else packets)
        if self._blocked:
            await self._wait_until(lambda: not self._blocked, seconds)
        if not self._asking:
            return Verdict.CONTINUE
        try:
            return await self._answer(stage, seconds, change)
        except BaseException:
            self.abort()
            raise

    async def _answer(
        self, stage: Stage, seconds: float, change: Callable[[Change], Awaitable[None]] | None
    ) -> Verdict | ReplyCode:
        while True:
            letter, data = await self._receive(seconds)
            try:
                answer = parse_answer(letter, data)
                self.agreement.check(stage, answer)
            except Malformed as error:
                raise MilterFailure(str(error)) from None
            if isinstance(answer, Verdict | ReplyCode):
                if answer is not Verdict.PROGRESS:
                    self._end_of_answer()
                    return answer
            elif change is not None:
                await change(answer)

    def _end_of_answer(self) -> None:
        """Raises MilterFailure when more has arrived than the answer."""
        self._asking = False
        if self._packets or self._reader.partial:
            self._fail("a second answer")
        self._raise_failure()

    async def _receive(self, seconds: float) -> tuple[bytes, bytes]:
        await self._wait_until(lambda: bool(self._packets), seconds)
        packet = self._packets.popleft()
        self._unread -= len(packet[1])
        if self._unread <= HIGH_WATER_BYTES:
            self._transport.resume_reading()
        return packet

    # The end

    @property
    def usable(self) -> bool:
        return self._failure is None

    def abort_message(self) -> None:
        """The message will not be completed; the next one may follow."""
        if self.usable:
            self._transport.write(wire.ABORT)

    def end_session(self) -> None:
        """The client has gone, and another one may follow."""
        if self.usable:
            self._transport.write(wire.QUIT_NEW_CONNECTION)

    def quit(self) -> None:
        if self.usable:
            self._transport.write(wire.QUIT)
            self._failure = MilterFailure("connection closed")
            self._transport.close()

    def abort(self) -> None:
        self._fail("connection aborted")

    def _fail(self, problem: str) -> None:
        if self._failure is None:
            self._failure = MilterFailure(problem)
            self._transport.abort()
            self._wake()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure.with_traceback(None)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait_until(self, ready: Callable[[], Any], seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not ready():
                    self._raise_failure()
                    self._waiter = self._loop.create_future()
                    await self._waiter
        except TimeoutError:
            self._fail("no answer in time")
            self._raise_failure()
        except asyncio.CancelledError:
            self.abort()
            raise
