"""TLS 1.3 key updates (RFC 8446 section 4.6.3) in mid-stream, on sockets with room and without."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import termios
import threading
from hashlib import sha256
from pathlib import Path

import pytest

from tests.edge.backends import StartBackend
from tests.edge.buffers import settled, waiting
from tests.edge.clients import Clients, Dial
from tests.edge.memory_tls import Engine
from tests.edge.program import StartEdge
from tests.support.certificates import CertificateFiles
from tests.support.peer import Peer
from tests.support.waiting import until


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="reaches into CPython's ssl objects")
def test_key_updates_that_meet_a_full_socket_lose_no_byte(
    backend: StartBackend, edge: StartEdge, clients: Clients, dial: Dial, tmp_path: Path
) -> None:
    """The answer to a key update has to wait for a client that does not read, while the backend does not read either."""
    with socket.socket(socket.AF_UNIX) as sock:
        room = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    # What the edge reads at once between two key updates is more than its backend's socket still takes.
    numbers = random.Random(1)
    begin, between, behind, end = (numbers.randbytes(size) for size in (room * 2 // 3, 112 * 1024, 30_000, 40_000))
    whole = sha256(begin + between + behind + end).digest()
    go = threading.Event()
    said, received = [], {}

    def handler(peer: Peer) -> None:
        size = int(peer.line())
        peer.say(b"x" * size)
        said.append(peer)
        go.wait(20)
        received[size] = peer.rest()

    listener = tmp_path / "edge.sock"
    program = edge("--listen", f"unix:{listener}", backend=backend(handler, path=str(tmp_path / "backend.sock")))
    engines = {}
    # How much makes a socket just full depends on the kernel; some of these do.
    for size in range(room - 30_000, room + 4_000, 2_000):
        engine = engines[size] = Engine(dial(listener).sock, clients.context())
        engine.write(b"%d\n" % size)
        engine.write(begin)
        engine.flush()

    def unread(which: int = termios.FIONREAD) -> dict[int, int]:
        return {size: waiting(engine.sock, which) for size, engine in engines.items()}

    # Where the edge itself holds more to write, OpenSSL (here 3.0) gives up the connection at a second key update.
    until(lambda: len(said) == len(engines), "the words of every backend")
    for size, received_by_kernel in settled(unread, program).items():
        if received_by_kernel < size:
            engines.pop(size).sock.close()
    program.process.send_signal(signal.SIGSTOP)
    for engine in engines.values():
        engine.update_key()
        engine.write(between)
        engine.update_key()
        engine.write(behind)
        engine.flush()
    program.process.send_signal(signal.SIGCONT)
    left = settled(lambda: unread(termios.TIOCOUTQ), program)
    assert any(left.values()), "no socket was full: this test shows nothing"
    for size, engine in engines.items():
        assert engine.read(size) == b"x" * size
    settled(lambda: unread(termios.TIOCOUTQ), program)
    go.set()
    for engine in engines.values():
        engine.write(end)
        engine.flush()
        engine.sock.shutdown(socket.SHUT_WR)
    until(lambda: engines.keys() <= received.keys(), "the end of every upload")
    assert [size for size in engines if sha256(received[size]).digest() != whole] == []


def test_a_key_update_in_mid_stream_loses_nothing(
    backend: StartBackend, edge: StartEdge, clients: Clients, certificate: CertificateFiles
) -> None:
    """openssl's client rekeys at a line 'K'; the tunnel reads and answers the key update between two records."""

    program = edge(backend=backend())
    client = subprocess.Popen(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{program.tls_port}", "-CAfile", certificate[0], "-brief"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        for command in (b"", b"NOOP", b"K", b"NOOP", b"k", b"NOOP"):
            answer = {b"": b"220 ", b"NOOP": b"250 "}.get(command, b"KEYUPDATE")
            assert client.stdin
            assert client.stdout
            client.stdin.write(command and command + b"\n")
            client.stdin.flush()
            while not (line := client.stdout.readline()).startswith(answer):
                assert line
    finally:
        client.kill()
        client.communicate()
