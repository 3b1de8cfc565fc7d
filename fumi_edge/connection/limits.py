"""Limits on concurrent clients, in total and per address, and on the rate per address; and the log of rejected clients.

An address is an IPv4 address or an IPv6 /64, the prefix of one customer (RFC 6177). Memory is bounded: open connections by
the number of descriptors, rates by the token buckets' own limit.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fumi_core.runtime.addresses import unmapped
from fumi_core.runtime.counting import Count
from fumi_core.runtime.journal import journal
from fumi_core.runtime.logs import event
from fumi_core.runtime.scoreboard import ConnectionCount
from fumi_core.runtime.token_buckets import TokenBuckets
from fumi_edge.metrics import RejectReason

log = logging.getLogger("fumi.edge.listener")

SUMMARY_INTERVAL = 1.0
"""Seconds between log lines that sum up the rejections after the first one."""

_SECONDS = {"s": 1, "m": 60, "h": 3600}
_RATE = re.compile(r"([1-9][0-9]{0,6})/([smh])")


class Rate(NamedTuple):
    """At most ``clients`` in ``seconds``. ``clients`` is also the size of a burst after a time without clients."""

    clients: int
    seconds: float


def parse_rate(text: str) -> Rate:
    """Parse ``10/s``, ``600/m`` or ``1000/h``. Raises ValueError, with a message for the user."""
    found = _RATE.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not a rate: write a number and /s, /m or /h, as in 10/s or 600/m")
    return Rate(int(found[1]), _SECONDS[found[2]])


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """The limits; None means no limit. Those for one address apply to each process."""

    max_clients: int | None = None
    max_clients_per_ip: int | None = None
    rate_per_ip: Rate | None = None


class Limits:
    """Counts clients and applies the limits. A client leaves the Limits that it has entered.

    ``connection_count`` counts the clients of all workers. Of clients that entered without a limit on the clients of one
    address, no address is counted, not even for a limit that later settings have.
    """

    def __init__(
        self,
        limits: ClientLimits,
        connection_count: ConnectionCount,
        before: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``before`` has applied other limits so far: what it has counted is kept. ``clock`` returns seconds."""
        self._max_clients = limits.max_clients
        self._max_clients_per_ip = limits.max_clients_per_ip
        self._rate = rate = limits.rate_per_ip
        self._connection_count = connection_count
        self._clients_of: Counter[bytes] = Counter() if before is None else before._clients_of
        self._buckets: TokenBuckets[bytes] | None = rate and TokenBuckets(rate.seconds / rate.clients, rate.clients, clock)
        if before is not None and before._rate == rate:
            self._buckets = before._buckets
        self._by_address = self._max_clients_per_ip is not None or self._buckets is not None

    def enter(self, host: str | None) -> RejectReason | None:
        """Count a new client. Returns None, or the limit that rejects it. ``host`` is None while its address is not known."""
        if self._max_clients is not None and self._connection_count.clients >= self._max_clients:
            return RejectReason.MAX_CLIENTS
        reason = None if host is None or not self._by_address else self.admit(host)
        if reason is None:
            self._connection_count.client_admitted()
        return reason

    def admit(self, host: str) -> RejectReason | None:
        """Count a new client for its address. Returns None, or the limit that rejects it."""
        key = _key(host) if self._by_address else None
        if key is None:
            return None
        if self._max_clients_per_ip is not None and self._clients_of[key] >= self._max_clients_per_ip:
            return RejectReason.MAX_CLIENTS_PER_IP
        if self._buckets is not None and not self._buckets.take(key):
            return RejectReason.RATE
        if self._max_clients_per_ip is not None:
            self._clients_of[key] += 1
        return None

    def leave(self, host: str | None) -> None:
        """Count the end of a client. ``host`` is the address that was admitted, or None if none was."""
        self._connection_count.client_left()
        if host is None or self._max_clients_per_ip is None or (key := _key(host)) is None:
            return
        self._clients_of[key] -= 1
        if not self._clients_of[key]:
            del self._clients_of[key]


def _key(host: str) -> bytes | None:
    """The bytes by which a host is counted; None for a client on a Unix socket, which has no address to limit."""
    host = unmapped(host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.inet_pton(family, host)[:8]
    except OSError:
        return None


class Rejections:
    """Counts and logs rejected clients. The first is logged at once; later ones are summed up every SUMMARY_INTERVAL seconds.

    A line for each client would make a flood of connections a flood of log lines too.
    """

    def __init__(self, counters: Mapping[RejectReason, Count]) -> None:
        self._counters = counters
        self._unlogged: Counter[RejectReason] = Counter()
        self._client = ""
        self._timer: asyncio.TimerHandle | None = None

    def count(self, reason: RejectReason, client: str, listener: str) -> None:
        """Count a client that the log has in another line, which says why its connection ended."""
        self._counters[reason].inc()
        journal.note("rejected", client_ip=client, listener=listener, reason=reason)

    def add(self, reason: RejectReason, client: str, listener: str) -> None:
        """Count and log a client."""
        self._counters[reason].inc()
        if self._timer is not None:
            self._unlogged[reason] += 1
            self._client = client
            return
        event(log, logging.INFO, "rejected", client_ip=client, listener=listener, reason=reason)
        self._timer = asyncio.get_running_loop().call_later(SUMMARY_INTERVAL, self._log_summary)

    def _log_summary(self) -> None:
        self._timer = None
        if self._unlogged:
            for reason, count in self._unlogged.items():
                event(log, logging.INFO, "rejected, more suppressed", reason=reason, count=count, last_client_ip=self._client)
            self._unlogged.clear()
            self._timer = asyncio.get_running_loop().call_later(SUMMARY_INTERVAL, self._log_summary)

    def close(self) -> None:
        """Log the rejections that are not logged yet."""
        if self._timer is not None:
            self._timer.cancel()
            self._log_summary()
        if self._timer is not None:
            self._timer.cancel()
