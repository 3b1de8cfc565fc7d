"""The core's metrics: nothing that a proxy or a client sends is a label, or keeps an event from being counted."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from fumi_core.proxy_protocol import TLSInfo
from fumi_core.server.metrics import CoreMetrics
from fumi_core.smtp.session import Session
from fumi_core.smtp.tally import Tally


@pytest.mark.parametrize("version", ["none", "", "TLSv9", None])
def test_a_session_whose_tls_version_is_strange_is_counted_as_unknown(version: str | None) -> None:
    registry = CollectorRegistry()
    session = Session("id", "mx.example")
    session.secure, session.tls = True, TLSInfo(version=version)
    CoreMetrics(registry, Tally()).session_started(session)
    labels = {"secure": "true", "tls_version": "unknown"}
    assert registry.get_sample_value("fumi_core_sessions_total", labels) == 1
