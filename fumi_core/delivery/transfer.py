"""A message on its way to the next hop, piece by piece as it arrives: by DATA (RFC 5321 §4.1.1.4) or by BDAT (RFC 3030 §2).

Whatever goes wrong before the last piece is raised, and whoever catches it cuts the connection: without the terminating dot, or
LAST, the next hop has no message.
"""

from __future__ import annotations

from fumi_core.client.answers import Answer
from fumi_core.client.commands import CONVERSION
from fumi_core.client.connection import DATA, Connection, Failure
from fumi_core.contexts import DataContext
from fumi_core.data import DotWriter
from fumi_core.delivery.trace import Traced

CHUNK = 64 * 1024
"""Octets, at least, of each chunk but the last."""

Verdict = Answer | Failure
"""What became of the message, for a recipient or for all: the next hop's reply, or why there is none."""


async def transfer(connection: Connection, ctx: DataContext, count: int) -> list[Verdict]:
    """Pass the message on, with our Received line in front, and get its ``count`` verdicts.

    Raises Failure, SMTPError where the message must not go on, MessageAborted where it does not.
    """
    if ctx.session.envelope.body == "BINARYMIME":
        return await _by_bdat(connection, ctx, count)
    return await _by_data(connection, ctx, count)


async def _by_data(connection: Connection, ctx: DataContext, count: int) -> list[Verdict]:
    answer = await connection.say(b"DATA", DATA, good=3)
    if not answer.positive:
        return [answer] * count
    seven_bit = "8BITMIME" not in connection.extensions
    dots = DotWriter()
    message = Traced(ctx.session.received_header().encode())
    async for piece in ctx.stream:
        if seven_bit and not piece.isascii():
            ctx.reject(*CONVERSION)
        await connection.send(dots.feed(message.feed(piece)))
    _reject_oversize(ctx)
    return await connection.finish(dots.feed(message.end()) + dots.end(), count)


async def _by_bdat(connection: Connection, ctx: DataContext, count: int) -> list[Verdict]:
    message = Traced(ctx.session.received_header().encode())
    batch: list[bytes] = []
    size = 0
    async for piece in ctx.stream:
        batch.append(message.feed(piece))
        size += len(batch[-1])
        if size >= CHUNK:
            answer = await connection.chunk(b"".join(batch))
            if not answer.positive:
                return [answer] * count
            batch, size = [], 0
    _reject_oversize(ctx)
    batch.append(message.end())
    size += len(batch[-1])
    return await connection.finish(b"BDAT %d LAST\r\n%b" % (size, b"".join(batch)), count)


def _reject_oversize(ctx: DataContext) -> None:
    if ctx.size_exceeded:
        ctx.reject("5.3.4 Message too large", 552)
