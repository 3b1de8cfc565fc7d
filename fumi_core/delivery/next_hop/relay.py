"""Sends a message to the next hop piece by piece: by DATA (RFC 5321 §4.1.1.4) or by BDAT (RFC 3030 §2).

An error before the last piece is raised, and the caller then aborts the connection: without the terminating dot, or LAST, the
next hop does not accept the message.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from fumi_core.client.commands import CONVERSION
from fumi_core.client.connection import DATA_TIMEOUT, Failure, NextHopConnection
from fumi_core.client.hop import Hop
from fumi_core.client.replies import ReceivedReply
from fumi_core.delivery.next_hop.verdicts import Verdict
from fumi_core.delivery.trace import Traced
from fumi_core.handlers.contexts import DataContext
from fumi_core.smtp import replies
from fumi_core.smtp.data import DotWriter

CHUNK_BYTES = 64 * 1024
"""Bytes, at least, of each chunk but the last."""


class Relay:
    """One message for the next hop, which sends ``count`` replies to it.

    Each piece is sent when it arrives. ``before_end`` is awaited when all but the end was sent: if it raises, the message is not
    delivered. ``on_wait`` is called with the verdicts so far, whenever the next reply is awaited.
    """

    __slots__ = ("_ctx", "_pieces", "before_end", "count", "on_wait")

    def __init__(self, ctx: DataContext, pieces: AsyncIterator[bytes], count: int) -> None:
        self.count = count
        self.before_end: Callable[[], Awaitable[None]] | None = None
        self.on_wait: Callable[[Sequence[Verdict]], None] | None = None
        self._ctx = ctx
        self._pieces = pieces

    async def run(self, connection: NextHopConnection) -> list[Verdict]:
        """Send our Received field, then the message, and return the verdicts.

        Raises Failure, SMTPError if the message must not be passed on, MessageAborted if it is incomplete.
        """
        if self._ctx.session.envelope.body == "BINARYMIME":
            return await self._by_bdat(connection)
        return await self._by_data(connection)

    async def _by_data(self, connection: NextHopConnection) -> list[Verdict]:
        reply = await connection.send_command(b"DATA", DATA_TIMEOUT, good=3)
        if not reply.positive:
            return [reply] * self.count
        seven_bit = "8BITMIME" not in connection.extensions
        dots = DotWriter()
        message = self._traced()
        async for piece in self._pieces:
            if seven_bit and not piece.isascii():
                self._ctx.reject(*CONVERSION)
            await connection.send(dots.feed(message.feed(piece)))
        await self._end()
        return await connection.finish(dots.feed(message.end()) + dots.end(), self.count, self.on_wait)

    async def _by_bdat(self, connection: NextHopConnection) -> list[Verdict]:
        message = self._traced()
        batch: list[bytes] = []
        size = 0
        async for piece in self._pieces:
            batch.append(message.feed(piece))
            size += len(batch[-1])
            if size >= CHUNK_BYTES:
                reply = await connection.send_chunk(b"".join(batch))
                if not reply.positive:
                    return [reply] * self.count
                batch, size = [], 0
        await self._end()
        batch.append(message.end())
        size += len(batch[-1])
        return await connection.finish(b"BDAT %d LAST\r\n%b" % (size, b"".join(batch)), self.count, self.on_wait)

    def _traced(self) -> Traced:
        return Traced(self._ctx.session.received_header().encode())

    async def _end(self) -> None:
        reject_oversize(self._ctx)
        if self.before_end is not None:
            await self.before_end()


async def send(hop: Hop, relay: Relay, connection: NextHopConnection) -> list[Verdict]:
    """Send the message, give the connection back to ``hop``, and return the verdicts.

    Raises SMTPError and MessageAborted as ``Relay.run()`` does, after aborting the connection.
    """
    try:
        verdicts = await relay.run(connection)
    except Failure as failure:
        verdicts = [failure.reply or failure] * relay.count
    except BaseException:
        connection.abort()
        raise
    hop.give_back(connection, clean=all(isinstance(each, ReceivedReply) and each.positive for each in verdicts))
    return verdicts


def reject_oversize(ctx: DataContext) -> None:
    if ctx.size_exceeded:
        ctx.reject(*replies.TOO_LARGE)
