"""``max_size(n)``: rejects messages over a size, in addition to the ``size`` option."""

from __future__ import annotations

from collections.abc import Callable

from fumi_core.app import Fumi
from fumi_core.handlers.contexts import DataContext, MailContext
from fumi_core.handlers.middleware import Next
from fumi_core.plugins import arguments


def max_size(n: int) -> Callable[[Fumi], None]:
    """Answer messages of more than ``n`` bytes, declared or actual, with ``552 5.3.4``. Raises ValueError if ``n`` is below 1."""
    arguments.whole("max_size", "n", n, 1)

    async def check_declared(ctx: MailContext, next: Next) -> None:
        if int(ctx.address.args.get("SIZE", 0)) > n:
            ctx.reject("5.3.4 Message size exceeds fixed limit", 552)
        await next()

    async def check_real(ctx: DataContext, next: Next) -> None:
        ctx.stream.restrict(n)
        await next()

    def plugin(app: Fumi) -> None:
        app.on_mail_from(check_declared)
        app.on_data(check_real)

    return plugin
