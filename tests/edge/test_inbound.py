"""--accept-proxy: a layer-4 balancer in front says who the client is, before TLS and before the banner."""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
from typing import Protocol

import pytest

import fumi_edge.connection.inbound
from fumi_core.proxy_protocol import PP2_TYPE_UNIQUE_ID, Endpoint, ProxyHeader, TLSInfo, tls_tlvs
from fumi_edge.connection.inbound import HeaderError, receive_client
from tests.edge.backends import Backend, StartBackend
from tests.edge.clients import Clients
from tests.edge.metrics import rejected
from tests.edge.program import Program, StartEdge
from tests.support.peer import Peer
from tests.support.waiting import until

SOURCE, DESTINATION = ("192.0.2.7", 40000), ("198.51.100.1", 25)
SOURCE6, DESTINATION6 = ("2001:db8::7", 40000), ("2001:db8::1", 25)


def v2(
    source: Endpoint = SOURCE,
    destination: Endpoint = DESTINATION,
    tlvs: tuple[tuple[int, bytes], ...] = (),
    transport: str = "TCP4",
) -> bytes:
    return ProxyHeader(2, "PROXY", transport, source, destination, tlvs).to_bytes()


class Behind(Protocol):
    """The fixture ``behind``."""

    def __call__(self, *flags: str) -> tuple[Program, Backend]: ...


class Arrive(Protocol):
    """The fixture ``arrive``."""

    def __call__(self, program: Program, header: bytes, tls: bool = True) -> Peer: ...


@pytest.fixture
def behind(edge: StartEdge, backend: StartBackend) -> Behind:
    """An edge that takes clients from a balancer, and its backend."""

    def behind(*flags: str) -> tuple[Program, Backend]:
        server = backend()
        return edge("--accept-proxy", *flags, backend=server), server

    return behind


@pytest.fixture
def arrive(clients: Clients) -> Arrive:
    """A client that comes through a balancer: by TLS, or to the STARTTLS port."""

    def arrive(program: Program, header: bytes, tls: bool = True) -> Peer:
        client = clients.plain(program.tls_port if tls else program.starttls_port)
        client.say(header)
        return clients.upgrade(client) if tls else client

    return arrive


HEADERS = [
    pytest.param(v2(), SOURCE, DESTINATION, id="v2"),
    pytest.param(v2(SOURCE6, DESTINATION6, transport="TCP6"), SOURCE6, DESTINATION6, id="v2-ipv6"),
    pytest.param(ProxyHeader(1, "PROXY", "TCP4", SOURCE, DESTINATION).to_bytes(), SOURCE, DESTINATION, id="v1"),
    pytest.param(
        v2(("::ffff:192.0.2.7", 40000), ("::ffff:198.51.100.1", 25), transport="TCP6"), SOURCE, DESTINATION, id="mapped"
    ),
    pytest.param(v2("/client", "/server", transport="UNIX"), "/client", "/server", id="unix"),
]


@pytest.mark.parametrize("tls", [True, False], ids=["tls", "starttls"])
@pytest.mark.parametrize(("header", "source", "destination"), HEADERS)
def test_the_backend_and_the_log_get_the_original_client(
    behind: Behind, arrive: Arrive, header: bytes, source: Endpoint, destination: Endpoint, tls: bool
) -> None:
    program, server = behind()
    client = arrive(program, header, tls)
    assert client.line() == b"220 backend.test ESMTP\r\n"
    assert server.peer().header.source == source
    assert server.peer().header.destination == destination
    assert (server.peer().header.tls is not None) is tls
    assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
    client.rest()
    client.close()
    (line,) = program.ended()
    assert (line["client_ip"], line.get("client_port")) == (("unix", None) if isinstance(source, str) else source)


def test_the_client_stays_the_same_through_an_upgrade(behind: Behind, arrive: Arrive, clients: Clients) -> None:
    program, server = behind()
    client = arrive(program, v2(), tls=False)
    client.line()
    assert clients.starttls(client).ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    assert [peer.header.source for peer in server.peers] == [SOURCE, SOURCE]


