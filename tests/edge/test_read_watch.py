"""A read of TLS that does not end is ended, so that the event loop goes on."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from fumi_edge.tls import read_watch
from fumi_edge.tls.credentials import ClientSettings, Credentials
from fumi_edge.tls.policy import Policy
from fumi_edge.tls.read_watch import CURRENT_READ, ReadWatch
from fumi_edge.tls.records import ENDED, MORE, RECORD_SIZE, After, read_records
from tests.edge.held_watch import CALLS, HeldWatch
from tests.support.waiting import PATIENCE, until


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[ReadWatch]:
    monkeypatch.setattr(read_watch, "CHECK_SECONDS", 0.01)
    monkeypatch.setattr(read_watch, "MAX_READ_SECONDS", 0.1)
    watch = ReadWatch()
    watch.start()
    yield watch
    watch.close()


@pytest.fixture
def credentials() -> Credentials:
    return Credentials(ClientSettings())


class Endless(socket.socket):
    """Its read works until nothing more can arrive, as OpenSSL's does as long as records without content arrive."""

    def read(self, size: int, buffer: memoryview) -> int:
        self.setblocking(False)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):
                return self.recv_into(buffer)
        raise AssertionError("the read was not ended")


class Slow(Endless):
    """Its read goes on for a while after what ends it, as one does whose thread gets no CPU."""

    def read(self, size: int, buffer: memoryview) -> int:
        count = super().read(size, buffer)
        begun = time.thread_time()
        while time.thread_time() - begun < 2 * read_watch.MAX_READ_SECONDS:
            pass
        return count


class EndlessBackend(Endless):
    """One of which the edge is the client."""

    server_side = False


def read(sock: Endless) -> tuple[int, After | OSError]:
    return read_records(cast(ssl.SSLSocket, sock), memoryview(bytearray(RECORD_SIZE)), streaming=False)


def test_a_read_that_does_not_return_is_ended(watch: ReadWatch, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        accepted, _ = listener.accept()
        with Endless(fileno=accepted.detach()) as sock:
            assert read(sock) == (0, ENDED)
        assert client.recv(1) == b""
    assert until(lambda: caplog.messages) == ["TLS read does not end, disconnected client_ip=127.0.0.1"]
    assert CURRENT_READ.now is None


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, before[1]))
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_it_is_ended_when_no_descriptor_is_left(watch: ReadWatch) -> None:
    ours, theirs = socket.socketpair()
    with Endless(fileno=ours.detach()) as sock, theirs, no_descriptor_left():
        assert read(sock) == (0, ENDED)


def test_two_edges_in_one_thread_report_it_once(watch: ReadWatch, caplog: pytest.LogCaptureFixture) -> None:
    other = ReadWatch()
    other.start()
    try:
        ours, theirs = socket.socketpair()
        with Slow(fileno=ours.detach()) as sock, theirs:
            assert read(sock) == (0, ENDED)
    finally:
        other.close()
    assert caplog.messages == ["TLS read does not end, disconnected client_ip=unix"]


def test_of_a_backend_the_line_has_its_address(watch: ReadWatch, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as backend:
        accepted, _ = listener.accept()
        with EndlessBackend(fileno=accepted.detach()) as sock:
            assert read(sock) == (0, ENDED)
        assert backend.recv(1) == b""
    assert until(lambda: caplog.messages) == ["TLS read does not end, disconnected backend_ip=127.0.0.1"]


def test_many_reads_of_one_connection_are_not_one_that_lasts(watch: ReadWatch, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = socket.socketpair()
    with Endless(fileno=ours.detach()) as sock, theirs:
        begun = time.thread_time()
        while time.thread_time() - begun < 5 * read_watch.MAX_READ_SECONDS:
            theirs.send(b"x")
            assert read(sock) == (1, MORE)
    assert caplog.messages == []


class Records:
    """In place of OpenSSL: each call reads until nothing more can arrive."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock

    def read(self, *_: object) -> bytes:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):
                return socket.socket.recv(self._sock, 1)
        raise AssertionError("the read was not ended")

    do_handshake = shutdown = read


READS: dict[str, Callable[[ssl.SSLSocket], object]] = {
    "recv": lambda sock: sock.recv(1),
    "unwrap": lambda sock: sock.unwrap(),
    "do_handshake": lambda sock: sock.do_handshake(),
}


@pytest.mark.parametrize(
    ("side", "call"),
    [("client", "recv"), ("client", "unwrap"), ("backend", "recv"), ("backend", "unwrap"), ("backend", "do_handshake")],
)
def test_so_is_every_other_call_that_reads(
    watch: ReadWatch, credentials: Credentials, caplog: pytest.LogCaptureFixture, side: str, call: str
) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    context = Policy().context() if side == "client" else credentials.context
    name = None if side == "client" else "localhost"
    with theirs, context.wrap_socket(ours, side == "client", False, server_hostname=name) as sock:
        sock._sslobj = Records(sock)  # type: ignore[attr-defined]
        READS[call](sock)
    assert until(lambda: caplog.messages) == [f"TLS read does not end, disconnected {side}_ip=unix"]
    assert CURRENT_READ.now is None


def test_reads_of_another_thread_do_not_hide_one_that_lasts(watch: ReadWatch, credentials: Credentials) -> None:
    """A check of the backends, for /readyz, is made in a thread."""
    ended = threading.Event()

    def check() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs, credentials.context.wrap_socket(ours, do_handshake_on_connect=False, server_hostname="localhost") as sock:
            while not ended.is_set():
                with contextlib.suppress(ssl.SSLWantReadError):
                    sock.do_handshake()

    checking = threading.Thread(target=check)
    checking.start()
    ours, theirs = socket.socketpair()
    try:
        with Endless(fileno=ours.detach()) as sock, theirs:
            assert read(sock) == (0, ENDED)
    finally:
        ended.set()
        checking.join()


@pytest.mark.parametrize("call", CALLS)
def test_the_next_connection_with_its_descriptor_is_not_disconnected(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str
) -> None:
    watch = HeldWatch(monkeypatch, call)
    ours, theirs = socket.socketpair()
    accepted, client = socket.socketpair()
    with ours, theirs, accepted, client:
        watch.read(ours)
        os.dup2(accepted.fileno(), ours.fileno())
        accepted.close()
        watch.finish()
        ours.send(b"220")
        assert client.recv(3) == b"220"
    if call != "shutdown":
        # It had returned before it was to be ended.
        assert caplog.messages == []
