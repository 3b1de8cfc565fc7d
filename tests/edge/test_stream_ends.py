"""How each end of a stream is passed on: half-closes, close_notify, last replies, resets."""

from __future__ import annotations

import asyncio
import contextlib
import select
import signal
import socket
import ssl
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

import fumi_edge.connection.tunnel
from fumi_edge.connection.tunnel import BUFFER_SIZE, LINGER_SECONDS, Tunnel
from fumi_edge.tls.close_notify import CloseNotify
from tests.edge.backends import StartBackend, opening
from tests.edge.buffers import settled, waiting
from tests.edge.clients import Clients, Connect, Dial
from tests.edge.metrics import gone
from tests.edge.program import Program, StartEdge
from tests.support.certificates import CertificateFiles
from tests.support.peer import Peer
from tests.support.waiting import until


def test_a_client_that_uploads_slowly_to_a_half_closed_backend_is_not_cut_off() -> None:
    """Only silence counts as lingering. The test sets the tunnel's time, so it need not wait."""

    async def trickle(ends: Sequence[socket.socket]) -> None:
        loop = asyncio.get_running_loop()
        client, ours, theirs, backend = ends
        buffer = memoryview(bytearray(fumi_edge.connection.tunnel.BUFFER_SIZE))
        tunnel = fumi_edge.connection.tunnel.Tunnel(loop, buffer, CloseNotify(), ours, theirs, 900.0)
        running = loop.create_task(tunnel.run())
        backend.shutdown(socket.SHUT_WR)
        assert await loop.sock_recv(client, 10) == b""
        now = loop.time()
        for _ in range(10):
            await loop.sock_sendall(client, b"more")
            assert await loop.sock_recv(backend, 10) == b"more"
            now += fumi_edge.connection.tunnel.LINGER_SECONDS * 0.7
            tunnel.tick(now)
            await asyncio.sleep(0.01)
            assert not running.done()
        tunnel.tick(now + fumi_edge.connection.tunnel.LINGER_SECONDS * 1.1)
        await running

    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(sock) for pair in (socket.socketpair(), socket.socketpair()) for sock in pair]
        for sock in ends:
            sock.setblocking(False)
        asyncio.run(asyncio.wait_for(trickle(ends), 20))


def test_a_client_that_goes_on_sending_to_a_closed_backend_is_disconnected_in_time() -> None:
    """Nobody takes its bytes: each of them would otherwise keep its place for another LINGER_SECONDS."""

    async def trickle(ends: Sequence[socket.socket]) -> None:
        loop = asyncio.get_running_loop()
        client, ours, theirs, backend = ends
        buffer = memoryview(bytearray(BUFFER_SIZE))
        tunnel = Tunnel(loop, buffer, CloseNotify(), ours, theirs, 900.0)
        running = loop.create_task(tunnel.run())
        backend.close()
        assert await loop.sock_recv(client, 10) == b""
        start = loop.time()
        for share in (0.3, 0.6, 0.9):
            await loop.sock_sendall(client, b"more")
            await asyncio.sleep(0.01)
            tunnel.tick(start + LINGER_SECONDS * share)
            assert not running.done()
        await loop.sock_sendall(client, b"more")
        await asyncio.sleep(0.01)
        tunnel.tick(start + LINGER_SECONDS * 1.4)
        assert await asyncio.wait_for(running, 5) == "linger"

    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(sock) for pair in (socket.socketpair(), socket.socketpair()) for sock in pair]
        for sock in ends:
            sock.setblocking(False)
        asyncio.run(asyncio.wait_for(trickle(ends), 20))


def test_close_notify_arrives_on_a_unix_socket_whatever_the_size_of_the_last_reply(
    backend: StartBackend, edge: StartEdge, clients: Clients, dial: Dial, tmp_path: Path
) -> None:
    sizes = range(100_000, 240_000, 2_000)
    said = []

    def handler(peer: Peer) -> None:
        peer.say(b"x" * int(peer.line()))
        said.append(peer)

    path = tmp_path / "edge.sock"
    program = edge("--listen", f"unix:{path}", backend=backend(handler))
    context = clients.context()
    peers = {size: dial(path, context) for size in sizes}
    for size, client in peers.items():
        client.say(b"%d\r\n" % size)
    until(lambda: len(said) == len(sizes), "the last reply of every backend")
    settled(lambda: [waiting(client.sock) for client in peers.values()], program)
    wrong: list[tuple[int, int | OSError]] = []
    for size, client in peers.items():
        # An end without close_notify is an error here.
        try:
            got: int | OSError = len(client.rest())
        except OSError as error:
            got = error
        if got != size:
            wrong.append((size, got))
        client.close()
    assert wrong == []
    gone(program, f"unix:{path}")


