"""Token buckets: the burst that each of many clients may make, and its rate after that.

A bucket is one number, the time at which it will be full again (the generic cell rate algorithm, ITU-T I.371), so a full one
needs no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Client = TypeVar("Client", bound=Hashable)

MAX_CLIENTS = 65_536
"""Clients whose buckets are remembered at once."""
_TOLERANCE = 1e-6
"""Rounding error, as a part of the time that fills a bucket: a sum of intervals is not exactly their multiple."""


class TokenBuckets(Generic[Client]):
    """A bucket of ``burst`` tokens for each client; a token is restored every ``interval`` seconds. ``clock`` returns seconds.

    When there are too many, the fullest are deleted first: to have its empty bucket deleted, a client would need ``limit`` other
    addresses and would have to empty their buckets.
    """

    def __init__(self, interval: float, burst: int, clock: Callable[[], float], limit: int = MAX_CLIENTS) -> None:
        self._interval = interval
        self._room = (burst - 1 + burst * _TOLERANCE) * interval
        self._clock = clock
        self._limit = limit
        self._full_at: dict[Client, float] = {}

    def __len__(self) -> int:
        return len(self._full_at)

    def take(self, client: Client) -> bool:
        """Take one token; False if the bucket is empty."""
        now = self._clock()
        full_at = max(self._full_at.get(client, now), now)
        if full_at - now > self._room:
            return False
        if client not in self._full_at and len(self._full_at) >= self._limit:
            self._forget(now)
        self._full_at[client] = full_at + self._interval
        return True

    def _forget(self, now: float) -> None:
        """Delete an eighth of the buckets, so that these 15 ms are rarely needed."""
        self._full_at = kept = {client: full_at for client, full_at in self._full_at.items() if full_at > now}
        surplus = max(0, len(kept) - self._limit * 7 // 8)
        for client in sorted(kept, key=kept.__getitem__)[:surplus]:
            del kept[client]
