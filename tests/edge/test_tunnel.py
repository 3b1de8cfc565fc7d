"""Bytes through the tunnel: all of them, in order, both ways at once, however slow a side is; and how each end is passed on."""

from __future__ import annotations

import asyncio
import contextlib
import random
import select
import signal
import socket
import ssl
import subprocess
import threading

import pytest

from fumi_edge.connection.tunnel import BUFFER, Tunnel
from fumi_edge.tls.close_notify import CloseNotify

SIZE = 50 * 1024 * 1024


def pour(peer, data, chunks):
    view = memoryview(data)
    at = 0
    for size in chunks:
        if at >= len(data):
            return
        peer.sock.sendall(view[at : at + size])
        at += size


def drain(peer, limit, dawdle):
    """Read up to ``limit`` bytes; now and then too late, so that the other side meets a full socket."""
    received = bytearray()
    rest = threading.Event()
    while len(received) < limit:
        data = peer.sock.recv(262144)
        if not data:
            break
        received += data
        if dawdle and len(received) // (4 << 20) != (len(received) - len(data)) // (4 << 20):
            rest.wait(0.01)
    return bytes(received)


def exchange(peer, data, limit, dawdle):
    """Send and receive at once, in one thread: a TLS socket is not for two."""
    sock, chunks, view = peer.sock, sizes(4), memoryview(data)
    sock.setblocking(False)
    received = bytearray()
    rest = threading.Event()
    at, chunk = 0, next(chunks)
    while at < len(data) or len(received) < limit:
        idle = True
        with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            got = sock.recv(262144)
            assert got, f"the end after {len(received)} bytes"
            received += got
            idle = False
            if dawdle and len(received) // (4 << 20) != (len(received) - len(got)) // (4 << 20):
                rest.wait(0.01)
        with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if at < len(data):
                # A record that did not fit has to be offered again as it was.
                at += sock.send(view[at : at + chunk])
                chunk = next(chunks)
                idle = False
        if idle:
            select.select([sock], [sock] if at < len(data) else [], [], 1)
    return bytes(received)


def sizes(seed):
    numbers = random.Random(seed)
    while True:
        yield numbers.choice((1, 100, 1023, 1024, 16384, 16385, 65536, 131072, 1 << 20))


@pytest.fixture(params=["tls", "plaintext"])
def connect(request, clients):
    """Connects through the tunnel, over TLS or on the STARTTLS port without upgrading."""

    def connect(program, buffer=None):
        if request.param == "tls":
            return clients.tls(program.tls_port, buffer=buffer)
        client = clients.plain(program.starttls_port, buffer=buffer)
        assert client.line() == b"220 ready\r\n"
        client.say(b"BDAT\r\n")
        return client

    connect.tls = request.param == "tls"
    return connect


def opening(peer, tls):
    """What a backend does to get a plaintext client out of the preamble."""
    if not tls:
        peer.say(b"220 ready\r\n")
        assert peer.line() == b"BDAT\r\n"


@pytest.mark.parametrize("slow", ["nobody", "client", "backend"])
def test_every_byte_arrives_in_order_in_both_directions_at_once(backend, edge, connect, kit, slow):
    up, down = random.Random(1).randbytes(SIZE), random.Random(2).randbytes(SIZE)
    received = []

    def handler(peer):
        opening(peer, connect.tls)
        sender = threading.Thread(target=pour, args=(peer, down, sizes(3)))
        sender.start()
        received.append(peer.sock.recv(0) + peer._buffered)
        peer._buffered = b""
        received[0] += drain(peer, SIZE - len(received[0]), slow == "backend")
        sender.join()

    program = edge(backend=backend(handler))
    # A small buffer of the slow side makes the edge meet it at once.
    client = connect(program, buffer=65536 if slow == "client" else None)
    got = exchange(client, up, SIZE, slow == "client")
    kit.until(lambda: received and len(received[0]) == SIZE, "the last byte")
    assert kit.hash(got) == kit.hash(down)
    assert kit.hash(received[0]) == kit.hash(up)


