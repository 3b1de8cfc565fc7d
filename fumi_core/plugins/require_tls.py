"""``require_tls()``: rejects mail from clients without TLS."""

from __future__ import annotations

from collections.abc import Callable

from fumi_core.app import Fumi
from fumi_core.handlers.contexts import MailContext
from fumi_core.handlers.middleware import Next


def require_tls() -> Callable[[Fumi], None]:
    """Answer MAIL without TLS with ``530 5.7.0``."""

    async def check(ctx: MailContext, next: Next) -> None:
        if not ctx.session.secure:
            ctx.reject("5.7.0 Must issue a STARTTLS command first", 530)
        await next()

    def plugin(app: Fumi) -> None:
        app.on_mail_from(check)

    return plugin