def test_a_backend_that_ends_its_side_still_gets_what_the_client_sends(
    backend: StartBackend, edge: StartEdge, connect: Connect
) -> None:
    heard = []

    def handler(peer: Peer) -> None:
        opening(peer, connect.tls)
        peer.say(b"last words\r\n")
        peer.end()
        heard.append(peer.rest())

    program = edge(backend=backend(handler))
    client = connect(program)
    assert client.rest() == b"last words\r\n"
    client.say(b"x" * 300_000)
    client.close()
    assert len(until(lambda: heard, "the client's bytes")[0]) == 300_000


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_what_the_client_sends_at_the_moment_of_its_close_notify_still_reaches_the_backend(
    certificate: CertificateFiles, monkeypatch: pytest.MonkeyPatch, version: ssl.TLSVersion
) -> None:
    """unwrap() writes close_notify and then reads: whatever has arrived by then is the tunnel's, and must stay so."""
    server_context, client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=certificate[0])
    server_context.load_cert_chain(*certificate)
    server_context.maximum_version = version
    at_the_end = ssl.SSLSocket.unwrap

    async def upload(client: ssl.SSLSocket, ours: ssl.SSLSocket, theirs: socket.socket, backend: socket.socket) -> bytes:
        def unwrap(sock: ssl.SSLSocket) -> socket.socket:
            client.sendall(b"in between ")
            return at_the_end(sock)

        monkeypatch.setattr(ssl.SSLSocket, "unwrap", unwrap)
        loop = asyncio.get_running_loop()
        close_notify = CloseNotify()
        close_notify.open()
        tunnel = Tunnel(loop, memoryview(bytearray(BUFFER_SIZE)), close_notify, ours, theirs, 900.0)
        running = loop.create_task(tunnel.run())
        client.sendall(b"before ")
        backend.shutdown(socket.SHUT_WR)
        assert await asyncio.to_thread(client.recv, 10) == b""
        client.sendall(b"after")
        client.close()
        assert await running == "backend_closed"
        theirs.close()
        close_notify.close()
        return b"".join(iter(lambda: backend.recv(100), b""))

    with contextlib.ExitStack() as stack:
        pairs = socket.create_server(("127.0.0.1", 0)), socket.socketpair()
        listening, (theirs, backend) = pairs
        for sock in (listening, theirs, backend):
            stack.enter_context(sock)
        raw = socket.create_connection(listening.getsockname())
        accepted, _ = listening.accept()
        ends: list[ssl.SSLSocket] = []
        shaking = threading.Thread(target=lambda: ends.append(server_context.wrap_socket(accepted, server_side=True)))
        shaking.start()
        client = stack.enter_context(client_context.wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False))
        shaking.join()
        ours = stack.enter_context(ends[0])
        ours.setblocking(False)
        theirs.setblocking(False)
        backend.settimeout(20)
        assert asyncio.run(asyncio.wait_for(upload(client, ours, theirs, backend), 20)) == b"before in between after"


def test_a_client_that_ends_its_side_still_gets_the_replies(backend: StartBackend, edge: StartEdge, connect: Connect) -> None:
    def handler(peer: Peer) -> None:
        opening(peer, connect.tls)
        heard = peer.rest()
        peer.say(b"y" * 3_000_000 + b"%d\r\n" % len(heard))

    program = edge(backend=backend(handler))
    client = connect(program)
    client.say(b"x" * 200_000)
    client.end()
    answer = client.rest()
    assert len(answer) > 3_000_000
    assert answer.endswith(b"y200000\r\n")
    assert program.ended()[0]["reason"] == "client_closed"


