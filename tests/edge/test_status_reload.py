"""The status page of an edge whose settings are changed, also while a page is made."""

from __future__ import annotations

import asyncio

import pytest

from fumi_core.runtime.addresses import parse_address
from fumi_core.runtime.metrics_server import Request
from fumi_core.runtime.overview import Overview, Worker
from fumi_core.runtime.scoreboard import WorkerState
from fumi_edge.backends.addresses import BackendAddress
from fumi_edge.backends.dialing import Remote
from fumi_edge.backends.settings import BackendSettings
from fumi_edge.connection.policy import ListenerPolicy, ListenerSettings
from fumi_edge.edge import Edge
from fumi_edge.settings import EdgeSettings
from fumi_edge.status.facts import EdgeFacts
from fumi_edge.status.page import edge_pages
from fumi_edge.tls.certificates import Certificates
from fumi_edge.tls.pem import Pair
from fumi_edge.tls.policy import CertificateSettings
from tests.support.certificates import CertificateFiles, MakeCertificate


def of_files(files: CertificateFiles) -> CertificateSettings:
    cert, key = map(str, files)
    return CertificateSettings((Pair(cert, key),))


def settings(backend: str, *certificates: CertificateSettings) -> EdgeSettings:
    """An edge with this backend, and a listener for each certificate, on ports 1, 2 and so on."""
    host, _, port = backend.rpartition(":")
    return EdgeSettings(
        certificates=certificates[0],
        backends=BackendSettings((Remote(BackendAddress("tcp", host=host, port=int(port))),), health_interval=0),
        listeners=tuple(
            ListenerSettings(parse_address(f"127.0.0.1:{number}"), False, ListenerPolicy(), certificates=each)
            for number, each in enumerate(certificates, 1)
        ),
    )


def edge_with(wanted: EdgeSettings) -> Edge:
    """An edge that does not serve."""
    return Edge(wanted, {each: Certificates(*each) for each in wanted.all_certificates})


def test_a_reload_while_a_page_is_made_is_no_error(certificate: CertificateFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    edge = edge_with(settings("127.0.0.1:9", of_files(certificate)))
    others = iter([edge_with(settings(f"127.0.0.1:{port}", of_files(certificate))).backends for port in range(10, 40)])
    facts = EdgeFacts(edge)

    def workers() -> list[Worker]:
        return [Worker(0, WorkerState.SERVING, 1, 0.0, 0, facts.read())]

    pages = edge_pages(edge, Overview(edge.registry, lambda: None, lambda: None, workers, list, 1, 0.0), {})
    # Others each time, as if there were a reload between each two lines of the page.
    monkeypatch.setattr(Edge, "backends", property(lambda self: next(others)))
    for path in ("/", "/status.json"):
        assert pages[path](Request(path, {})).status == "200 OK"


def test_a_certificate_names_the_listeners_that_have_it_after_a_reload(make_certificate: MakeCertificate) -> None:
    one, other = of_files(make_certificate("one.example")), of_files(make_certificate("other.example"))
    edge = edge_with(settings("127.0.0.1:9", one, other, other))
    facts = EdgeFacts(edge)

    def listeners() -> dict[str, str]:
        return {each["name"]: each["listeners"] for each in facts.read()["certificates"]}

    assert listeners() == {"one.example": "127.0.0.1:1", "other.example": "127.0.0.1:2,127.0.0.1:3"}
    asyncio.run(edge.apply(settings("127.0.0.1:9", one, other, one)))
    assert listeners() == {"one.example": "127.0.0.1:1,127.0.0.1:3", "other.example": "127.0.0.1:2"}
