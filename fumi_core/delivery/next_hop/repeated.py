"""A message that the next hop may have received before, for some of its recipients.

It is kept until its content is known, and then sent to the recipients that still need it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from fumi_core.client.commands import rcpt_command
from fumi_core.client.connection import RCPT_TIMEOUT, Failure
from fumi_core.client.hop import Hop
from fumi_core.client.replies import ReceivedReply
from fumi_core.delivery.next_hop.relay import Relay, reject_oversize, send
from fumi_core.delivery.next_hop.reply_memory import MessageReplies
from fumi_core.delivery.next_hop.transaction import Transaction, being_delivered, recorder
from fumi_core.delivery.next_hop.verdicts import Verdict
from fumi_core.errors import SMTPError
from fumi_core.handlers.contexts import DataContext
from fumi_core.handlers.spool import Spool
from fumi_core.runtime.logs import event
from fumi_core.smtp import replies as texts
from fumi_core.smtp.session import Address

_log = logging.getLogger("fumi.core")


async def pass_on_again(
    hop: Hop, ctx: DataContext, transaction: Transaction, replies: MessageReplies, directory: Path | None
) -> dict[str, Verdict]:
    """Return the verdict for each recipient: remembered, or the next hop's. ``directory`` is where the message is kept.

    Raises SMTPError if the message is being delivered already, or cannot be kept; MessageAborted if it is incomplete.
    """
    spool = Spool(directory)
    try:
        await _keep(ctx, spool)
        known = await replies.begin(transaction.recipients, alone=True)
        if known is None:
            raise being_delivered()
        left = {name: address for name, address in transaction.recipients.items() if name not in known}
        sent = await _send_to(hop, ctx, spool, transaction.sender, left, replies) if left else {}
        return {name: known.get(name) or sent[name] for name in transaction.recipients}
    finally:
        spool.close()


async def _keep(ctx: DataContext, spool: Spool) -> None:
    try:
        async for piece in ctx.stream:
            await spool.write(piece)
    except OSError as error:
        event(_log, logging.ERROR, "cannot spool message", id=ctx.session.id, error=error.strerror or error)
        raise SMTPError(*texts.INSUFFICIENT_STORAGE) from None
    reject_oversize(ctx)


async def _send_to(
    hop: Hop, ctx: DataContext, spool: Spool, sender: Address, recipients: Mapping[str, Address], replies: MessageReplies
) -> dict[str, Verdict]:
    """Send a whole transaction for these recipients. A rejection of MAIL or RCPT is a verdict like any other."""
    verdicts: dict[str, Verdict] = {}
    try:
        connection, reply = await hop.mail(ctx.session, sender)
        if not reply.positive:
            hop.give_back(connection, clean=True)
            return dict.fromkeys(recipients, reply)
        for name, address in recipients.items():
            reply = await connection.send_command(rcpt_command(address, connection), RCPT_TIMEOUT)
            if not reply.positive:
                verdicts[name] = reply
        accepted = [name for name in recipients if name not in verdicts]
        if not accepted:
            hop.give_back(connection, clean=False)
            return verdicts
        relay = Relay(ctx, spool.read(), len(accepted))
        relay.on_wait = recorder(replies, accepted)
        verdicts.update(zip(accepted, await send(hop, relay, connection), strict=True))
    except Failure as failure:
        return {**dict.fromkeys(recipients, failure), **verdicts}
    except SMTPError as error:
        return {**dict.fromkeys(recipients, ReceivedReply(error.code, tuple(error.message.split("\n")))), **verdicts}
    return verdicts
