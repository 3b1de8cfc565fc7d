"""Judges a client by its address, when it connects. A proxy's own connection, a health check, is judged only if it sends mail."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fumi_core.app import Fumi
from fumi_core.handlers.contexts import ConnectContext, MailContext
from fumi_core.handlers.middleware import Next


def by_address(judge: Callable[[ConnectContext | MailContext], Awaitable[None]]) -> Callable[[Fumi], None]:
    """A plugin of ``judge``, which rejects or returns."""

    async def connects(ctx: ConnectContext, next: Next) -> None:
        if not ctx.session.health_check:
            await judge(ctx)
        await next()

    async def sends(ctx: MailContext, next: Next) -> None:
        if ctx.session.health_check:
            await judge(ctx)
        await next()

    def plugin(app: Fumi) -> None:
        app.on_connect(connects)
        app.on_mail_from(sends)

    return plugin