def test_a_close_notify_ends_the_clients_side_only(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    go = threading.Event()

    def handler(peer: Peer) -> None:
        heard = peer.rest()
        go.wait(20)
        peer.say(b"seen: " + heard)

    program = edge(backend=backend(handler))
    client = clients.tls(program.tls_port)
    client.say(b"all I have")
    # unwrap() sends close_notify and looks for the other's at once; a reply that it finds there would be an error, and lost.
    client.sock.setblocking(False)
    with contextlib.suppress(OSError):
        client.tls.unwrap()
    go.set()
    client.sock.settimeout(20)
    assert client.rest() == b"seen: all I have"


def test_the_last_reply_arrives_although_the_backend_closes_with_bytes_unread(
    backend: StartBackend, edge: StartEdge, connect: Connect
) -> None:
    """Its end is then a reset, and it comes while the client goes on talking."""
    size = 2000

    def handler(peer: Peer) -> None:
        opening(peer, connect.tls)
        while len(peer._buffered) < 100_000 and peer.more():
            pass
        peer.say(b"z" * size)

    program = edge(backend=backend(handler))
    client = connect(program)

    def talk() -> None:
        try:
            for _ in range(400):
                client.sock.sendall(b"x" * 10_000)
        except OSError:
            pass

    talking = threading.Thread(target=talk)
    if not connect.tls:
        talking.start()
    else:
        # Python's TLS sockets are not for two threads at such a moment: send first, as much as fits without a reader.
        client.say(b"x" * 400_000)
    received = 0
    while received < size:
        data = client.sock.recv(65536)
        assert data, f"only {received} bytes"
        received += len(data)
    client.close()
    if not connect.tls:
        talking.join()


def test_a_long_last_reply_arrives_whole_although_the_client_goes_on_talking(
    backend: StartBackend, edge: StartEdge, connect: Connect
) -> None:
    size = 5_000_000

    def handler(peer: Peer) -> None:
        opening(peer, connect.tls)
        peer.say(b"z" * size)
        peer.end()
        peer.rest()

    program = edge(backend=backend(handler))
    client = connect(program)
    client.say(b"x" * 100_000)
    received = 0
    while received < size:
        client.say(b"x" * 1000)
        data = client.sock.recv(65536)
        assert data, f"only {received} bytes"
        received += len(data)
    assert client.rest() == b""


def test_the_end_of_the_stream_is_a_close_notify(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    program = edge(backend=backend(lambda peer: peer.say(b"220 and gone\r\n")))
    client = clients.tls(program.tls_port)
    # The client raises at an end without close_notify.
    assert client.rest() == b"220 and gone\r\n"
    client.close()
    assert program.ended()[0]["reason"] == "backend_closed"


def test_a_client_that_resets_resets_the_connection_to_the_backend(
    backend: StartBackend, edge: StartEdge, connect: Connect
) -> None:
    seen: list[bytes | str] = []

    def handler(peer: Peer) -> None:
        opening(peer, connect.tls)
        peer.say(b"hello\r\n")
        try:
            seen.append(peer.rest())
        except ConnectionResetError:
            seen.append("reset")

    program = edge(backend=backend(handler))
    client = connect(program)
    assert client.line() == b"hello\r\n"
    client.reset()
    assert until(lambda: seen, "the backend's end") == ["reset"]
    assert program.ended()[0]["reason"] == "client_reset"


def pour_until_full(peer: Peer, program: Program) -> None:
    """Send until no bytes are taken for a while: every buffer on the way is full then."""
    peer.sock.setblocking(False)
    data = bytes(1 << 16)
    while select.select([], [peer.sock], [], 0.3)[1] or not program.rests():
        with contextlib.suppress(BlockingIOError, ssl.SSLWantWriteError):
            peer.sock.send(data)
    peer.sock.settimeout(30)


@pytest.mark.parametrize("stream", ["up", "down"])
@pytest.mark.parametrize("who", ["client", "backend"])
def test_a_reset_in_mid_transfer_ends_both_sides_and_no_other_connection(
    backend: StartBackend, edge: StartEdge, connect: Connect, who: str, stream: str
) -> None:
    full, over = threading.Event(), threading.Event()
    told: list[bytes | str] = []

    def handler(peer: Peer) -> None:
        opening(peer, connect.tls)
        peer.say(b"hello\r\n")
        if peer.line() == b"stay\r\n":
            peer.say(peer.line())
            return
        if stream == "down":
            pour_until_full(peer, program)
            full.set()
        over.wait(30)
        if who == "backend":
            peer.reset()
            return
        try:
            told.append(peer.rest())
        except ConnectionResetError:
            told.append("reset")

    program = edge(backend=backend(handler))
    staying, client = connect(program), connect(program)
    assert staying.line() == client.line() == b"hello\r\n"
    staying.say(b"stay\r\n")
    client.say(b"go\r\n")
    if stream == "up":
        pour_until_full(client, program)
    else:
        assert full.wait(30)
    if who == "client":
        client.reset()
        over.set()
        assert until(lambda: told, "the backend's end") == ["reset"]
    else:
        over.set()
        with contextlib.suppress(ConnectionResetError):
            assert not client.rest().strip(b"\0")
        client.close()
    (line,) = program.ended()
    assert line["reason"] == f"{who}_reset"
    staying.say(b"still there\r\n")
    assert staying.line() == b"still there\r\n"


def test_a_reset_that_a_write_finds_first_is_logged_as_a_reset(backend: StartBackend, edge: StartEdge, connect: Connect) -> None:
    """The kernel reports it once: here to the write, and not again to the read."""
    go, gone = threading.Event(), threading.Event()

    def handler(peer: Peer) -> None:
        opening(peer, connect.tls)
        peer.say(b"hello\r\n")
        go.wait(30)
        peer.reset()
        gone.set()

    program = edge(backend=backend(handler))
    client = connect(program)
    assert client.line() == b"hello\r\n"
    program.process.send_signal(signal.SIGSTOP)
    client.say(b"NOOP\r\n")
    go.set()
    assert gone.wait(30)
    program.process.send_signal(signal.SIGCONT)
    assert client.rest() == b""
    client.close()
    assert program.ended()[0]["reason"] == "backend_reset"
