"""The settings of an edge's backends, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from fumi_edge.backends.dialing import Destination

BALANCES = ("leastconn", "roundrobin", "first")
"""How a backend is chosen among those that are up: fewest connections, each in turn, or the first in the configured order."""


@dataclass(frozen=True, slots=True)
class BackendSettings:
    """The backends and how they are used. Times are in seconds; at least one destination is needed.

    ``proxy_protocol`` is the version that is sent to the backends: v2, v1 or off. ``balance`` is one of BALANCES.
    ``connect_timeout`` is for each step of connecting. With ``health_interval`` 0 there are no health checks; ``health_timeout``
    is their time limit for the banner.
    """

    destinations: tuple[Destination, ...]
    proxy_protocol: str = "v2"
    balance: str = "leastconn"
    connect_timeout: float = 5.0
    health_interval: float = 5.0
    health_timeout: float = 10.0
