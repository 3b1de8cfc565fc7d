"""Client certificates: what the backend is told of them, and how those that are refused hear of it."""

from __future__ import annotations

import select
import ssl
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol, cast

import pytest

from fumi_core.proxy_protocol import SSLValue
from fumi_edge.tls.handshake import CN_LIMIT, HandshakeError, _check_session, _client_certificate
from fumi_edge.tls.policy import TLSSocket
from tests.edge.backends import StartBackend
from tests.edge.clients import Clients, s_client
from tests.edge.program import StartEdge
from tests.support.certificates import Authority, CertificateFiles, MakeAuthority
from tests.support.peer import Peer
from tests.support.starter import finished
from tests.support.waiting import until

VERSIONS = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)


def ssl_of(peer: Peer) -> SSLValue:
    """The SSL TLV of the backend's PROXY header."""
    assert peer.header.ssl is not None
    return peer.header.ssl


def stand_in(**attributes: object) -> TLSSocket:
    """What a TLS socket says of itself, without a handshake."""
    return cast(TLSSocket, SimpleNamespace(**attributes))


@pytest.fixture(scope="session")
def strangers(make_authority: MakeAuthority) -> Authority:
    return make_authority("Unknown CA")


class MakeContext(Protocol):
    """The fixture ``context``."""

    def __call__(self, pair: CertificateFiles | None = None, version: ssl.TLSVersion | None = None) -> ssl.SSLContext: ...


