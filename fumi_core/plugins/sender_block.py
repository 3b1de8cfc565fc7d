"""``sender_block(domains)``: rejects senders by their domain."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fumi_core.app import Fumi
from fumi_core.handlers.contexts import MailContext
from fumi_core.handlers.middleware import Next
from fumi_core.plugins import arguments
from fumi_core.smtp.session import domain_of


def sender_block(domains: Iterable[str]) -> Callable[[Fumi], None]:
    """Answer MAIL from these domains, compared without case, with ``550 5.7.1``. Raises ValueError for anything but a domain."""
    blocked = arguments.domains("sender_block", domains)

    async def check(ctx: MailContext, next: Next) -> None:
        if domain_of(ctx.address.address) in blocked:
            ctx.reject("5.7.1 Sender domain blocked", 550)
        await next()

    def plugin(app: Fumi) -> None:
        app.on_mail_from(check)

    return plugin
