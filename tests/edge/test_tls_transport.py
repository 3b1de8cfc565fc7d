"""The TLS transport of the direct path: all bytes, in order, both ways at once, however slow a side is; and each way to end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fumi_edge.tls.close_notify import CloseNotify
from fumi_edge.tls.policy import Policy, TLSSocket
from fumi_edge.tls.transport import LINGER_SECONDS, TLSTransport, TransportEnd
from tests.edge.memory_tls import update_key

SIZE = 20 * 1024 * 1024


class Core:
    """The owner of a transport, as the core's connection is one. The calls it gets, in order, are in ``events``."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.content = bytearray()
        self.buffer = memoryview(bytearray(64 * 1024))
        self.transport: TLSTransport

    def received(self, data: bytes) -> None:
        assert "lost" not in self.events
        self.content += data

    def ended(self) -> None:
        self.events.append("ended")
        self.transport.close()

    def drained(self) -> None:
        self.events.append("drained")

    def lost(self) -> None:
        self.events.append("lost")


class Echo(Core):
    """Sends back what it receives, and reads no more while that waits to be sent."""

    def received(self, data: bytes) -> None:
        super().received(data)
        self.transport.write(data)
        if self.transport.blocked:
            self.transport.pause_reading()

    def drained(self) -> None:
        super().drained()
        self.transport.resume_reading()


class Commands(Core):
    """Calls a function for each line."""

    def __init__(self, act: Callable[[Core, bytes], None]) -> None:
        super().__init__()
        self._act = act

    def received(self, data: bytes) -> None:
        super().received(data)
        if self.content.endswith(b"\n"):
            self._act(self, bytes(self.content))


Ends = Callable[..., tuple[TLSSocket, ssl.SSLSocket]]


