"""``rate_limit(per_minute, burst)``: limits the rate of messages from one client address."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable

from fumi_core.app import Fumi
from fumi_core.handlers.contexts import MailContext
from fumi_core.handlers.middleware import Next
from fumi_core.plugins import arguments
from fumi_core.runtime.addresses import block_of

MAX_CLIENTS = 65_536
"""Clients remembered at once."""
_ROUNDING = 1e-6  # seconds; a sum of intervals is not exactly their multiple


def rate_limit(per_minute: float, burst: int, *, clock: Callable[[], float] = time.monotonic) -> Callable[[Fumi], None]:
    """Answer MAIL with ``450 4.7.1`` where a client, after ``burst`` messages at once, sends more than ``per_minute``.

    A client is an IPv4 address, or the /64 of an IPv6 address; all Unix sockets are one client. Transactions are counted: each
    MAIL that reaches this plugin, whatever happens to its message; a MAIL that is deferred here is not counted. Each worker
    counts only its own transactions. Raises ValueError for an invalid rate. ``clock`` returns seconds.
    """
    interval = 60 / arguments.positive("rate_limit", "per_minute", per_minute)
    buckets = Buckets(interval, arguments.whole("rate_limit", "burst", burst, 1), clock)

    async def check(ctx: MailContext, next: Next) -> None:
        if not buckets.take(block_of(ctx.session.remote_address, ipv4=32, ipv6=64)):
            ctx.reject("4.7.1 Too many messages, try again later", 450)
        await next()

    def plugin(app: Fumi) -> None:
        app.on_mail_from(check)

    return plugin


class Buckets:
    """A token bucket for each client, stored as the time when it will be full again; a full one needs no memory.

    When there are too many, the fullest are deleted first: to have its empty bucket deleted, a client would need ``limit`` other
    addresses and would have to empty their buckets.
    """

    def __init__(self, interval: float, burst: int, clock: Callable[[], float], limit: int = MAX_CLIENTS) -> None:
        """``interval`` is the seconds until a token is restored."""
        self._interval = interval
        self._burst = burst
        self._clock = clock
        self._limit = limit
        self._full_at: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, client: str) -> bool:
        """Take one token; False if the bucket is empty."""
        now = self._clock()
        full_at = max(self._full_at.get(client, now), now)
        if full_at - now > (self._burst - 1) * self._interval + _ROUNDING:
            return False
        if client not in self._full_at and len(self._full_at) >= self._limit:
            self._forget(now)
        self._full_at[client] = full_at + self._interval
        return True

    def _forget(self, now: float) -> None:
        """Delete an eighth of the buckets, so that this is rarely needed."""
        self._full_at = kept = {client: full_at for client, full_at in self._full_at.items() if full_at > now}
        surplus = len(kept) - self._limit * 7 // 8
        for client in heapq.nsmallest(surplus, kept, key=kept.__getitem__):
            del kept[client]
