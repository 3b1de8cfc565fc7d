"""``dovecot_users(address)``: looks up recipients in Dovecot, on its ``auth-userdb`` socket."""

from __future__ import annotations

from collections.abc import Callable

from fumi_core.app import Fumi
from fumi_core.handlers.contexts import RcptContext
from fumi_core.handlers.middleware import Next
from fumi_core.plugins.dovecot.channel import Channel, Request, TooLong, Unavailable, server_address
from fumi_core.plugins.dovecot.protocol import UserdbConversation
from fumi_core.smtp.mailboxes import check_delimiter, mailbox_of
from fumi_core.smtp.replies import LOOKUP_FAILED, USER_UNKNOWN


def dovecot_users(address: str, *, recipient_delimiter: str = "+") -> Callable[[Fumi], None]:
    """Answer RCPT with ``550 5.1.1`` unless the user exists in the Dovecot whose ``auth-userdb`` socket is at ``address``.

    The user is the recipient's address without the delimiter and what follows it in the local part: ``joe+news@example.org`` is
    ``joe@example.org``. RCPT is answered ``451 4.3.0`` when Dovecot has a temporary failure, cannot be reached or does not answer
    within 30 seconds. All recipients are looked up, so it is not for servers that relay mail to other domains. Raises ValueError
    for an invalid address or delimiter.
    """
    channel = Channel(server_address("dovecot_users", address), UserdbConversation)
    delimiter = check_delimiter(recipient_delimiter)

    async def check(ctx: RcptContext, next: Next) -> None:
        user = str(mailbox_of(ctx.address.address, delimiter))
        try:
            reply = await channel.request(lambda server: Request("USER", (user, "service=smtp")))
        except TooLong:
            ctx.reject(*USER_UNKNOWN)
        except Unavailable:
            ctx.reject(*LOOKUP_FAILED)
        if reply.verb == "NOTFOUND":
            ctx.reject(*USER_UNKNOWN)
        if reply.verb == "FAIL":
            ctx.reject(*LOOKUP_FAILED)
        await next()

    def plugin(app: Fumi) -> None:
        app.on_rcpt_to(check)
        app.at_close(channel.close)

    return plugin