def test_a_backend_that_ends_its_side_still_gets_what_the_client_sends(backend, edge, connect, kit):
    heard = []

    def handler(peer):
        opening(peer, connect.tls)
        peer.say(b"last words\r\n")
        peer.end()
        heard.append(peer.rest())

    program = edge(backend=backend(handler))
    client = connect(program)
    assert client.rest() == b"last words\r\n"
    client.say(b"x" * 300_000)
    client.close()
    assert len(kit.until(lambda: heard, "the client's bytes")[0]) == 300_000


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_what_the_client_sends_at_the_moment_of_its_close_notify_still_reaches_the_backend(certificate, monkeypatch, version):
    """unwrap() writes close_notify and then reads: whatever has arrived by then is the tunnel's, and must stay so."""
    server_context, client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=certificate[0])
    server_context.load_cert_chain(*certificate)
    server_context.maximum_version = version
    at_the_end = ssl.SSLSocket.unwrap

    async def upload(client, ours, theirs, backend):
        def unwrap(sock):
            client.sendall(b"in between ")
            return at_the_end(sock)

        monkeypatch.setattr(ssl.SSLSocket, "unwrap", unwrap)
        loop = asyncio.get_running_loop()
        close_notify = CloseNotify()
        close_notify.open()
        tunnel = Tunnel(loop, memoryview(bytearray(BUFFER)), close_notify, ours, theirs, 900.0)
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
        client = socket.create_connection(listening.getsockname())
        accepted, _ = listening.accept()
        shaking = threading.Thread(target=lambda: ends.append(server_context.wrap_socket(accepted, server_side=True)))
        ends = []
        shaking.start()
        client = stack.enter_context(client_context.wrap_socket(client, server_hostname="localhost", suppress_ragged_eofs=False))
        shaking.join()
        ours = stack.enter_context(ends[0])
        ours.setblocking(False)
        theirs.setblocking(False)
        backend.settimeout(20)
        assert asyncio.run(asyncio.wait_for(upload(client, ours, theirs, backend), 20)) == b"before in between after"


def test_a_client_that_ends_its_side_still_gets_the_replies(backend, edge, connect):
    def handler(peer):
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


def test_a_close_notify_ends_the_clients_side_only(backend, edge, clients):
    go = threading.Event()

    def handler(peer):
        heard = peer.rest()
        go.wait(20)
        peer.say(b"seen: " + heard)

    program = edge(backend=backend(handler))
    client = clients.tls(program.tls_port)
    client.say(b"all I have")
    # unwrap() sends close_notify and looks for the other's at once; a reply that it finds there would be an error, and lost.
    client.sock.setblocking(False)
    with contextlib.suppress(OSError):
        client.sock.unwrap()
    go.set()
    client.sock.settimeout(20)
    assert client.rest() == b"seen: all I have"


def test_the_last_reply_arrives_although_the_backend_closes_with_bytes_unread(backend, edge, connect):
    """Its end is then a reset, and it comes while the client goes on talking."""
    size = 2000

    def handler(peer):
        opening(peer, connect.tls)
        while len(peer._buffered) < 100_000 and peer.more():
            pass
        peer.say(b"z" * size)

    program = edge(backend=backend(handler))
    client = connect(program)

    def talk():
        try:
            for _ in range(400):
                client.sock.sendall(b"x" * 10_000)
        except OSError:
            pass

    talking = threading.Thread(target=talk)
    if not connect.tls:
        talking.start()
    else:
        # Python's TLS sockets are not for two threads at such a moment: talk first, as far as nobody reads.
        client.say(b"x" * 400_000)
    received = 0
    while received < size:
        data = client.sock.recv(65536)
        assert data, f"only {received} bytes"
        received += len(data)
    client.close()
    if not connect.tls:
        talking.join()


def test_a_long_last_reply_arrives_whole_although_the_client_goes_on_talking(backend, edge, connect):
    size = 5_000_000

    def handler(peer):
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


def test_the_end_of_the_stream_is_a_close_notify(backend, edge, clients):
    program = edge(backend=backend(lambda peer: peer.say(b"220 and gone\r\n")))
    client = clients.tls(program.tls_port)
    # The client raises at an end without close_notify.
    assert client.rest() == b"220 and gone\r\n"
    client.close()
    assert program.ended()[0]["reason"] == "backend_closed"


def test_a_client_that_breaks_off_breaks_the_backend_off(backend, edge, connect, kit):
    seen = []

    def handler(peer):
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
    assert kit.until(lambda: seen, "the backend's end") == ["reset"]
    assert program.ended()[0]["reason"] == "client_reset"


def pour_until_full(peer, program):
    """Send until nobody has taken any for a while, nor is about to: every buffer on the way is full then."""
    peer.sock.setblocking(False)
    data = bytes(1 << 16)
    while select.select([], [peer.sock], [], 0.3)[1] or not program.rests():
        with contextlib.suppress(BlockingIOError, ssl.SSLWantWriteError):
            peer.sock.send(data)
    peer.sock.settimeout(30)


