"""What the connections of an edge share, and those of one listener."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fumi_core.runtime.acceptor import DescriptorLimit
from fumi_core.runtime.scoreboard import ConnectionCount
from fumi_edge.backends.choice import Backends
from fumi_edge.backends.retiring import Retiring
from fumi_edge.connection.direct import DirectCore
from fumi_edge.connection.limits import Limits, Rejections
from fumi_edge.metrics import EdgeMetrics
from fumi_edge.sockets.readiness import HangupWatch
from fumi_edge.tls.certificates import Certificates
from fumi_edge.tls.close_notify import CloseNotify


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What all connections of an edge share. ``buffer`` belongs to all tunnels. With ``direct``, it serves clients over TLS."""

    retiring: Retiring
    rejections: Rejections
    metrics: EdgeMetrics
    hangup_watch: HangupWatch
    close_notify: CloseNotify
    buffer: memoryview
    connection_count: ConnectionCount
    descriptor_limit: DescriptorLimit
    direct: DirectCore | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources(Shared):
    """What the connections of a listener that begin now share.

    Other settings lead to another Resources; a connection keeps the one it began with.
    """

    certificates: Certificates
    backends: Backends
    limits: Limits

    @classmethod
    def of(cls, shared: Shared, certificates: Certificates, backends: Backends, limits: Limits) -> Resources:
        everything = {each.name: getattr(shared, each.name) for each in fields(shared)}
        return cls(**everything, certificates=certificates, backends=backends, limits=limits)
