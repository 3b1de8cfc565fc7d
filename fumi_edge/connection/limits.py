"""Limits: how many clients at once, in all and from one address, how many a second, and what is said of those turned away.

An address is an IPv4 address or an IPv6 /64, which is what one customer has (RFC 6177). What is remembered is bounded: open
connections by the descriptors there are, rates by ADDRESSES, the longest unseen being forgotten first.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import NamedTuple

from fumi_core.runtime.addresses import unmapped
from fumi_core.runtime.counting import Count
from fumi_core.runtime.logs import event
from fumi_core.runtime.scoreboard import count_of_one_process

log = logging.getLogger("fumi.edge.listener")

ADDRESSES = 65536
"""Addresses whose rate is remembered at once."""
SUMMARY = 1.0
"""Seconds of which the rejections after the first are one line in the log."""

_SECONDS = {"s": 1, "m": 60, "h": 3600}
_RATE = re.compile(r"([1-9][0-9]{0,6})/([smh])")


class Rate(NamedTuple):
    """``clients`` in ``seconds``; so many may also come at once, when none came before."""

    clients: int
    seconds: float


def parse_rate(text: str) -> Rate:
    """Read ``10/s``, ``600/m`` or ``1000/h``; a ValueError says what is wrong with it."""
    found = _RATE.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not a rate: write a number and /s, /m or /h, as in 10/s or 600/m")
    return Rate(int(found[1]), _SECONDS[found[2]])


class Limits:
    """Counts clients in and out; None means no limit. ``clock`` gives seconds."""

    def __init__(
        self, max_clients: int | None, max_clients_per_ip: int | None, rate_per_ip: Rate | None, clock: Callable[[], float]
    ) -> None:
        self._max_clients = max_clients
        self._max_clients_per_ip = max_clients_per_ip
        self._rate = rate_per_ip
        self._clock = clock
        self.connection_count = count_of_one_process()
        """Where clients are counted, for the limit on all of them; the limits for each address are this process's own."""
        self._clients_of: Counter[bytes] = Counter()
        self._due: OrderedDict[bytes, float] = OrderedDict()

    def enter(self, host: str | None) -> str | None:
        """Count a client in: the limit in its way, or None when it may come. Without ``host`` its address is not known yet."""
        if self._max_clients is not None and self.connection_count.clients >= self._max_clients:
            return "max_clients"
        reason = None if host is None else self.admit(host)
        if reason is None:
            self.connection_count.client_admitted()
        return reason

    def admit(self, host: str) -> str | None:
        """Count a client in for its address: the limit in its way, or None."""
        if self._max_clients_per_ip is None and self._rate is None:
            return None
        key = _key(host)
        if key is None:
            return None
        if self._max_clients_per_ip is not None and self._clients_of[key] >= self._max_clients_per_ip:
            return "max_clients_per_ip"
        if self._rate is not None and not self._pour(key, self._rate):
            return "rate"
        if self._max_clients_per_ip is not None:
            self._clients_of[key] += 1
        return None

    def leave(self, host: str | None) -> None:
        """Count a client out that came in; ``host`` is what it was admitted as, None if it never was."""
        self.connection_count.client_left()
        if host is None or self._max_clients_per_ip is None or (key := _key(host)) is None:
            return
        self._clients_of[key] -= 1
        if not self._clients_of[key]:
            del self._clients_of[key]

    def _pour(self, key: bytes, rate: Rate) -> bool:
        """A token bucket, kept as the one number that says when it will be full again (GCRA): False when it is empty."""
        now = self._clock()
        due = max(now, self._due.get(key, now)) + rate.seconds / rate.clients
        if due - now > rate.seconds * 1.000001:  # the sum of so many steps is not exact
            return False
        self._due[key] = due
        self._due.move_to_end(key)
        if len(self._due) > ADDRESSES:
            self._due.popitem(last=False)
        return True


def _key(host: str) -> bytes | None:
    """What stands for a host; None for a client on a Unix socket, which no such limit fits."""
    host = unmapped(host)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.inet_pton(family, host)[:8]
    except OSError:
        return None


class Rejections:
    """Counts those who are turned away, and logs them: one at once, and then each second's in a line, or a flood would be two."""

    def __init__(self, counters: Mapping[str, Count]) -> None:
        self._counters = counters
        self._unsaid: Counter[str] = Counter()
        self._client = ""
        self._timer: asyncio.TimerHandle | None = None

    def add(self, reason: str, client: str, listener: str) -> None:
        self._counters[reason].inc()
        if self._timer is not None:
            self._unsaid[reason] += 1
            self._client = client
            return
        event(log, logging.INFO, "rejected", client_ip=client, listener=listener, reason=reason)
        self._timer = asyncio.get_running_loop().call_later(SUMMARY, self._sum_up)

    def _sum_up(self) -> None:
        self._timer = None
        if self._unsaid:
            for reason, count in self._unsaid.items():
                event(log, logging.INFO, "more rejected", reason=reason, count=count, last=self._client)
            self._unsaid.clear()
            self._timer = asyncio.get_running_loop().call_later(SUMMARY, self._sum_up)

    def close(self) -> None:
        """Say what is still unsaid."""
        if self._timer is not None:
            self._timer.cancel()
            self._sum_up()
        if self._timer is not None:
            self._timer.cancel()
