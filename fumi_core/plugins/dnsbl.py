"""``dnsbl(zones)``: rejects clients whose address is on a DNS blocklist (RFC 5782)."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from fumi_core.app import Fumi
from fumi_core.handlers.contexts import ConnectContext, MailContext
from fumi_core.plugins import arguments
from fumi_core.plugins.by_address import by_address
from fumi_core.runtime.logs import event
from fumi_core.runtime.resolver import Resolve, Resolver, ipv4_addresses

CACHE_SECONDS = 300.0
"""Seconds for which an answer is cached."""
MAX_CACHED = 16_384
"""Cached answers of each zone."""
RETRY_SECONDS = 60.0
"""Seconds for which the failure of a lookup, or of a zone, is cached."""
MAX_FAILURES = 3
"""Failed lookups in succession before the zone is skipped: a single one may be a lost packet."""

_log = logging.getLogger("fumi.core")
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_ZONE = re.compile(rf"{_LABEL}(?:\.{_LABEL})+")
_MAX_ZONE = 253 - 64  # leaves room for the 32 nibbles of an IPv6 address and their dots
_LISTED = ip_network("127.0.0.0/8")
# Spamhaus returns these codes when it rejects the query or the resolver; they say nothing about the client.
_ERROR = ip_network("127.255.255.0/24")


def dnsbl(
    zones: Iterable[str],
    *,
    timeout: float = 5.0,
    resolve: Resolve = ipv4_addresses,
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[Fumi], None]:
    """Query the zones in order, and answer clients that one of them lists with ``554 5.7.1`` in place of the banner.

    The reply names the zone, so the zone's name must not contain a secret key. Addresses that are not public are not looked up. A
    zone that does not answer within ``timeout`` seconds, or with invalid addresses, is skipped and logged, so that no mail is
    lost when a resolver fails. After an error code or three failures in a row, the zone is skipped for a minute and then queried
    for one client, so that a dead zone does not delay every banner. Raises ValueError for a string that is not a zone.

    ``resolve`` returns the IPv4 addresses of a name and is called in a thread; ``clock`` returns seconds.
    """
    lists = [
        Blocklist(zone, Resolver(resolve, timeout=arguments.positive("dnsbl", "timeout", timeout)), clock)
        for zone in _zones(zones)
    ]

    async def judge(ctx: ConnectContext | MailContext) -> None:
        address = _public(ctx.session.remote_address)
        for blocklist in lists:
            if address is not None and await blocklist.lists(address, ctx.session.id):
                ctx.reject(f"5.7.1 Client host [{address}] blocked using {blocklist.zone}", 554)

    return by_address(judge)


class Blocklist:
    """One zone, and its cached answers."""

    def __init__(self, zone: str, resolver: Resolver, clock: Callable[[], float], limit: int = MAX_CACHED) -> None:
        self.zone = zone
        self._resolver = resolver
        self._clock = clock
        self._limit = limit
        self._answers: dict[str, tuple[float, bool]] = {}
        self._failures = 0
        self._again = 0.0  # when to query the zone again after too many failures

    def __len__(self) -> int:
        return len(self._answers)

    async def lists(self, address: IPv4Address | IPv6Address, id: str) -> bool:
        """Whether the address is listed; False if that is unknown. ``id`` is the connection's, for the log."""
        name = f"{_reversed(address)}.{self.zone}"
        until, listed = self._answers.get(name, (0.0, False))
        if self._clock() < until:
            return listed
        if self._is_skipped():
            return False
        try:
            answers = await self._resolver.lookup(name)
            listed = _means_listed(answers)
        except Exception as error:
            problem = "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
            event(_log, logging.WARNING, "blocklist unavailable", id=id, zone=self.zone, client_ip=address, error=problem)
            self._failures = MAX_FAILURES if isinstance(error, ErrorCode) else self._failures + 1
            self._again = self._clock() + RETRY_SECONDS
            self._cache(name, False, RETRY_SECONDS)
            return False
        self._failures = 0
        self._cache(name, listed, CACHE_SECONDS)
        return listed

    def _is_skipped(self) -> bool:
        """Whether the zone has failed too often to be queried now. Every RETRY_SECONDS seconds one caller gets False."""
        now = self._clock()
        if self._failures < MAX_FAILURES:
            return False
        if now < self._again:
            return True
        self._again = now + RETRY_SECONDS
        return False

    def _cache(self, name: str, listed: bool, seconds: float) -> None:
        self._answers.pop(name, None)
        if len(self._answers) >= self._limit:
            del self._answers[next(iter(self._answers))]
        self._answers[name] = (self._clock() + seconds, listed)


class ErrorCode(ValueError):
    """The zone rejects the query or the resolver, for every client."""


def _means_listed(answers: Iterable[str]) -> bool:
    """Raises ValueError if no answer is a blocklist's (RFC 5782 §2.1), as with a parked domain."""
    found = [IPv4Address(answer) for answer in answers]
    if any(each in _LISTED and each not in _ERROR for each in found):
        return True
    if found and found[0] in _ERROR:
        raise ErrorCode(f"error code {found[0]}")
    if found:
        raise ValueError(f"{found[0]} is not an answer of a blocklist")
    return False


def _public(host: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(host)
    except ValueError:
        return None  # a Unix socket
    address = getattr(address, "ipv4_mapped", None) or address
    return address if address.is_global else None


def _reversed(address: IPv4Address | IPv6Address) -> str:
    """The octets of an IPv4 address, or the nibbles of an IPv6 address, in reverse order (RFC 5782 §2.1, §2.4)."""
    return address.reverse_pointer.removesuffix(".in-addr.arpa").removesuffix(".ip6.arpa")


def _zones(given: Iterable[str]) -> list[str]:
    zones = [zone.removesuffix(".").lower() for zone in arguments.strings("dnsbl", given, "zen.spamhaus.org")]
    if not zones:
        raise ValueError("dnsbl([]) has no effect: write the zones, as in 'zen.spamhaus.org'")
    for zone in zones:
        if not _ZONE.fullmatch(zone) or len(zone) > _MAX_ZONE:
            raise ValueError(f"dnsbl: {zone!r} is not a zone: write its domain, as in 'zen.spamhaus.org'")
    return list(dict.fromkeys(zones))
