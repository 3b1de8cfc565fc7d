"""Bytes through the tunnel: all of them, in order, both ways at once, however slow a side is."""

from __future__ import annotations

import contextlib
import random
import select
import ssl
import threading
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from tests.edge.backends import StartBackend, opening
from tests.edge.clients import Clients, Connect
from tests.edge.program import StartEdge
from tests.support.peer import Peer
from tests.support.waiting import until

SIZE = 50 * 1024 * 1024


def pour(peer: Peer, data: bytes, chunks: Iterable[int]) -> None:
    view = memoryview(data)
    at = 0
    for size in chunks:
        if at >= len(data):
            return
        peer.sock.sendall(view[at : at + size])
        at += size


def drain(peer: Peer, limit: int, dawdle: bool) -> bytes:
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


def exchange(peer: Peer, data: bytes, limit: int, dawdle: bool) -> bytes:
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


def sizes(seed: int) -> Iterator[int]:
    numbers = random.Random(seed)
    while True:
        yield numbers.choice((1, 100, 1023, 1024, 5000, 16383, 16384, 16385, 65536, 131072, 1 << 20))


@pytest.mark.parametrize("slow", ["nobody", "client", "backend"])
def test_every_byte_arrives_in_order_in_both_directions_at_once(
    backend: StartBackend, edge: StartEdge, connect: Connect, slow: str
) -> None:
    up, down = random.Random(1).randbytes(SIZE), random.Random(2).randbytes(SIZE)
    received = []

    def handler(peer: Peer) -> None:
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
    until(lambda: received and len(received[0]) == SIZE, "the last byte")
    assert sha256(got).digest() == sha256(down).digest()
    assert sha256(received[0]).digest() == sha256(up).digest()


def test_silence_ends_at_the_idle_timeout(backend: StartBackend, edge: StartEdge, connect: Connect) -> None:
    def handler(peer: Peer) -> None:
        opening(peer, connect.tls)
        peer.rest()

    program = edge("--idle-timeout", "1", backend=backend(handler))
    client = connect(program)
    assert program.ended()[0]["reason"] == "idle_timeout"
    assert client.rest() == b""


def test_memory_stays_small_behind_a_backend_that_stalls(backend: StartBackend, edge: StartEdge, connect: Connect) -> None:
    """The client pushes as much as it can into a tunnel whose other end does not read, then the backend takes it all."""
    total = 100 * 1024 * 1024
    go = threading.Event()
    heard = []

    def handler(peer: Peer) -> None:
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
    until(lambda: program.metric("fumi_edge_connections_active") >= 0)
    before = program.memory()
    sent = []

    def push() -> None:
        chunk = bytes(1 << 20)
        for _ in range(100):
            client.sock.sendall(chunk)
            sent.append(len(chunk))

    pushing = threading.Thread(target=push)
    pushing.start()
    until(lambda: sent, "the first megabyte")
    previous = -1
    pause = threading.Event()
    while previous != len(sent):
        previous = len(sent)
        pause.wait(0.3)
    stalled = program.memory()
    go.set()
    pushing.join()
    until(lambda: heard, "the rest")
    assert heard[0] == total
    assert stalled - before < 5 << 20
    assert program.memory() - before < 5 << 20


def test_a_unix_socket_serves_as_backend(backend: StartBackend, edge: StartEdge, clients: Clients, tmp_path: Path) -> None:
    program = edge(backend=backend(path=str(tmp_path / "backend.sock")))
    client = clients.tls(program.tls_port)
    assert client.line() == b"220 backend.test ESMTP\r\n"
    assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
    assert client.rest() == b""


def test_two_hundred_connections_at_once_do_not_mix_their_bytes(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    def handler(peer: Peer) -> None:
        while line := peer.line():
            peer.say(line)

    program = edge(backend=backend(handler))
    peers = [clients.tls(program.tls_port) for _ in range(200)]
    for turn in range(3):
        for number, peer in enumerate(peers):
            peer.say(b"%d-%d " % (turn, number) + b"x" * number + b"\r\n")
        for number, peer in enumerate(peers):
            assert peer.line() == b"%d-%d " % (turn, number) + b"x" * number + b"\r\n"


def test_sockets_of_ended_connections_are_closed(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
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
    until(lambda: program.descriptors() <= before, "the end of the last socket")