@pytest.fixture
def context(clients: Clients) -> MakeContext:
    """A client's context: trusts the server, and shows a certificate if it is given one."""

    def make(pair: CertificateFiles | None = None, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
        context = clients.context()
        if version:
            context.minimum_version = context.maximum_version = version
        if pair:
            context.load_cert_chain(*pair)
        return context

    return make


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("demand", ["optional", "required"])
def test_the_backend_gets_the_facts_of_a_clients_certificate(
    backend: StartBackend,
    edge: StartEdge,
    clients: Clients,
    authority: Authority,
    context: MakeContext,
    demand: str,
    version: ssl.TLSVersion,
) -> None:
    server = backend()
    program = edge("--client-ca", str(authority.path), "--client-cert", demand, backend=server)
    showing = context(authority.issue("Jörg's client"), version)
    assert clients.tls(program.tls_port, context=showing).line().startswith(b"220")
    told, tls = ssl_of(server.peer()), server.peer().client_tls
    assert (told.client, told.verify, told.cn) == (0x07, 0, "Jörg's client")
    assert (tls.client_cert, tls.client_cert_verified, tls.client_cn) == (True, True, "Jörg's client")
    # On a STARTTLS port the second connection is the one that tells.
    plain = clients.plain(program.starttls_port)
    plain.line()
    plain.ask(b"STARTTLS\r\n")
    assert clients.upgrade(plain, context=showing).ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    assert server.peer(1).header.ssl is None
    assert ssl_of(server.peer(2)) == told


def test_a_resumed_session_brings_its_certificate_along(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority, context: MakeContext
) -> None:
    server = backend()
    program = edge("--client-ca", str(authority.path), "--client-cert", "required", backend=server)
    showing = context(authority.issue("the client"), ssl.TLSVersion.TLSv1_2)
    first = clients.tls(program.tls_port, context=showing)
    first.line()
    raw = clients.plain(program.tls_port)
    with showing.wrap_socket(raw.sock, server_hostname="localhost", session=first.tls.session) as second:
        assert second.session_reused
        assert second.recv(3) == b"220"
    told = ssl_of(server.peer(1))
    assert (told.client, told.verify, told.cn) == (0x05, 0, "the client")


@pytest.mark.parametrize("demand", ["optional", "required"])
def test_with_tls_1_3_a_client_certificate_is_verified_at_every_connection(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority, context: MakeContext, demand: str
) -> None:
    """A session could be resumed for ever: each time it is, the client gets another ticket."""
    server = backend()
    program = edge("--client-ca", str(authority.path), "--client-cert", demand, backend=server)
    showing = context(authority.issue("the client"), ssl.TLSVersion.TLSv1_3)
    first = clients.tls(program.tls_port, context=showing)
    first.line()
    raw = clients.plain(program.tls_port)
    with showing.wrap_socket(raw.sock, server_hostname="localhost", session=first.tls.session) as second:
        assert not second.session_reused
        assert second.recv(3) == b"220"
    told = ssl_of(server.peer(1))
    assert (told.client, told.verify, told.cn) == (0x07, 0, "the client")


@pytest.mark.parametrize(
    ("not_after", "resumed", "refused"),
    [
        ("Jan  1 00:00:00 2020 GMT", True, True),
        ("Jan  1 00:00:00 2020 GMT", False, False),
        ("Jan  1 00:00:00 2999 GMT", True, False),
    ],
)
def test_a_session_is_good_only_while_its_client_certificate_is(not_after: str, resumed: bool, refused: bool) -> None:
    """In a full handshake OpenSSL verifies it."""
    context = SimpleNamespace(verify_mode=ssl.CERT_OPTIONAL)
    sock = stand_in(session_reused=resumed, context=context, getpeercert=lambda: {"notAfter": not_after})
    if refused:
        with pytest.raises(HandshakeError, match="expired") as failure:
            _check_session(sock)
        assert failure.value.result == "certificate"
    else:
        _check_session(sock)


def test_a_resumed_session_without_a_client_certificate_does_not_expire() -> None:
    context = SimpleNamespace(verify_mode=ssl.CERT_OPTIONAL)
    _check_session(stand_in(session_reused=True, context=context, getpeercert=dict))


@pytest.mark.parametrize("version", VERSIONS)
def test_optional_means_that_a_client_may_have_none(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority, context: MakeContext, version: ssl.TLSVersion
) -> None:
    server = backend()
    program = edge("--client-ca", str(authority.path), backend=server)
    assert clients.tls(program.tls_port, context=context(None, version)).line().startswith(b"220")
    ssl_tlv = ssl_of(server.peer())
    assert (ssl_tlv.client, ssl_tlv.cn) == (0x01, None)
    assert ssl_tlv.verify != 0


@pytest.mark.parametrize("starttls", [False, True])
@pytest.mark.parametrize("demand", ["optional", "required"])
@pytest.mark.parametrize(
    ("who", "version", "alert"),
    [
        ("unknown", "-tls1_3", "alert unknown ca:"),
        ("unknown", "-tls1_2", "alert unknown ca:"),
        ("expired", "-tls1_3", "alert certificate expired:"),
        ("expired", "-tls1_2", "alert certificate expired:"),
        ("nobody", "-tls1_3", "alert certificate required:"),
        ("nobody", "-tls1_2", "alert handshake failure:"),
    ],
)
def test_a_rejected_client_gets_the_reason(
    backend: StartBackend,
    edge: StartEdge,
    authority: Authority,
    strangers: Authority,
    who: str,
    version: str,
    alert: str,
    demand: str,
    starttls: bool,
) -> None:
    """In TLS 1.3 the client is through before it is refused, and has sent its first command: the alert must survive that."""
    server = backend()
    program = edge("--client-ca", str(authority.path), "--client-cert", demand, backend=server)
    flags: list[str | Path] = []
    if who != "nobody":
        cert, key = strangers.issue("c") if who == "unknown" else authority.issue("c", days=-1)
        flags = ["-cert", cert, "-key", key]
    port = program.starttls_port if starttls else program.tls_port
    printed = s_client(port, version, *flags, starttls=starttls, say="EHLO early.test\r\n" * 50 + "QUIT\r\n")
    if who == "nobody" and demand == "optional":
        assert "alert" not in printed
        return
    assert alert in printed
    (ended,) = program.ended()
    assert ended["reason"] == "handshake_certificate"
    name = f"127.0.0.1:{port}"
    assert program.metric("fumi_edge_handshakes_total", listener=name, result="certificate") == 1
    assert len(server.peers) == (1 if starttls else 0)


def test_a_rejected_client_that_goes_on_sending_still_gets_the_reason(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority, context: MakeContext
) -> None:
    """The edge reads on for a while: to close with its words unread would reset the connection, and destroy the alert."""
    program = edge("--client-ca", str(authority.path), "--client-cert", "required", backend=backend())
    client = clients.tls(program.tls_port, context=context(None, ssl.TLSVersion.TLSv1_3))
    # The alert is there, and by now the edge would have closed.
    assert client.sock.fileno() in select.select([client.sock.fileno()], [], [], 30)[0]
    for _ in range(50):
        client.say(b"NOOP\r\n")
    with pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"):
        client.line()
    client.close()
    assert program.ended()[0]["reason"] == "handshake_certificate"


def test_why_a_certificate_did_not_verify_is_in_the_log(
    backend: StartBackend, edge: StartEdge, authority: Authority, strangers: Authority
) -> None:
    program = edge("--client-ca", str(authority.path), backend=backend())
    cert, key = strangers.issue("stranger")
    s_client(program.tls_port, "-cert", cert, "-key", key)
    assert program.ended()[0]["error"] == "certificate verify failed: unable to get local issuer certificate"


@pytest.mark.parametrize(("length", "known"), [(CN_LIMIT, True), (CN_LIMIT + 1, False)])
def test_a_name_too_long_for_the_header_is_left_out(length: int, known: bool) -> None:
    """openssl would not sign one; some authority may."""
    name = "x" * length

    context = SimpleNamespace(verify_mode=ssl.CERT_OPTIONAL)
    presented = stand_in(context=context, getpeercert=lambda: {"subject": ((("commonName", name),),)})
    assert _client_certificate(presented) == (True, name if known else None)


def test_a_name_that_is_no_text_leaves_a_client_without_a_name(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority, context: MakeContext
) -> None:
    """An authority that signs anything must not break a connection, still less the edge."""
    server = backend()
    program = edge("--client-ca", str(authority.path), backend=server)
    client = clients.tls(program.tls_port, context=context(authority.issue("odd", alternative="DER:30:05:86:03:FF:FE:FD")))
    assert client.line().startswith(b"220")
    assert (ssl_of(server.peer()).client, ssl_of(server.peer()).verify) == (0x07, 0)


def test_new_client_cas_are_used_after_the_next_reload(
    backend: StartBackend,
    edge: StartEdge,
    clients: Clients,
    authority: Authority,
    strangers: Authority,
    context: MakeContext,
    tmp_path: Path,
) -> None:
    """Also of clients that would resume a session for which an old one vouched."""
    ca = tmp_path / "ca.pem"
    ca.write_text(authority.path.read_text())
    server = backend()
    program = edge("--client-ca", str(ca), "--client-cert", "required", "--cert-reload-interval", "0.05", backend=server)
    old = context(authority.issue("old"), ssl.TLSVersion.TLSv1_2)
    first = clients.tls(program.tls_port, context=old)
    first.line()
    ca.write_text("# none\n")
    until(lambda: program.events("certificate not loaded"), "the complaint")
    assert clients.tls(program.tls_port, context=old).line().startswith(b"220")
    ca.write_text(strangers.path.read_text())
    until(lambda: program.metric("fumi_edge_certificate_reloads_total", result="ok"), "the reload")
    new = context(strangers.issue("new"), ssl.TLSVersion.TLSv1_2)
    assert clients.tls(program.tls_port, context=new).line().startswith(b"220")
    raw = clients.plain(program.tls_port)
    with pytest.raises(ssl.SSLError, match=r"(?i)unknown ca"):
        old.wrap_socket(raw.sock, server_hostname="localhost", session=first.tls.session)


def test_wrong_settings_are_one_line(certificate: CertificateFiles, tmp_path: Path) -> None:
    cert, key = certificate
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("-----BEGIN CERTIFICATE-----\nbm9uc2Vuc2U=\n-----END CERTIFICATE-----\n")
    flags: list[str | Path] = ["--cert", cert, "--key", key, "--backend", "127.0.0.1:9"]
    for wrong, complaint in (
        (("--client-cert", "required"), "--client-cert needs the CAs of client certificates: add --client-ca"),
        (("--client-ca", tmp_path / "none"), f"{tmp_path}/none: cannot read the client CA: No such file or directory"),
        (("--client-ca", key), f"{key}: holds no PEM certificate"),
        (("--client-ca", nonsense), f"{nonsense}: OpenSSL cannot read"),
    ):
        done = finished("fumi-edge", *flags, *wrong)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"Error: {complaint}")
