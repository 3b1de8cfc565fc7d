"""Implicit TLS ports: the handshake, what the backend is told, and what a client gets when there is no backend."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import pytest

from fumi_edge.tls.handshake import server_name
from tests.edge.backends import StartBackend
from tests.edge.clients import Clients
from tests.edge.program import Program, StartEdge
from tests.support.certificates import CertificateFiles


def test_the_backend_gets_the_clients_address_and_tls_facts(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    server = backend()
    program = edge("--alpn", "smtp", backend=server)
    context = clients.context()
    context.set_alpn_protocols(["smtp"])
    client = clients.tls(program.tls_port, context=context)
    name = client.sock.getsockname()
    assert client.line() == b"220 backend.test ESMTP\r\n"
    header, tls = server.peer().header, server.peer().client_tls
    assert (header.version, header.command, header.transport) == (2, "PROXY", "TCP4")
    assert header.source == name
    assert header.destination == ("127.0.0.1", program.tls_port)
    assert tls.version == client.tls.version() == "TLSv1.3"
    agreed = client.tls.cipher()
    assert agreed
    assert tls.cipher == agreed[0]
    assert tls.sni == header.authority == "localhost"
    assert tls.alpn == "smtp"
    assert not tls.client_cert
    assert header.crc32c is not None
    assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
    client.close()
    ended = program.ended()[0]
    assert ended["id"] == server.peer().unique_id
    assert (ended["tls"], ended["sni"], ended["backend"]) == ("TLSv1.3", "localhost", server.address)
    assert (ended["bytes_in"], ended["bytes_out"]) == (6, len(b"220 backend.test ESMTP\r\n221 2.0.0 bye\r\n"))


def test_a_resumed_session_of_tls_1_2_has_the_server_name_of_this_handshake(
    backend: StartBackend, edge: StartEdge, clients: Clients
) -> None:
    server = backend()
    program = edge(backend=server)
    context = clients.context()
    context.check_hostname = False
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    first = clients.tls(program.tls_port, "other.test", context)
    first.line()
    raw = clients.plain(program.tls_port)
    with context.wrap_socket(raw.sock, server_hostname="localhost", session=first.tls.session) as second:
        assert second.session_reused
        assert second.recv(3) == b"220"
    assert server.peer().header.authority == "other.test"
    assert server.peer(1).header.authority == "localhost"


@pytest.mark.parametrize("name", ["mail.test", None])
def test_the_name_in_a_client_hello_is_found_unless_it_is_cut(name: str | None) -> None:
    context = ssl.create_default_context()
    context.check_hostname = False
    sent = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello = sent.read()
    assert server_name(hello) == name
    assert {server_name(hello[:length]) for length in range(len(hello))} <= {None, name}


def test_unique_ids_are_unique_and_printable(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    server = backend()
    program = edge(backend=server)
    for _ in range(5):
        clients.tls(program.tls_port).line()
    ids = {server.peer(number).unique_id for number in range(5)}
    assert len(ids) == 5
    assert all(each.isascii() and each.isprintable() and " " not in each for each in ids)


def test_version_1_names_the_client_in_a_line(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    server = backend()
    program = edge("--proxy-protocol", "v1", backend=server)
    client = clients.tls(program.tls_port)
    assert client.line() == b"220 backend.test ESMTP\r\n"
    assert (server.peer().header.version, server.peer().header.source) == (1, client.sock.getsockname())


def test_without_the_proxy_protocol_the_backend_gets_plain_smtp(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    server = backend(proxy=False)
    program = edge("--proxy-protocol", "off", backend=server)
    client = clients.tls(program.tls_port)
    assert client.line() == b"220 backend.test ESMTP\r\n"
    assert client.ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    assert server.peer().heard == [b"NOOP\r\n"]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_sessions_are_resumed(backend: StartBackend, edge: StartEdge, clients: Clients, version: ssl.TLSVersion) -> None:
    program = edge(backend=backend())
    context = clients.context()
    context.minimum_version = context.maximum_version = version
    first = clients.tls(program.tls_port, context=context)
    first.line()
    raw = clients.plain(program.tls_port)
    second = context.wrap_socket(raw.sock, server_hostname="localhost", session=first.tls.session)
    assert second.session_reused
    second.recv(100)
    name = version.name.replace("_", ".")
    assert sum(_sessions(program, name, "true")) == 1
    second.close()


def _sessions(program: Program, version: str, resumed: str) -> Iterator[float]:
    for line in program.fetch("/metrics")[1].splitlines():
        if line.startswith("fumi_edge_tls_sessions_total{") and f'version="{version}"' in line and f'resumed="{resumed}"' in line:
            yield float(line.rpartition(" ")[2])


def test_versions_before_the_minimum_are_refused(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    program = edge("--min-tls", "1.3", backend=backend())
    context = clients.context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"):
        clients.tls(program.tls_port, context=context)
    assert program.ended()[0]["reason"] == "handshake_protocol"


def test_ciphers_without_forward_secrecy_are_refused(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    program = edge(backend=backend())
    context = clients.context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AES128-GCM-SHA256:AES256-SHA:ECDHE-ECDSA-AES128-SHA")
    with pytest.raises(ssl.SSLError, match=r"(?i)handshake.failure"):
        clients.tls(program.tls_port, context=context)


def test_the_backend_is_contacted_only_after_the_handshake(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    server = backend()
    program = edge("--handshake-timeout", "2", "--log-level", "debug", backend=server)
    silent = clients.plain(program.tls_port)
    nonsense = clients.plain(program.tls_port)
    nonsense.say(b"EHLO plaintext.test\r\n")
    half = clients.plain(program.tls_port)
    half.say(b"\x16\x03\x01\x02\x00\x01\x00")
    gone = clients.plain(program.tls_port)
    gone.reset()
    assert silent.rest() == b""
    half.rest()
    nonsense.rest()
    nonsense.close()
    reasons = sorted(entry["reason"] for entry in program.ended(4))
    assert reasons == ["handshake_protocol", "handshake_reset", "handshake_timeout", "handshake_timeout"]
    # Those that sent nothing began no handshake.
    for result, count in (("timeout", 1), ("protocol", 1), ("reset", 0), ("ok", 0)):
        assert program.metric("fumi_edge_handshakes_total", listener=f"127.0.0.1:{program.tls_port}", result=result) == count
    assert server.peers == []


def test_a_client_that_distrusts_the_certificate_is_counted_as_such(
    backend: StartBackend, edge: StartEdge, clients: Clients
) -> None:
    program = edge(backend=backend())
    with pytest.raises(ssl.SSLCertVerificationError):
        clients.tls(program.tls_port, context=ssl.create_default_context())
    # In TLS 1.3 the client's alert comes after the server's handshake is over; before, during it.
    context = ssl.create_default_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLCertVerificationError):
        clients.tls(program.tls_port, context=context)
    assert [entry["reason"] for entry in program.ended(2)][-1] == "handshake_certificate"


def test_a_server_name_that_is_not_ascii_is_one_log_line(
    backend: StartBackend, edge: StartEdge, clients: Clients, certificate: CertificateFiles
) -> None:
    program = edge(backend=backend())
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = clients.context().wrap_bio(incoming, outgoing, server_hostname="aaaaaaaa.example")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    assert b"aaaaaaaa.example" in hello
    raw = clients.plain(program.tls_port)
    raw.say(hello.replace(b"aaaaaaaa.example", b"\xff\xfe\xfd\xfc\xfb\xfa\xf9\xf8.example"))
    raw.rest()
    raw.close()
    assert program.ended()[0]["reason"] == "handshake_protocol"
    assert len(program.events("server name is not ASCII")) == 1


def test_without_a_backend_the_client_gets_421_over_tls_and_a_clean_close(
    edge: StartEdge, clients: Clients, backend: StartBackend
) -> None:
    server = backend()
    server.close()
    program = edge(backend=server)
    client = clients.tls(program.tls_port)
    answer = client.rest()  # raises where close_notify is missing
    assert answer.startswith(b"421 4.3.2 ")
    assert answer.endswith(b"\r\n")
    client.close()
    assert program.ended()[0]["reason"] == "no_backend"
    assert program.metric("fumi_edge_backend_errors_total", reason="refused") == 1
    assert program.metric("fumi_edge_backend_up", backend=server.address) == 0


def test_a_backend_that_does_not_accept_is_a_421_after_the_connect_timeout(edge: StartEdge, clients: Clients) -> None:
    full = socket.socket()
    full.bind(("127.0.0.1", 0))
    full.listen(0)
    fillers = []
    for _ in range(4):
        fillers.append(socket.socket())
        fillers[-1].setblocking(False)
        fillers[-1].connect_ex(full.getsockname())
    program = edge("--connect-timeout", "0.3", backend=f"127.0.0.1:{full.getsockname()[1]}")
    assert clients.tls(program.tls_port).rest().startswith(b"421 4.3.2 ")
    assert program.metric("fumi_edge_backend_errors_total", reason="timeout") == 1
    for each in (full, *fillers):
        each.close()


def test_the_next_backend_is_used_when_the_first_does_not_answer(
    backend: StartBackend, edge: StartEdge, clients: Clients
) -> None:
    dead, alive = backend(), backend()
    dead.close()
    program = edge("--backend", alive.address, backend=dead)
    for _ in range(3):
        assert clients.tls(program.tls_port).line() == b"220 backend.test ESMTP\r\n"
    assert len(alive.peers) == 3
    assert program.metric("fumi_edge_backend_up", backend=alive.address) == 1
    # Once it has failed it is asked last for a while.
    assert program.metric("fumi_edge_backend_errors_total", backend=dead.address, reason="refused") == 1


def test_a_backend_may_be_named(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    server = backend()
    program = edge(backend="localhost:" + server.address.rpartition(":")[2])
    assert clients.tls(program.tls_port).line() == b"220 backend.test ESMTP\r\n"