@pytest.mark.parametrize(("given", "logged"), [(b"lb-17", "lb-17"), (b"\0" * 64 + b"\xff" * 64, "00" * 64 + "ff" * 64)])
def test_the_balancers_unique_id_is_kept(behind: Behind, arrive: Arrive, given: bytes, logged: str) -> None:
    program, server = behind()
    client = arrive(program, v2(tlvs=((PP2_TYPE_UNIQUE_ID, given),)))
    client.line()
    assert server.peer().header.unique_id == given
    client.ask(b"QUIT\r\n")
    client.close()
    assert program.ended()[0]["id"] == logged


def test_tls_facts_of_the_balancer_are_not_passed_on(behind: Behind, arrive: Arrive) -> None:
    program, server = behind()
    lie = tls_tlvs(TLSInfo("TLSv1.3", "TLS_AES_128_GCM_SHA256", "liar.test", None, True, True, "liar"))
    arrive(program, v2(tlvs=lie), tls=False).line()
    assert server.peer().header.tls is None
    assert server.peer().header.authority is None
    arrive(program, v2(tlvs=lie)).line()
    assert server.peer(1).client_tls.sni == "localhost"
    assert not server.peer(1).client_tls.client_cert


@pytest.mark.parametrize("tls", [True, False], ids=["tls", "starttls"])
def test_local_is_the_balancer_itself_and_no_client_for_the_backend_either(behind: Behind, arrive: Arrive, tls: bool) -> None:
    program, server = behind()
    client = arrive(program, ProxyHeader(2, "LOCAL").to_bytes(), tls=tls)
    assert client.line().startswith(b"220")
    # What came as LOCAL is not among them.
    assert server.peers == []


def test_unknown_is_the_balancer_itself(behind: Behind, arrive: Arrive) -> None:
    program, server = behind()
    client = arrive(program, b"PROXY UNKNOWN\r\n")
    assert client.line().startswith(b"220")
    assert server.peer().header.source == client.sock.getsockname()
    assert server.peer().header.unique_id


def test_header_and_client_hello_may_come_in_one_packet(behind: Behind, clients: Clients) -> None:
    program, server = behind()
    client = clients.plain(program.tls_port)
    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    client.say(v2())
    client = clients.upgrade(client)
    assert client.line() == b"220 backend.test ESMTP\r\n"
    assert server.peer().header.source == SOURCE


def test_header_and_commands_may_come_in_one_packet_or_byte_by_byte(behind: Behind, clients: Clients) -> None:
    program, server = behind()
    client = clients.plain(program.starttls_port)
    client.say(v2() + b"NOOP\r\n")
    assert client.line() == b"220 backend.test ESMTP\r\n"
    assert client.line() == b"250 2.0.0 ok\r\n"
    slow = clients.plain(program.starttls_port)
    slow.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in v2(SOURCE6, DESTINATION6, transport="TCP6"):
        slow.say(bytes([byte]))
    assert slow.line() == b"220 backend.test ESMTP\r\n"
    assert server.peer(1).header.source == SOURCE6


def test_an_untrusted_peer_is_closed_at_once_and_counted(behind: Behind, clients: Clients) -> None:
    program, server = behind("--trusted-proxy", "192.0.2.0/24")
    assert ended(clients.plain(program.starttls_port)) == b""
    with pytest.raises((ssl.SSLError, ConnectionError)):
        clients.tls(program.tls_port)
    assert rejected(program, "untrusted") == 2
    assert rejected(program, "proxy_header") == 0
    assert until(lambda: program.events("rejected"), "the line")[0]["reason"] == "untrusted"
    assert server.peers == []


def test_trusted_proxies_may_be_named_one_by_one(behind: Behind, arrive: Arrive) -> None:
    program, _ = behind("--trusted-proxy", "192.0.2.0/24", "--trusted-proxy", "127.0.0.1")
    assert arrive(program, v2()).line().startswith(b"220")


def ended(client: Peer) -> bytes:
    try:
        return client.rest()
    except ConnectionResetError:
        return b""