@pytest.fixture
def ends(certificate: tuple[Path, Path]) -> Iterator[Ends]:
    """Two ends of one TLS connection after its handshake: the server's, non-blocking, and the client's, blocking."""
    opened: list[socket.socket] = []

    def connect(buffer: int | None = None, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> tuple[TLSSocket, ssl.SSLSocket]:
        context = Policy().context()
        context.load_cert_chain(*certificate)
        trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
        trusting.maximum_version = version
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = socket.socket()
            if buffer is not None:
                near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            near.connect(listener.getsockname())
            far, _ = listener.accept()
        shaking = threading.Thread(target=lambda: opened.append(context.wrap_socket(far, server_side=True)))
        shaking.start()
        client = trusting.wrap_socket(near, suppress_ragged_eofs=False)
        client.settimeout(20)
        shaking.join()
        server = opened[-1]
        assert isinstance(server, TLSSocket)
        server.setblocking(False)
        opened.append(client)
        return server, client

    yield connect
    for sock in opened:
        sock.close()


def carry(core: Core, server: TLSSocket, talk: Callable[[], None], look: Callable[[TLSTransport], None] = lambda _: None) -> str:
    """Run a transport for the core while a client talks, in a thread; returns why the transport finished."""
    failed: list[BaseException] = []

    def client() -> None:
        try:
            talk()
        except BaseException as error:
            failed.append(error)

    async def serve() -> str:
        loop = asyncio.get_running_loop()
        close_notify = CloseNotify()
        close_notify.open()
        finished: asyncio.Future[TransportEnd] = loop.create_future()
        core.transport = TLSTransport(loop, server, core.buffer, core, close_notify, finished.set_result)
        look(core.transport)
        talking = threading.Thread(target=client)
        talking.start()
        try:
            async with asyncio.timeout(30):
                return await finished
        finally:
            await asyncio.sleep(0)  # the core is called in a turn of its own
            server.close()
            await loop.run_in_executor(None, talking.join)
            close_notify.close()

    reason = asyncio.run(serve())
    if failed:
        raise failed[0]
    return reason


def read_all(client: ssl.SSLSocket) -> bytes:
    """Everything up to the end. Raises ssl.SSLEOFError without close_notify."""
    received = bytearray()
    while data := client.recv(65536):
        received += data
    return bytes(received)


def end_of_client(client: ssl.SSLSocket) -> None:
    """Half-close: TLS's end is not needed, as there is none from many mail clients."""
    socket.socket.shutdown(client, socket.SHUT_WR)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_every_byte_comes_back_in_order_however_slowly_the_client_reads(ends: Ends, version: ssl.TLSVersion) -> None:
    server, client = ends(buffer=16384, version=version)
    content = random.Random(7).randbytes(SIZE)
    digest = hashlib.sha256()

    def talk() -> None:
        size, sent, got = random.Random(8), 0, 0
        client.setblocking(False)
        while got < SIZE:
            with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                if sent < SIZE:
                    sent += client.send(content[sent : sent + 1_000_000])
            with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                data = client.recv(size.choice((1, 100, 16384, 262144)))
                digest.update(data)
                got += len(data)
        client.setblocking(True)
        end_of_client(client)
        assert client.recv(1) == b""

    core = Echo()
    assert carry(core, server, talk) == "client_closed"
    assert digest.digest() == hashlib.sha256(content).digest()
    assert core.content == content
    assert core.transport.received == core.transport.sent == SIZE
    assert "drained" in core.events
    assert core.events[-2:] == ["ended", "lost"]


def test_a_small_message_costs_one_read(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    read = TLSSocket.read

    def counted(sock: TLSSocket, size: int, buffer: memoryview) -> int:
        nonlocal reads
        reads += 1
        return read(sock, size, buffer)  # type: ignore[return-value]  # the number of bytes, with a buffer

    monkeypatch.setattr(TLSSocket, "read", counted)
    server, client = ends()

    def talk() -> None:
        for data in (b"DATA\r\n", b"y" * 5000 + b"\n", b"MAIL\r\n"):
            client.sendall(data)
            assert client.recv(len(data)) == data
        end_of_client(client)
        assert client.recv(1) == b""

    assert carry(Echo(), server, talk) == "client_closed"
    assert reads == 3 + 1  # and the end


def test_a_client_that_half_closes_gets_its_replies_and_then_close_notify(ends: Ends) -> None:
    server, client = ends()
    replies: list[bytes] = []

    def talk() -> None:
        client.sendall(b"a command\r\n")
        end_of_client(client)
        replies.append(read_all(client))

    core = Echo()
    assert carry(core, server, talk) == "client_closed"
    assert replies == [b"a command\r\n"]
    assert core.events == ["ended", "lost"]


def test_the_last_reply_arrives_although_the_client_goes_on_sending(ends: Ends) -> None:
    server, client = ends()
    got: list[bytes] = []

    def talk() -> None:
        client.sendall(b"QUIT\r\n")
        with contextlib.suppress(ssl.SSLEOFError, BrokenPipeError):
            for _ in range(40):
                client.sendall(b"x" * 65536)
        got.append(read_all(client))
        client.close()

    def act(core: Core, line: bytes) -> None:
        core.transport.write(b"221 2.0.0 Bye\r\n")
        core.transport.close()

    core = Commands(act)
    assert carry(core, server, talk) == "backend_closed"
    assert got == [b"221 2.0.0 Bye\r\n"]
    assert core.events == ["lost"]
    assert core.transport.sent == 15


def test_queued_output_is_sent_before_the_end_and_lost_is_called_once(ends: Ends) -> None:
    server, client = ends(buffer=8192)
    got: list[int] = []

    def talk() -> None:
        client.sendall(b"go\r\n")
        got.append(len(read_all(client)))
        client.close()

    def act(core: Core, line: bytes) -> None:
        core.transport.write(b"y" * SIZE)
        assert core.transport.blocked
        core.transport.write(b"z" * 1000)
        core.transport.close()

    core = Commands(act)
    assert carry(core, server, talk) == "backend_closed"
    assert got == [SIZE + 1000]
    assert core.events[-1] == "lost"
    assert core.events.count("lost") == 1


def test_the_core_reads_on_after_its_half_close_until_the_client_ends(ends: Ends) -> None:
    server, client = ends()
    got: list[bytes] = []

    def talk() -> None:
        client.sendall(b"first\r\n")
        got.append(read_all(client))
        client.sendall(b"second\r\n")
        end_of_client(client)

    def act(core: Core, line: bytes) -> None:
        if line == b"first\r\n":
            core.transport.write(b"421 4.4.2 closing\r\n")
            core.transport.write_eof()

    core = Commands(act)
    assert carry(core, server, talk) == "client_closed"
    assert got == [b"421 4.4.2 closing\r\n"]
    assert core.content == b"first\r\nsecond\r\n"
    assert core.events == ["ended", "lost"]


def test_after_an_abort_the_client_sees_that_the_connection_is_incomplete(ends: Ends) -> None:
    server, client = ends()

    def talk() -> None:
        client.sendall(b"go\r\n")
        with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
            read_all(client)

    core = Commands(lambda core, _: core.transport.abort())
    assert carry(core, server, talk) == "backend_closed"
    assert core.events == ["lost"]


def test_a_reset_by_the_client_ends_the_connection(ends: Ends) -> None:
    server, client = ends()

    def talk() -> None:
        client.sendall(b"go\r\n")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()

    core = Core()
    # Python's ssl reports a reset as the end, unless it meets it in the middle of a record.
    assert carry(core, server, talk) in ("client_closed", "client_reset")
    assert core.events in (["ended", "lost"], ["lost"])


def test_bytes_that_are_not_tls_lose_the_connection(ends: Ends) -> None:
    server, client = ends()
    core = Core()
    assert carry(core, server, lambda: socket.socket.sendall(client, b"NOOP\r\n" * 100)) == "client_reset"
    assert core.events == ["lost"]


def test_a_client_that_does_not_close_its_side_is_given_up(ends: Ends) -> None:
    server, client = ends()
    got: list[bytes] = []
    transports: list[TLSTransport] = []

    def talk() -> None:
        client.sendall(b"QUIT\r\n")
        got.append(read_all(client))

    class Leaving(Core):
        def received(self, data: bytes) -> None:
            super().received(data)
            self.transport.close()

        def lost(self) -> None:
            super().lost()
            loop = asyncio.get_running_loop()
            self.transport.tick(loop.time() + LINGER_SECONDS - 1)
            loop.call_soon(self.transport.tick, loop.time() + LINGER_SECONDS + 1)

    assert carry(Leaving(), server, talk, transports.append) == "linger"
    assert got == [b""]


@pytest.mark.skipif(sys.implementation.name != "cpython", reason="reaches into CPython's ssl objects")
def test_key_updates_lose_no_byte_with_room_in_the_socket_and_without(ends: Ends) -> None:
    server, client = ends(buffer=8192)
    full, taken = threading.Event(), threading.Event()
    got: list[int] = []

    def talk() -> None:
        update_key(client)
        client.sendall(b"a" * 100_000)
        update_key(client)
        client.sendall(b"go\r\n")
        assert full.wait(20)
        # The server holds output that the client does not take, and owes it the answer to this one.
        update_key(client)
        client.sendall(b"b" * 100_000)
        assert taken.wait(20)
        end_of_client(client)
        got.append(len(read_all(client)))

    class Answering(Core):
        def received(self, data: bytes) -> None:
            super().received(data)
            if self.content.endswith(b"go\r\n"):
                self.transport.write(b"y" * SIZE)
                assert self.transport.blocked
                full.set()
            elif len(self.content) == 200_004:
                assert self.transport.blocked
                taken.set()

    core = Answering()
    assert carry(core, server, talk) == "client_closed"
    assert core.content == b"a" * 100_000 + b"go\r\n" + b"b" * 100_000
    assert got == [SIZE]


def test_reading_pauses_and_resumes(ends: Ends) -> None:
    server, client = ends()

    class Pausing(Core):
        def received(self, data: bytes) -> None:
            super().received(data)
            self.transport.pause_reading()
            asyncio.get_running_loop().call_soon(self.resume, len(self.content))

        def resume(self, before: int) -> None:
            assert len(self.content) == before
            self.transport.resume_reading()

    def talk() -> None:
        client.sendall(b"w" * 1_000_000)
        end_of_client(client)

    core = Pausing()
    assert carry(core, server, talk) == "client_closed"
    assert len(core.content) == 1_000_000
