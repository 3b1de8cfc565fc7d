"""What the connections of an edge share."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Resources:
    """What all connections that begin now share. ``buffer`` belongs to all tunnels. With ``direct``, it serves clients over TLS.

    Other settings lead to another Resources, with other ``backends`` and ``limits``; a connection keeps the one it began with.
    """

    certificates: Certificates
    backends: Backends
    retiring: Retiring
    limits: Limits
    rejections: Rejections
    metrics: EdgeMetrics
    hangup_watch: HangupWatch
    close_notify: CloseNotify
    buffer: memoryview
    connection_count: ConnectionCount
    descriptor_limit: DescriptorLimit
    direct: DirectCore | None = None
