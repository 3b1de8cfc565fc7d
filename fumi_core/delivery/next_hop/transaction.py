"""The next hop's side of a client's transaction, from MAIL to its end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from fumi_core.client.connection import NextHopConnection
from fumi_core.delivery.next_hop.reply_memory import MessageReplies
from fumi_core.delivery.next_hop.verdicts import Verdict, final
from fumi_core.errors import SMTPError
from fumi_core.smtp.session import Address


class Transaction:
    """Its connection, the recipients that the next hop accepted, in order, and the error that ended it early.

    ``connection`` is None once the message has begun. ``replies`` is set if the replies have to be remembered; ``rejected`` are
    recipients with a remembered rejection.
    """

    __slots__ = ("connection", "ended", "recipients", "rejected", "replies", "sender")

    def __init__(self, connection: NextHopConnection, sender: Address, replies: MessageReplies | None) -> None:
        self.connection: NextHopConnection | None = connection
        self.sender = sender
        self.replies = replies
        self.recipients: dict[str, Address] = {}
        self.rejected: dict[str, SMTPError] = {}
        self.ended: SMTPError | None = None


def being_delivered() -> SMTPError:
    """The reply to a message whose delivery is in progress already."""
    return SMTPError("4.2.0 This message is being delivered, try again later", 451)


async def begin_new(replies: MessageReplies, recipients: Sequence[str]) -> None:
    """Raises SMTPError if the message turns out to be a repeated one: nothing was delivered yet."""
    known = await replies.begin(recipients, alone=len(recipients) > 1)
    if known is None:
        raise being_delivered()
    if known:
        raise SMTPError("4.2.0 This message was delivered to some recipients meanwhile, try again later", 451)


def recorder(replies: MessageReplies, recipients: Iterable[str]) -> Callable[[Sequence[Verdict]], None]:
    """Return a function that records the verdicts received so far, for these recipients in this order."""
    names = list(recipients)
    return lambda verdicts: replies.record(final(dict(zip(names, verdicts, strict=False))))
