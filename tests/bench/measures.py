"""From a running server to one figure."""

import sys
import time
from dataclasses import dataclass
from typing import Protocol

from .loads import Load, idle_connections
from .processes import Server, cpu_ns, memory_kib, resident_kib

QUIET_FOR = 0.05
QUIET_WITHIN = 5.0
QUIET_NS = 500_000


class Measure(Protocol):
    """What is found out of a server. A contestant's figure of a round is the mean over its turns, which all take alternately."""

    @property
    def turns(self) -> int:
        """How many turns make a figure."""

    def warm_up(self, server: Server) -> None:
        """Bring a fresh server into the state in which it is measured."""

    def __call__(self, server: Server) -> float:
        """Take a turn."""


@dataclass(frozen=True)
class CpuPerUnit:
    """CPU microseconds, user and system, that a unit of this load costs the server.

    Short turns: what else goes on at the machine makes the same instructions cost more, half as much again sometimes, for some
    seconds. It then hits all contestants alike.
    """

    load: Load
    units: int
    units_of_warm_up: int
    turns: int = 4

    def warm_up(self, server: Server) -> None:
        """A load that is not measured."""
        self.load(server.port, self.units_of_warm_up)

    def __call__(self, server: Server) -> float:
        before = settled_cpu_ns(server)
        self.load(server.port, self.units)
        return (settled_cpu_ns(server) - before) / self.units / 1000


def settled_cpu_ns(server: Server) -> int:
    """The server's CPU nanoseconds once it has come to rest: what it still does for connections that ended belongs to them."""
    deadline = time.monotonic() + QUIET_WITHIN
    last, now = 0, cpu_ns(server.pids)
    while now - last > QUIET_NS and time.monotonic() < deadline:
        time.sleep(QUIET_FOR)
        last, now = now, cpu_ns(server.pids)
    return now


@dataclass(frozen=True)
class ClockPerUnit:
    """Microseconds by the clock that a unit of this load takes: what is left of it when several processes share the work.

    It means something only while the generator is not the slower end, on a machine that does little else.
    """

    load: Load
    units: int
    units_of_warm_up: int
    turns: int = 4

    def warm_up(self, server: Server) -> None:
        """A load that is not measured."""
        self.load(server.port, self.units_of_warm_up)

    def __call__(self, server: Server) -> float:
        before = time.perf_counter()
        self.load(server.port, self.units)
        return (time.perf_counter() - before) / self.units * 1e6


@dataclass(frozen=True)
class MemoryPerConnection:
    """KiB of proportional set size by which the server grows with each of `connections` idle TLS connections.

    It grows from `before` connections, so that what is set up once for the first of them is not counted.
    """

    connections: int
    before: int
    turns: int = 1

    def warm_up(self, server: Server) -> None:
        """Nothing: the first connections do it."""

    def __call__(self, server: Server) -> float:
        with idle_connections(server.port) as say:
            say(f"open {self.before}")
            start = memory_kib(server.pids)
            say(f"open {self.connections}")
            return (memory_kib(server.pids) - start) / self.connections


@dataclass(frozen=True)
class Growth:
    """KiB of resident set size by which the server grows between the first `slice` units and the last of so many `units`.

    The load is done a slice at a time, so that each is over within the time that a load has.
    """

    load: Load
    units: int
    slice: int
    turns: int = 1

    def warm_up(self, server: Server) -> None:
        """The first slice, after which a server has all that it needs."""
        self.load(server.port, self.slice)

    def __call__(self, server: Server) -> float:
        before = resident_kib(server.pids)
        for done in range(self.slice, self.units, self.slice):
            self.load(server.port, self.slice)
            if done % (10 * self.slice) == 0:
                print(f"{done} of {self.units}: {resident_kib(server.pids) - before:+} KiB", file=sys.stderr)
        return resident_kib(server.pids) - before


@dataclass(frozen=True)
class Silent:
    """How many of so many idle TLS sessions, open at once, do not take a message: 0, or a LoadFailed that tells of the first."""

    connections: int
    turns: int = 1

    def warm_up(self, server: Server) -> None:
        """Nothing: every connection counts."""

    def __call__(self, server: Server) -> float:
        with idle_connections(server.port) as say:
            say(f"open {self.connections}")
            say("ask")
            return 0.0
