"""What a handler sees in ``session`` is the same through every terminator, as far as its header can carry it.

The truth is what the client knows of its own connection. A row is a terminator: a function that starts it, with a core behind it,
and says what its header leaves out. Columns: without and with a client certificate, IPv4 and IPv6, TLS 1.2 and 1.3.
"""

from __future__ import annotations

import contextlib
import smtplib
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import fumi_edge
from fumi_core import Fumi, Session
from fumi_core.testing import RunningServer, running
from tests.interop.starting import ClientCertificate, StartHAProxy, StartStunnel
from tests.support.certificates import CertificateFiles
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.starter import BIN
from tests.support.waiting import until

Facts = dict[str, object]


@dataclass
class Cell:
    """Where a terminator is to listen, and what else it needs; ``client_ca`` if it is to ask for a client certificate."""

    host: str
    port: int
    client_ca: Path | None
    certificate: CertificateFiles
    programs: Programs
    haproxy: StartHAProxy
    stunnel: StartStunnel

    @property
    def listen(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def edge(self, listener: str, address: str, port: int, core: RunningServer, *flags: str) -> None:
        cert = ["--cert", str(self.certificate[0]), "--key", str(self.certificate[1]), "--backend", f"127.0.0.1:{core.port}"]
        asked = ["--client-ca", str(self.client_ca)] if self.client_ca else []
        program = BIN / "fumi-edge"
        self.programs.start(program, *cert, *asked, listener, address, *flags, port=port, log="edge.log")


@contextlib.contextmanager
def core(**options: Any) -> Iterator[RunningServer]:
    with running(Fumi(auth_optional=True, proxy_protocol="required", close_timeout=0.2, **options)) as server:
        yield server


@contextlib.contextmanager
def edge_implicit(cell: Cell) -> Iterator[RunningServer]:
    with core() as server:
        cell.edge("--listen", cell.listen, cell.port, server)
        yield server


@contextlib.contextmanager
def edge_starttls(cell: Cell) -> Iterator[RunningServer]:
    with core() as server:
        cell.edge("--starttls-listen", cell.listen, cell.port, server)
        yield server


@contextlib.contextmanager
def haproxy_implicit(cell: Cell) -> Iterator[RunningServer]:
    with core() as server:
        variables: dict[str, Any] = {"LISTEN": cell.listen, "BACKEND": f"127.0.0.1:{server.port}"}
        if cell.client_ca:
            cell.haproxy("mutual-tls.cfg", cell.port, CLIENT_CA=cell.client_ca, **variables)
        else:
            cell.haproxy("implicit-tls.cfg", cell.port, **variables)
        yield server


@contextlib.contextmanager
def haproxy_before_edge(cell: Cell) -> Iterator[RunningServer]:
    with core() as server:
        behind, *others = (free_port() for _ in range(3))
        cell.edge("--starttls-listen", f"127.0.0.1:{behind}", behind, server, "--accept-proxy")
        listeners: dict[str, Any] = {"LISTEN_SUBMISSION": cell.listen, "PORT_SUBMISSION": behind}
        listeners |= {f"LISTEN_{name}": f"127.0.0.1:{port}" for name, port in zip(("SMTP", "SMTPS"), others, strict=True)}
        # It is up for a moment without being checked, and goes on if it is.
        cell.haproxy("layer4.cfg", cell.port, **listeners)
        yield server


@contextlib.contextmanager
def stunnel(cell: Cell) -> Iterator[RunningServer]:
    with core(assume_tls=True) as server:
        variables: dict[str, Any] = {"LISTEN": f"{cell.host}:{cell.port}", "BACKEND": f"127.0.0.1:{server.port}"}
        if cell.client_ca:
            cell.stunnel("mutual-tls.conf", cell.port, CLIENT_CA=cell.client_ca, **variables)
        else:
            cell.stunnel("implicit-tls.conf", cell.port, **variables)
        yield server


@contextlib.contextmanager
def all_in_one(cell: Cell, secure: bool = True) -> Iterator[RunningServer]:
    cert, key = cell.certificate
    app = fumi_edge.Fumi(secure=secure, cert=cert, key=key, ca=cell.client_ca, auth_optional=True, close_timeout=0.2)
    with running(app) as server:
        server.run(lambda: app.listen(cell.port, cell.host))
        yield server


def all_in_one_starttls(cell: Cell) -> contextlib.AbstractContextManager[RunningServer]:
    return all_in_one(cell, secure=False)


@dataclass
class Row:
    """``unsaid``: facts that the header has no place for, and what the handler sees in their place; ``logs`` that have the id.

    ``proxy`` is what the handler sees of the terminator itself; None in one process.
    """

    start: Callable[[Cell], contextlib.AbstractContextManager[RunningServer]]
    starttls: bool = False
    logs: tuple[str, ...] = ()
    proxy: str | None = "127.0.0.1"
    unsaid: Mapping[str, object] = field(default_factory=dict)


NOTHING_OF_TLS: Mapping[str, object] = {
    "tls": False,
    **dict.fromkeys(("version", "cipher", "sni", "client_cert", "client_cert_verified", "client_cn")),
}
"""PROXY protocol version 1; that it was TLS at all is --assume-tls."""

ROWS = {
    "fumi-edge": Row(edge_implicit, logs=("edge.log",)),
    "fumi-edge with STARTTLS": Row(edge_starttls, starttls=True, logs=("edge.log",)),
    "HAProxy": Row(haproxy_implicit, logs=("haproxy.log",)),
    "HAProxy before fumi-edge with STARTTLS": Row(haproxy_before_edge, starttls=True, logs=("haproxy.log", "edge.log")),
    "stunnel": Row(stunnel, unsaid=NOTHING_OF_TLS),
    "all-in-one": Row(all_in_one, proxy=None),
    "all-in-one with STARTTLS": Row(all_in_one_starttls, starttls=True, proxy=None),
}


class Localhost(ssl.SSLContext):
    """Asks for localhost, at whatever address that is."""

    def wrap_socket(self, sock: socket.socket, *args: Any, **options: Any) -> ssl.SSLSocket:
        return super().wrap_socket(sock, *args, **{**options, "server_hostname": "localhost"})


HOSTS = {"IPv4": "127.0.0.1", "IPv6": "::1"}
VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("family", HOSTS)
@pytest.mark.parametrize("certified", [False, True], ids=["anonymous", "certificate"])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_handler_sees_the_tls_facts_that_the_client_has(
    row: Row, certified: bool, family: str, version: str, programs: Programs, haproxy: StartHAProxy, stunnel: StartStunnel,
    certificate: CertificateFiles, client_certificate: ClientCertificate,
) -> None:  # fmt: skip
    host = HOSTS[family]
    context = Localhost(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certificate[0])
    context.minimum_version = context.maximum_version = VERSIONS[version]
    if certified:
        context.load_cert_chain(client_certificate.cert, client_certificate.key)
    ca = client_certificate.ca if certified else None
    cell = Cell(host, free_port(host), ca, certificate, programs, haproxy, stunnel)
    with row.start(cell) as server:
        known = _send(host, cell.port, context, row.starttls)
        (message,) = server.messages
    known |= {"client_cert": certified, "client_cert_verified": certified, "client_cn": "client.example" if certified else None}
    session = message.session
    assert _seen(session) == {**known, **row.unsaid}
    assert session.proxy_address == row.proxy
    assert session.id
    assert session.id.isascii()
    assert session.id.isprintable()
    for log in row.logs:
        _await_text(programs.directory / log, session.id)


def _await_text(path: Path, text: str) -> None:
    until(lambda: text in path.read_text(), f"{text} in {path.name}")


def _send(host: str, port: int, context: ssl.SSLContext, starttls: bool) -> Facts:
    """Send a message; what the client knows of its connection."""
    with smtplib.SMTP() if starttls else smtplib.SMTP_SSL(context=context) as smtp:
        smtp.connect(host, port)
        if starttls:
            smtp.starttls(context=context)
        smtp.sendmail("a@b.example", ["c@d.example"], "Subject: hi\r\n\r\nhi\r\n")
        sock = smtp.sock
        assert isinstance(sock, ssl.SSLSocket)
        cipher = sock.cipher()
        assert cipher is not None
        own, peer = sock.getsockname()[:2], sock.getpeername()[:2]
        tls = {"tls": True, "version": sock.version(), "cipher": cipher[0], "sni": "localhost"}
        return {"secure": True, "with": "ESMTPS", "remote": own, "local": peer, **tls}


def _seen(session: Session) -> Facts:
    """The same of a session."""
    names = ("version", "cipher", "sni", "client_cert", "client_cert_verified", "client_cn")
    return {
        "secure": session.secure,
        "with": session.transmission_type,
        "remote": (session.remote_address, session.remote_port),
        "local": (session.local_address, session.local_port),
        "tls": session.tls is not None,
        **{name: getattr(session.tls, name, None) for name in names},
    }
