"""Backends over TLS that misbehave: every one leads to a clear line, a counter and a 421, and nothing is lost or kept."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256

import pytest

from fumi_edge.tls.close_notify import CloseNotify
from tests.edge.backends import Backend, StartBackend, opening
from tests.edge.clients import Clients, Connect
from tests.edge.memory_tls import update_key
from tests.edge.metrics import errors
from tests.edge.program import Program, StartEdge
from tests.edge.test_tls_backends import ALTERNATIVE, context
from tests.edge.test_tunnel import exchange
from tests.support.certificates import Authority, CertificateFiles
from tests.support.peer import Peer
from tests.support.waiting import PATIENCE, until

NO_BACKEND = b"421 4.3.2 Service not available, closing connection\r\n"
StartRaw = Callable[[Callable[[socket.socket], object]], str]


@pytest.fixture(scope="module")
def pair(authority: Authority) -> CertificateFiles:
    return authority.issue("localhost", alternative=ALTERNATIVE)


@pytest.fixture
def raw() -> Iterator[StartRaw]:
    """Starts servers that do something with each connection, without TLS; returns their address."""
    with contextlib.ExitStack() as servers:

        def start(act: Callable[[socket.socket], object]) -> str:
            listening = servers.enter_context(socket.create_server(("127.0.0.1", 0), backlog=64))
            servers.callback(lambda: listening.shutdown(socket.SHUT_RDWR))

            def serve(sock: socket.socket) -> None:
                with sock, contextlib.suppress(OSError):
                    sock.settimeout(30)
                    act(sock)

            def accept() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

            threading.Thread(target=accept, daemon=True).start()
            return f"tls:127.0.0.1:{listening.getsockname()[1]}"

        yield start


def nothing_kept(program: Program, address: str) -> None:
    """No connection to the backend is left, nor a client."""
    until(lambda: program.metric("fumi_edge_backend_connections_active", backend=address) == 0, "the end")
    assert program.metric("fumi_edge_connections_active") == 0


def tls_failed(program: Program, server: Backend, error: str) -> None:
    """The only connection's line has this error of the backend's TLS, which is counted."""
    (line,) = program.ended()
    assert (line["reason"], line["error"]) == ("backend_reset", f"backend: {error}")
    assert errors(program, server, "tls") == 1


def received(client: Peer) -> tuple[bytes, bool]:
    """All bytes of a client, and whether the end was a close_notify."""
    got = bytearray()
    try:
        while piece := client.sock.recv(65536):
            got += piece
    except ssl.SSLEOFError:
        return bytes(got), False
    return bytes(got), True


def answer(data: bytes, end: bool = True) -> Callable[[socket.socket], object]:
    """What says this to the ClientHello, and closes or waits."""

    def act(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(data)
        if end:
            sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass

    return act


HELLOS: dict[str, tuple[Callable[[socket.socket], object], str, str]] = {
    "closes at once": (lambda sock: None, "tls", "closed the connection during the TLS handshake"),
    "closes after the hello": (answer(b""), "tls", "closed the connection during the TLS handshake"),
    "speaks SMTP": (answer(b"220 hi\r\n"), "tls", "TLS has failed: "),
    "sends garbage": (answer(random.Random(1).randbytes(5000)), "tls", "TLS has failed: "),
    "sends zeros": (answer(bytes(70_000)), "tls", "TLS has failed: "),
    "sends a huge record header": (answer(b"\x16\x03\x03\xff\xff" + bytes(66_000)), "tls", "TLS has failed: "),
    "ends in the middle of a record": (answer(b"\x16\x03\x03\x10\x00" + bytes(100)), "tls", "closed the connection during"),
    "sends an alert": (answer(b"\x15\x03\x03\x00\x02\x02\x50"), "tls", "ended TLS with an alert: internal error"),
    "sends an alert about no certificate": (
        answer(b"\x15\x03\x03\x00\x02\x02\x28"),
        "tls",
        "ended TLS with an alert: handshake failure; it may require a certificate: --backend-cert",
    ),
    "hangs": (answer(b"", end=False), "timeout", "timed out"),
    "hangs in the middle of a record": (answer(b"\x16\x03\x03\x00\x7a\x02", end=False), "timeout", "timed out"),
}


@pytest.mark.parametrize("port", ["tls", "starttls"])
@pytest.mark.parametrize("kind", HELLOS)
def test_a_backend_is_passed_over_that(edge: StartEdge, clients: Clients, raw: StartRaw, kind: str, port: str) -> None:
    act, reason, text = HELLOS[kind]
    address = raw(act)
    program = edge("--connect-timeout", "0.5" if reason == "timeout" else "30", backend=address)
    client = clients.tls(program.tls_port) if port == "tls" else clients.plain(program.starttls_port)
    assert client.line() == NO_BACKEND
    assert client.rest() == b""
    client.close()
    (line,) = program.ended()
    assert (line["reason"], text in line["error"]) == ("no_backend", True), line
    assert program.metric("fumi_edge_backend_errors_total", backend=address, reason=reason) == 1
    nothing_kept(program, address)


@pytest.mark.parametrize("seed", range(2))
def test_a_handshake_that_is_disturbed_anywhere_is_an_error_and_no_more(
    edge: StartEdge, clients: Clients, raw: StartRaw, authority: Authority, pair: CertificateFiles, seed: int
) -> None:
    """A byte is changed, or the stream is cut, somewhere between the ServerHello and the banner."""
    numbers = random.Random(seed)
    server = context(pair)

    def act(sock: socket.socket) -> None:
        sock.settimeout(1)  # a length that was changed has both sides wait
        into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = server.wrap_bio(into, out, server_side=True)
        at, cut, sent = numbers.randrange(1200), numbers.random() < 0.5, 0
        greeted = False
        while True:
            try:
                if not greeted:
                    tls.do_handshake()
                    tls.write(b"220 hi\r\n")
                    greeted = True
            except ssl.SSLWantReadError:
                pass
            data = bytearray(out.read())
            if sent <= at < sent + len(data):
                if cut:
                    sock.sendall(data[: at - sent])
                    return
                data[at - sent] ^= 1 << numbers.randrange(8)
            sent += len(data)
            sock.sendall(data)
            if not (heard := sock.recv(65536)):
                return
            into.write(heard)

    address = raw(act)
    program = edge("--connect-timeout", "0.5", "--backend-ca", str(authority.path), backend=address)
    for _ in range(5):
        client = clients.tls(program.tls_port)
        client.say(b"QUIT\r\n")
        # A stream that was disturbed after the banner ends without close_notify.
        with contextlib.suppress(ssl.SSLEOFError):
            assert client.rest() in (NO_BACKEND, b"220 hi\r\n", b"")
        client.close()
    program.ended(5)
    nothing_kept(program, address)


def test_a_backend_that_closes_without_close_notify_in_mid_reply_is_an_error_and_nothing_is_lost(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority, pair: CertificateFiles
) -> None:
    data = random.Random(2).randbytes(1_000_000)

    def handler(peer: Peer) -> None:
        peer.say(data)
        peer.end()
        peer.rest()

    server = backend(handler, tls=context(pair))
    program = edge("--backend-ca", str(authority.path), backend=server)
    client = clients.tls(program.tls_port)
    got, whole = received(client)
    assert not whole
    assert sha256(got).digest() == sha256(data).digest()
    client.close()
    tls_failed(program, server, "closed the connection without close_notify")
    nothing_kept(program, server.address)


def test_a_reset_of_the_backend_in_mid_reply_is_not_an_orderly_end(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority, pair: CertificateFiles
) -> None:
    """Anybody on the way can send a reset, and TLS does not protect from it: the client must not see a whole stream."""
    read = threading.Event()

    def handler(peer: Peer) -> None:
        peer.say(b"250-half\r\n")
        read.wait(PATIENCE)
        peer.reset()

    server = backend(handler, tls=context(pair))
    program = edge("--backend-ca", str(authority.path), backend=server)
    client = clients.tls(program.tls_port)
    assert client.line() == b"250-half\r\n"
    read.set()
    assert received(client) == (b"", False)
    client.close()
    tls_failed(program, server, "closed the connection without close_notify")
    nothing_kept(program, server.address)


def test_a_record_that_was_changed_ends_the_connection_after_what_came_before(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority, pair: CertificateFiles
) -> None:
    def handler(peer: Peer) -> None:
        peer.say(b"x" * 40_000)
        socket.socket.sendall(peer.sock, b"\x17\x03\x03\x00\x20" + bytes(32))
        peer.rest()

    server = backend(handler, tls=context(pair))
    program = edge("--backend-ca", str(authority.path), backend=server)
    client = clients.tls(program.tls_port)
    assert received(client) == (b"x" * 40_000, False)
    client.close()
    tls_failed(program, server, "TLS has failed: decryption failed or bad record mac")


def test_before_an_upgrade_a_cut_reply_is_an_error_too(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority, pair: CertificateFiles
) -> None:
    def handler(peer: Peer) -> None:
        peer.say(b"220 hi\r\n")
        peer.line()
        peer.say(b"250-half\r\n")
        peer.end()
        peer.rest()

    server = backend(handler, tls=context(pair))
    program = edge("--backend-ca", str(authority.path), backend=server)
    client = clients.plain(program.starttls_port)
    assert client.line() == b"220 hi\r\n"
    client.say(b"EHLO me\r\n")
    client.rest()
    client.close()
    tls_failed(program, server, "closed the connection without close_notify")
    nothing_kept(program, server.address)


def test_a_backend_that_greets_late_over_tls_is_waited_for(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority, pair: CertificateFiles
) -> None:
    """The time to connect is for TCP and TLS, and not for the banner."""
    go = threading.Event()

    def handler(peer: Peer) -> None:
        go.wait(30)
        peer.say(b"220 hi\r\n")

    server = backend(handler, tls=context(pair))
    program = edge("--connect-timeout", "1", "--backend-ca", str(authority.path), backend=server)
    client = clients.tls(program.tls_port)
    server.peer()
    threading.Timer(1.5, go.set).start()
    assert client.line() == b"220 hi\r\n"


@pytest.mark.parametrize("slow", ["nobody", "client", "backend"])
def test_every_byte_arrives_in_both_directions_at_once(
    backend: StartBackend, edge: StartEdge, connect: Connect, authority: Authority, pair: CertificateFiles, slow: str
) -> None:
    size = 10 << 20
    up, down = random.Random(1).randbytes(size), random.Random(2).randbytes(size)
    received: list[bytes] = []

    def handler(peer: Peer) -> None:
        opening(peer, connect.tls)
        begin, peer._buffered = peer._buffered, b""
        received.append(begin + exchange(peer, down, size - len(begin), slow == "backend"))

    program = edge("--backend-ca", str(authority.path), backend=backend(handler, tls=context(pair)))
    client = connect(program, buffer=65536 if slow == "client" else None)
    got = exchange(client, up, size, slow == "client")
    until(lambda: received, "the last byte")
    assert sha256(got).digest() == sha256(down).digest()
    assert sha256(received[0]).digest() == sha256(up).digest()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_backend_that_ends_its_side_over_tls_still_gets_what_the_client_sends(
    backend: StartBackend,
    edge: StartEdge,
    connect: Connect,
    authority: Authority,
    pair: CertificateFiles,
    version: ssl.TLSVersion,
) -> None:
    heard: list[bytes] = []

    def handler(peer: Peer) -> None:
        opening(peer, connect.tls)
        peer.say(b"last words\r\n")
        with contextlib.closing(CloseNotify()) as close_notify:
            close_notify.open()
            peer.sock.setblocking(False)
            record = close_notify.record(peer.tls)
            peer.sock.settimeout(PATIENCE)
            socket.socket.sendall(peer.sock, record)
        peer.end()
        heard.append(peer.rest())

    program = edge("--backend-ca", str(authority.path), backend=backend(handler, tls=context(pair, version=version)))
    client = connect(program)
    assert client.rest() == b"last words\r\n"
    client.say(b"x" * 300_000)
    client.close()
    assert len(until(lambda: heard, "the client's bytes")[0]) == 300_000


def test_a_client_that_ends_its_side_is_a_close_notify_for_the_backend_and_still_gets_its_reply(
    backend: StartBackend, edge: StartEdge, connect: Connect, authority: Authority, pair: CertificateFiles
) -> None:
    heard: list[bytes] = []

    def handler(peer: Peer) -> None:
        opening(peer, connect.tls)
        heard.append(peer.rest())  # an end without close_notify would be an error here
        peer.say(b"250 got it\r\n")

    program = edge("--backend-ca", str(authority.path), backend=backend(handler, tls=context(pair)))
    client = connect(program)
    client.say(b"all of it\r\n")
    client.end()
    assert client.rest() == b"250 got it\r\n"
    assert heard == [b"all of it\r\n"]


def test_key_updates_of_a_backend_are_answered_and_lose_nothing(
    backend: StartBackend, edge: StartEdge, connect: Connect, authority: Authority, pair: CertificateFiles
) -> None:
    def handler(peer: Peer) -> None:
        opening(peer, connect.tls)
        for _ in range(20):
            update_key(peer.tls)
            peer.say(b"x" * 20_000 + b"\r\n")
            assert peer.line() == b"y" * 20_000 + b"\r\n"

    program = edge("--backend-ca", str(authority.path), backend=backend(handler, tls=context(pair)))
    client = connect(program)
    for _ in range(20):
        assert client.line() == b"x" * 20_000 + b"\r\n"
        client.say(b"y" * 20_000 + b"\r\n")
    assert client.rest() == b""


def test_a_flood_of_key_updates_is_ended_and_others_are_served(
    backend: StartBackend, edge: StartEdge, clients: Clients, authority: Authority, pair: CertificateFiles
) -> None:
    flooded = threading.Event()

    def handler(peer: Peer) -> None:
        peer.say(b"220 hi\r\n")
        if peer.line() != b"FLOOD\r\n":
            return
        flooded.set()
        with contextlib.suppress(OSError):
            while True:
                update_key(peer.tls)
                peer.tls.do_handshake()  # sends it

    program = edge("--backend-ca", str(authority.path), backend=backend(handler, tls=context(pair)))
    client = clients.tls(program.tls_port)
    client.say(b"FLOOD\r\n")
    assert flooded.wait(30)
    for _ in range(3):
        other = clients.tls(program.tls_port)
        assert other.line() == b"220 hi\r\n"
        other.close()
    client.close()


def test_memory_stays_small_behind_a_backend_over_tls_that_stalls(
    backend: StartBackend, edge: StartEdge, connect: Connect, authority: Authority, pair: CertificateFiles
) -> None:
    total = 60 << 20
    go, pause = threading.Event(), threading.Event()
    heard: list[int] = []

    def handler(peer: Peer) -> None:
        opening(peer, connect.tls)
        go.wait(PATIENCE)
        count = len(peer._buffered)
        while count < total and (data := peer.sock.recv(1 << 20)):
            count += len(data)
        heard.append(count)

    program = edge("--backend-ca", str(authority.path), backend=backend(handler, tls=context(pair)))
    client = connect(program)
    before = program.memory()
    sent: list[int] = []

    def push() -> None:
        for _ in range(total >> 20):
            client.sock.sendall(bytes(1 << 20))
            sent.append(1)

    pushing = threading.Thread(target=push)
    pushing.start()
    previous = -1
    while previous != len(sent):
        previous = len(sent)
        pause.wait(0.5)
    assert previous < total >> 20, "nothing has stalled"
    assert program.memory() - before < 5 << 20
    go.set()
    pushing.join()
    assert until(lambda: heard, "the rest") == [total]
    assert program.memory() - before < 5 << 20
