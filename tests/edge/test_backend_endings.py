"""How connections to backends end: after QUIT, without waiting for the backend and without using up ports."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from pathlib import Path

import pytest

import fumi_edge.backends.dialing
import fumi_edge.backends.health
import fumi_edge.backends.retiring
from fumi_edge.backends.retiring import Retiring
from fumi_edge.sockets.readiness import receive
from tests.edge.backends import MakePool, StartBackend
from tests.edge.clients import Clients
from tests.edge.program import StartEdge


def test_farewells_to_backends_that_do_not_answer_are_bounded(
    pool: MakePool, monkeypatch: pytest.MonkeyPatch, listening: int
) -> None:
    monkeypatch.setattr(fumi_edge.backends.retiring, "MAX_RETIRING", 5)

    async def scenario() -> None:
        backends, retiring = pool(f"127.0.0.1:{listening}"), Retiring()
        for _ in range(20):
            retiring.retire((await backends.connect(b""))[0])
        assert len(retiring) == 5
        for task in list(retiring._tasks):
            task.cancel()
        await retiring.close()

    asyncio.run(scenario())


def time_waits(port: int) -> int:
    """Sockets of ours, towards this port, that only wait for stragglers."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2].endswith(f":{port:04X}") and row[3] == "06" for row in rows)


def test_hundreds_of_short_connections_use_up_no_ports(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    """With QUIT, with an upgrade, and without a command; it is the backend that closes first and keeps the TIME_WAIT."""
    server = backend()
    program = edge("--log-level", "debug", backend=server)
    each, threads = 50, 10
    failures = []

    def visit(number: int) -> None:
        try:
            if number % 2:
                client = clients.plain(program.starttls_port)
                client.reply()
                if number % 4 == 1:
                    client.close()
                    return
                client = clients.starttls(client)
            else:
                client = clients.tls(program.tls_port)
                client.reply()
            assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
            client.rest()
            client.close()
        except Exception as error:
            failures.append(error)

    def visits(first: int) -> None:
        for number in range(each):
            visit(first + number)

    workers = [threading.Thread(target=visits, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []
    program.ended(each * threads)
    port = int(server.address.rpartition(":")[2])
    assert len(server.peers) > each * threads
    assert time_waits(port) < each * threads // 100


def test_a_backend_that_goes_on_sending_after_quit_is_reset_and_delays_no_other_client(pool: MakePool) -> None:
    """Something to read is always there, so the event loop would never get a turn, nor a timeout its time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, stop = server.getsockname()[1], threading.Event()

        def flood() -> None:
            with contextlib.suppress(OSError), server.accept()[0] as peer:
                while not stop.is_set():
                    peer.send(b"x" * 65536)

        async def scenario() -> bytes:
            sock, _ = await pool(f"127.0.0.1:{port}").connect(b"")
            await receive(asyncio.get_running_loop(), sock, 1)
            return await fumi_edge.backends.dialing.quit_and_close(sock, 3600.0)

        sender = threading.Thread(target=flood)
        sender.start()
        try:
            said = asyncio.run(asyncio.wait_for(scenario(), 20))
        finally:
            stop.set()
            sender.join(20)
        assert set(said) == set(b"x")
        assert not sender.is_alive()


def test_a_backend_that_does_not_close_after_quit_is_reset(pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The port would be ours for a minute otherwise."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        others = time_waits(port)  # towards an earlier server with this port

        async def scenario() -> None:
            sock, _ = await pool(f"127.0.0.1:{port}").connect(b"")
            assert await fumi_edge.backends.dialing.quit_and_close(sock, 0.01) == b""

        asyncio.run(scenario())
        with server.accept()[0] as peer:
            assert peer.recv(100) == b"QUIT\r\n"
            with pytest.raises(ConnectionResetError):
                peer.recv(100)
    assert time_waits(port) <= others
