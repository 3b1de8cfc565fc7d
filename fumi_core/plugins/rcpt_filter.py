"""``rcpt_filter(domains)``: rejects recipients of all domains except these."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fumi_core.app import Fumi
from fumi_core.handlers.contexts import RcptContext
from fumi_core.handlers.middleware import Next
from fumi_core.plugins import arguments
from fumi_core.smtp.session import domain_of


def rcpt_filter(domains: Iterable[str]) -> Callable[[Fumi], None]:
    """Answer RCPT for any other domain with ``550 5.7.1``. ``<postmaster>`` has no domain and is always accepted.

    Raises ValueError for a string that is not a domain.
    """
    accepted = arguments.domains("rcpt_filter", domains)

    async def check(ctx: RcptContext, next: Next) -> None:
        domain = domain_of(ctx.address.address)
        if domain and domain not in accepted:
            ctx.reject("5.7.1 Relay access denied", 550)
        await next()

    def plugin(app: Fumi) -> None:
        app.on_rcpt_to(check)

    return plugin