@pytest.mark.parametrize(
    "junk",
    [b"EHLO me\r\n", b"\x16\x03\x01\x02\x00\x01\x00", v2()[:12] + b"\xff", b"PROXY TCP4 1.2.3.4\r\n", b"PROXY " + b"x" * 200],
)
@pytest.mark.parametrize("tls", [True, False], ids=["tls", "starttls"])
def test_data_that_is_no_header_is_closed_without_a_reply_and_counted(
    behind: Behind, clients: Clients, junk: bytes, tls: bool
) -> None:
    program, server = behind()
    client = clients.plain(program.tls_port if tls else program.starttls_port)
    client.say(junk)
    assert ended(client) == b""
    assert [entry["reason"] for entry in program.ended()] == ["proxy_header"]
    assert rejected(program, "proxy_header") == 1
    assert server.peers == []


def test_a_header_that_is_cut_off_is_counted(behind: Behind, clients: Clients) -> None:
    program, _ = behind()
    client = clients.plain(program.tls_port)
    client.say(v2()[:20])
    client.end()
    assert ended(client) == b""
    program.ended()
    assert rejected(program, "proxy_header") == 1


def test_a_balancer_that_only_looks_whether_the_port_is_open_is_no_news(behind: Behind, clients: Clients, arrive: Arrive) -> None:
    program, _ = behind()
    for _ in range(3):
        clients.plain(program.tls_port).close()
    listener = f"127.0.0.1:{program.tls_port}"
    until(lambda: program.metric("fumi_edge_connections_total", listener=listener) == 3, "the look")
    until(lambda: program.metric("fumi_edge_connections_active", listener=listener) == 0, "the end")
    assert rejected(program, "proxy_header") == 0
    assert program.events("connection ended") == []


def test_a_balancers_checks_are_no_clients_without_tls(behind: Behind, clients: Clients) -> None:
    program, _ = behind()
    own = clients.plain(program.starttls_port)
    source, destination = own.sock.getsockname(), own.sock.getpeername()
    own.say(ProxyHeader(1, "PROXY", "TCP4", source, destination).to_bytes())
    local, unknown, mute, real = (clients.plain(program.starttls_port) for _ in range(4))
    local.say(ProxyHeader(2, "LOCAL").to_bytes())
    unknown.say(b"PROXY UNKNOWN\r\n")
    real.say(v2())
    mute.close()
    for client in (own, local, unknown, real):
        client.line()
        client.ask(b"EHLO balancer\r\n")
        client.ask(b"QUIT\r\n")
        client.close()
    listener = f"127.0.0.1:{program.starttls_port}"
    until(lambda: program.metric("fumi_edge_session_seconds_count") == 5, "the end of all")
    assert program.metric("fumi_edge_connections_total", listener=listener) == 5
    results = ("upgraded", "plaintext", "refused", "injection")
    assert [program.metric("fumi_edge_starttls_total", result=result) for result in results] == [0, 1, 0, 0]


def test_without_accept_proxy_a_header_is_nonsense(edge: StartEdge, backend: StartBackend, clients: Clients) -> None:
    program = edge(backend=backend())
    client = clients.plain(program.tls_port)
    client.say(v2())
    with pytest.raises(ssl.SSLError):
        clients.upgrade(client)


def test_a_header_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process, because the limit is five seconds."""
    monkeypatch.setattr(fumi_edge.connection.inbound, "HEADER_TIMEOUT", 0.2)

    async def scenario() -> None:
        near, far = socket.socketpair()
        with near, far:
            near.setblocking(False)
            far.sendall(v2()[:20])
            with pytest.raises(HeaderError, match="in time"):
                await receive_client(asyncio.get_running_loop(), near)

    asyncio.run(asyncio.wait_for(scenario(), 30))


@pytest.mark.parametrize("size", [1, 7, len(v2()) - 1, len(v2()), len(v2()) + 1, 1000])
def test_a_header_is_read_in_pieces_of_any_length_and_nothing_after_it(size: int) -> None:
    async def scenario() -> None:
        near, far = socket.socketpair()
        with near, far:
            near.setblocking(False)
            reading = asyncio.get_running_loop().create_task(receive_client(asyncio.get_running_loop(), near))
            stream = v2() + b"what follows"
            for at in range(0, len(stream), size):
                far.sendall(stream[at : at + size])
                while not reading.done() and select.select([near], [], [], 0)[0]:
                    await asyncio.sleep(0)
            client = await reading
            assert (client.source, client.destination) == (SOURCE, DESTINATION)
            assert near.recv(100) == b"what follows"

    asyncio.run(asyncio.wait_for(scenario(), 30))
