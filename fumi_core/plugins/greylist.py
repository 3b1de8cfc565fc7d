"""``greylist(delay)``: defers unknown senders, since mail servers retry and most spammers do not (RFC 6647)."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from hashlib import blake2b

from fumi_core.app import Fumi
from fumi_core.handlers.contexts import RcptContext
from fumi_core.handlers.middleware import Next
from fumi_core.plugins import arguments
from fumi_core.runtime.addresses import block_of
from fumi_core.smtp.session import address_key

RETRY_WINDOW_SECONDS = 2 * 86400.0
"""Seconds within which a deferred sender has to retry."""
RETENTION_SECONDS = 35 * 86400.0
"""Seconds for which a sender that has retried is known, from its last message."""
SHARDS, SHARD_SIZE = 256, 1024
"""Triplets remembered: at most the product of the two."""


def greylist(delay: float, *, clock: Callable[[], float] = time.monotonic) -> Callable[[Fumi], None]:
    """Answer RCPT with ``450 4.7.1`` until ``delay`` seconds have passed since the client, sender and recipient were first seen.

    All addresses of a /24 (IPv4) or /64 (IPv6) are one client, since a mail server may retry from a neighbouring address.
    Authenticated users are not deferred. Use it after the plugins that reject unknown recipients. Each worker keeps its own
    triplets in memory: a sender is deferred again after a restart, and by each further worker that it connects to. Raises
    ValueError for a delay of two days or more. ``clock`` returns seconds.
    """
    if arguments.positive("greylist", "delay", delay) >= RETRY_WINDOW_SECONDS:
        raise ValueError(
            f"greylist: delay must be less than {RETRY_WINDOW_SECONDS:.0f} seconds, after which the first try is forgotten"
        )
    waiting, known = Triplets(), Triplets()

    def is_known(block: str, sender: str, recipient: str) -> bool:
        now = clock()
        triplet = (block, address_key(sender), address_key(recipient))
        passed = known.get(triplet)
        if passed is None or now - passed > RETENTION_SECONDS:
            seen = waiting.get(triplet)
            if seen is None or now - seen > RETRY_WINDOW_SECONDS:
                waiting.put(triplet, now)
                return False
            if now - seen < delay:
                return False
        known.put(triplet, now)
        return True

    async def check(ctx: RcptContext, next: Next) -> None:
        session = ctx.session
        if session.user is None:
            sender = session.envelope.mail_from
            block = block_of(session.remote_address, ipv4=24, ipv6=64)
            if not is_known(block, sender.address if sender else "", ctx.address.address):
                ctx.reject("4.7.1 Greylisted, try again later", 450)
        await next()

    def plugin(app: Fumi) -> None:
        app.on_rcpt_to(check)

    return plugin


class Triplets:
    """A time for each triplet of client block, sender and recipient.

    When a shard is full its least recently used triplets are deleted. The shard is a keyed hash of the client block, so no client
    can choose it: a client that invents thousands of senders affects only the clients of its own shard.
    """

    def __init__(self, shards: int = SHARDS, size: int = SHARD_SIZE) -> None:
        self._shards: list[dict[bytes, float]] = [{} for _ in range(shards)]
        self._size = size
        self._key = secrets.token_bytes(16)

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def get(self, triplet: tuple[str, str, str]) -> float | None:
        return self._shard(triplet[0]).get(self._digest("\0".join(triplet)))

    def put(self, triplet: tuple[str, str, str], seconds: float) -> None:
        shard, digest = self._shard(triplet[0]), self._digest("\0".join(triplet))
        shard.pop(digest, None)  # moves it to the end, after all that were used before
        if len(shard) >= self._size:
            del shard[next(iter(shard))]
        shard[digest] = seconds

    def _shard(self, block: str) -> dict[bytes, float]:
        return self._shards[int.from_bytes(self._digest(block), "big") % len(self._shards)]

    def _digest(self, text: str) -> bytes:
        return blake2b(text.encode(), digest_size=16, key=self._key).digest()