@pytest.mark.parametrize("stream", ["up", "down"])
@pytest.mark.parametrize("who", ["client", "backend"])
def test_a_reset_in_mid_transfer_ends_both_sides_and_nobody_else(backend, edge, connect, kit, who, stream):
    full, over = threading.Event(), threading.Event()
    told = []

    def handler(peer):
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
        assert kit.until(lambda: told, "the backend's end") == ["reset"]
    else:
        over.set()
        with contextlib.suppress(ConnectionResetError):
            assert not client.rest().strip(b"\0")
        client.close()
    (line,) = program.ended()
    assert line["reason"] == f"{who}_reset"
    staying.say(b"still there\r\n")
    assert staying.line() == b"still there\r\n"


def test_a_reset_is_one_whoever_moves_first(backend, edge, connect, kit):
    """The kernel tells of it once: here to who writes, and not again to who reads."""
    go, gone = threading.Event(), threading.Event()

    def handler(peer):
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


def test_silence_ends_at_the_idle_timeout(backend, edge, connect):
    def handler(peer):
        opening(peer, connect.tls)
        peer.rest()

    program = edge("--idle-timeout", "1", backend=backend(handler))
    client = connect(program)
    assert program.ended()[0]["reason"] == "idle_timeout"
    assert client.rest() == b""


def test_memory_stays_small_behind_a_backend_that_stalls(backend, edge, connect, kit):
    """The client pushes as much as it can into a tunnel whose other end does not read, then the backend takes it all."""
    total = 100 * 1024 * 1024
    go = threading.Event()
    heard = []

    def handler(peer):
        opening(peer, connect.tls)
        go.wait(30)
        count = len(peer._buffered)
        while count < total:
            data = peer.sock.recv(1 << 20)
            if not data:
                break
            count += len(data)
        heard.append(count)

    program = edge(backend=backend(handler))
    client = connect(program)
    kit.until(lambda: program.metric("fumi_edge_connections_active") >= 0)
    before = program.memory()
    sent = []

    def push():
        chunk = bytes(1 << 20)
        for _ in range(100):
            client.sock.sendall(chunk)
            sent.append(len(chunk))

    pushing = threading.Thread(target=push)
    pushing.start()
    kit.until(lambda: sent, "the first megabyte")
    previous = -1
    pause = threading.Event()
    while previous != len(sent):
        previous = len(sent)
        pause.wait(0.3)
    stalled = program.memory()
    go.set()
    pushing.join()
    kit.until(lambda: heard, "the rest")
    assert heard[0] == total
    assert stalled - before < 5 << 20
    assert program.memory() - before < 5 << 20


def test_a_unix_socket_serves_as_backend(backend, edge, clients, tmp_path):
    program = edge(backend=backend(path=str(tmp_path / "backend.sock")))
    client = clients.tls(program.tls_port)
    assert client.line() == b"220 backend.test ESMTP\r\n"
    assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
    assert client.rest() == b""


def test_a_key_update_in_mid_stream_loses_nothing(backend, edge, clients, certificate, kit):
    """openssl's client rekeys at a line 'K'; the tunnel reads and answers the key update between two records."""

    program = edge(backend=backend())
    client = subprocess.Popen(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{program.tls_port}", "-CAfile", certificate[0], "-brief"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        for command in (b"", b"NOOP", b"K", b"NOOP", b"k", b"NOOP"):
            answer = {b"": b"220 ", b"NOOP": b"250 "}.get(command, b"KEYUPDATE")
            client.stdin.write(command and command + b"\n")
            client.stdin.flush()
            while not (line := client.stdout.readline()).startswith(answer):
                assert line
    finally:
        client.kill()
        client.communicate()


def test_two_hundred_connections_at_once_do_not_mix_their_bytes(backend, edge, clients):
    def handler(peer):
        while line := peer.line():
            peer.say(line)

    program = edge(backend=backend(handler))
    peers = [clients.tls(program.tls_port) for _ in range(200)]
    for turn in range(3):
        for number, peer in enumerate(peers):
            peer.say(b"%d-%d " % (turn, number) + b"x" * number + b"\r\n")
        for number, peer in enumerate(peers):
            assert peer.line() == b"%d-%d " % (turn, number) + b"x" * number + b"\r\n"


def test_sockets_of_ended_connections_are_closed(backend, edge, clients, kit):
    program = edge(backend=backend())
    before = program.descriptors()
    for port, connect in ((program.tls_port, clients.tls), (program.starttls_port, clients.plain)):
        for _ in range(20):
            client = connect(port)
            client.line()
            client.ask(b"QUIT\r\n")
            assert client.rest() == b""
            client.close()
    program.ended(40)
    kit.until(lambda: program.descriptors() <= before, "the end of the last socket")
