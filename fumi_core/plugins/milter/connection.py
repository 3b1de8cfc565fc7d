"""One connection to a filter: sends the steps of a session, and waits for the answer to each.

An answer that is late, unsolicited or violates the protocol ends the connection. The reason is a ``MilterFailure``, which every
later call raises.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Mapping

from fumi_core.client.exclusive import ExclusiveConnection, connect_error, open_connection
from fumi_core.plugins.milter import wire
from fumi_core.plugins.milter.agreement import Agreement, Stage, offer, read_agreement
from fumi_core.plugins.milter.wire import Change, Malformed, PacketReader, ReplyCode, Verdict, parse_answer
from fumi_core.runtime.addresses import SocketAddress

CHECK_TIMEOUT = 5.0
"""Time limits of ``problem()``, in seconds: to connect, and for the answer."""
HIGH_WATER_BYTES = 256 * 1024
"""Bytes of answers that may be queued; above that, the socket is not read."""
PACKET_BYTES = 128
"""Bytes that a queued packet takes besides its data."""


class MilterFailure(Exception):
    """The filter cannot be reached, is too slow, or violates the protocol. The message says which."""


async def connect(address: SocketAddress, connect_timeout: float, command_timeout: float) -> MilterConnection:
    """Connect and negotiate. Raises MilterFailure."""
    try:
        connection = await open_connection(MilterConnection, address, connect_timeout)
    except TimeoutError:
        raise MilterFailure("no connection in time") from None
    except OSError as error:
        raise MilterFailure(connect_error(error)) from None
    try:
        await connection.negotiate(command_timeout)
    except BaseException:
        connection.abort()
        raise
    return connection


async def problem(address: SocketAddress) -> str | None:
    """Why the filter does not work, in a few words; None when it does."""
    try:
        connection = await connect(address, CHECK_TIMEOUT, CHECK_TIMEOUT)
    except MilterFailure as failure:
        return str(failure)
    connection.quit()
    return None


class MilterConnection(ExclusiveConnection[MilterFailure]):
    """``agreement`` is set by ``negotiate()``."""

    agreement: Agreement

    def __init__(self) -> None:
        super().__init__()
        self._reader = PacketReader()
        self._packets: deque[tuple[bytes, bytes]] = deque()
        self._unread = 0
        self._answer_due = False

    def _lost(self, detail: str) -> MilterFailure:
        return MilterFailure(detail)

    def _timed_out(self) -> MilterFailure:
        return MilterFailure("no answer in time")

    def data_received(self, data: bytes) -> None:
        if self._failure is not None:
            return
        if not self._answer_due:
            self._fail(MilterFailure("unsolicited data"))
            return
        try:
            for packet in self._reader.feed(data):
                self._packets.append(packet)
                self._unread += PACKET_BYTES + len(packet[1])
        except Malformed as error:
            self._fail(MilterFailure(str(error)))
        if self._unread > HIGH_WATER_BYTES:
            self._transport.pause_reading()
        self._wake()

    # Steps and answers

    async def negotiate(self, seconds: float) -> None:
        """Raises MilterFailure."""
        self._answer_due = True
        self._transport.write(offer())
        letter, data = await self._receive(seconds)
        try:
            self.agreement = read_agreement(letter, data)
        except Malformed as error:
            self._fail(MilterFailure(str(error)))
        self._end_of_answer()

    async def send(
        self,
        stage: Stage,
        data: bytes,
        macros: Mapping[str, str],
        seconds: float,
        change: Callable[[Change], Awaitable[None]] | None = None,
    ) -> Verdict | ReplyCode:
        """Send a step, and return the answer: CONTINUE if the filter does not want the step, or does not answer it.

        ``seconds`` is for each packet of the answer. ``change`` is called for each change of the message. Raises MilterFailure.
        """
        self._raise_failure()
        packets = wire.macros(stage.letter, macros) if macros else b""
        wanted = self.agreement.wants(stage)
        self._answer_due = wanted and self.agreement.answers(stage)
        self._transport.write(packets + wire.packet(stage.letter, data) if wanted else packets)
        await self._wait_for_room(seconds)
        if not self._answer_due:
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
        """Raises MilterFailure if data follows the answer."""
        self._answer_due = False
        if self._packets or self._reader.partial:
            self._fail(MilterFailure("unsolicited data after an answer"))
        self._raise_failure()

    async def _receive(self, seconds: float) -> tuple[bytes, bytes]:
        await self._wait_until(lambda: bool(self._packets), seconds)
        packet = self._packets.popleft()
        self._unread -= PACKET_BYTES + len(packet[1])
        if self._unread <= HIGH_WATER_BYTES:
            self._transport.resume_reading()
        return packet

    # The end

    def abort_message(self) -> None:
        """The message will not be completed; the next one may follow."""
        if self.usable:
            self._transport.write(wire.ABORT)

    def end_session(self) -> None:
        """The client has disconnected; another one may follow."""
        if self.usable:
            self._transport.write(wire.QUIT_NEW_CONNECTION)

    def quit(self) -> None:
        self._close(wire.QUIT)
