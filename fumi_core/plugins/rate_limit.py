"""``rate_limit(per_minute, burst)``: limits the rate of messages from one client address."""

from __future__ import annotations

import time
from collections.abc import Callable

from fumi_core.app import Fumi
from fumi_core.handlers.contexts import MailContext
from fumi_core.handlers.middleware import Next
from fumi_core.plugins import arguments
from fumi_core.runtime.addresses import block_of
from fumi_core.runtime.token_buckets import TokenBuckets


def rate_limit(per_minute: float, burst: int, *, clock: Callable[[], float] = time.monotonic) -> Callable[[Fumi], None]:
    """Answer MAIL with ``450 4.7.1`` when a client, after ``burst`` messages at once, sends more than ``per_minute``.

    A client is an IPv4 address, or the /64 of an IPv6 address; all Unix sockets are one client. Transactions are counted: each
    MAIL that reaches this plugin, whatever happens to its message; a MAIL that is deferred here is not counted. Each worker
    counts only its own transactions. Raises ValueError for an invalid rate. ``clock`` returns seconds.
    """
    interval = 60 / arguments.positive("rate_limit", "per_minute", per_minute)
    buckets = TokenBuckets[str](interval, arguments.whole("rate_limit", "burst", burst, 1), clock)

    async def check(ctx: MailContext, next: Next) -> None:
        if not buckets.take(block_of(ctx.session.remote_address, ipv4=32, ipv6=64)):
            ctx.reject("4.7.1 Too many messages, try again later", 450)
        await next()

    def plugin(app: Fumi) -> None:
        app.on_mail_from(check)

    return plugin
