"""The kind of peer of a connection: it decides what is counted, and at which level the end is logged."""

from __future__ import annotations

import enum
import logging

from fumi_edge.metrics import StarttlsResult


class Role(enum.Enum):
    """The kind of peer, as far as it is known."""

    CLIENT = enum.auto()
    BALANCER = enum.auto()
    """The load balancer itself, with its own address in a header: a check, unless it sends bytes or does a handshake."""
    BALANCER_CHECK = enum.auto()
    """The load balancer itself, with LOCAL in its header, which the backend gets too."""
    PORT_CHECK = enum.auto()
    """A client or a load balancer that has sent no byte."""
    REJECTED = enum.auto()
    """A client that a limit rejects, which another line of the log reports."""

    def log_level(self, active: bool) -> int:
        """The level of the line at the end; ``active``: a handshake was done, or bytes were received.

        Checks, and connections that another line reports, are logged at level debug.
        """
        return logging.INFO if self is Role.CLIENT or (self is Role.BALANCER and active) else logging.DEBUG

    def counts(self, result: StarttlsResult) -> bool:
        """Whether it counts as a client of a STARTTLS port, with this result.

        A check is not a client. A load balancer's own connection counts as one if it upgrades, or injects commands.
        """
        if self in (Role.CLIENT, Role.REJECTED):
            return True
        return self is not Role.PORT_CHECK and result in (StarttlsResult.UPGRADED, StarttlsResult.INJECTION)
