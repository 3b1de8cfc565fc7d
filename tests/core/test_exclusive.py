"""Connections to servers: what a caller who is cancelled leaves open, and how much waits for a caller who is slow."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fumi_core.client.exclusive import connect_error, open_connection
from fumi_core.plugins.dovecot.channel import Link, Request, Unavailable
from fumi_core.plugins.dovecot.protocol import AuthConversation
from fumi_core.plugins.milter.agreement import Stage
from fumi_core.plugins.milter.connection import HIGH_WATER_BYTES, MilterConnection
from fumi_core.runtime.addresses import parse_address
from tests.core.dovecot_server import AUTH_HANDSHAKE
from tests.core.fuzz.passing import PassingLoop
from tests.core.scripted_milter import CONTINUE, PROGRESS, negotiated, packet

LOGIN = Request("AUTH", ("PLAIN", "service=smtp", "resp=AHgAeQ=="))


class Transport:
    """Keeps what is written, and whether reading is paused."""

    def __init__(self) -> None:
        self.written = b""
        self.paused = self.closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def get_extra_info(self, name: str) -> Any:
        return SimpleNamespace(family=socket.AF_UNIX)

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def abort(self) -> None:
        self.closed = True


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_a_connection_that_is_made_when_its_caller_is_cancelled_is_closed(no_garbage_collector: None) -> None:
    async def run() -> bytes:
        loop = asyncio.get_running_loop()
        connect = loop.sock_connect

        async def connect_and_cancel(sock: socket.socket, address: Any) -> None:
            await connect(sock, address)
            caller.cancel()

        loop.sock_connect = connect_and_cancel  # type: ignore[method-assign]
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.setblocking(False)
            address = parse_address(f"127.0.0.1:{server.getsockname()[1]}")
            caller = asyncio.create_task(open_connection(asyncio.Protocol, address, 60))
            with pytest.raises(asyncio.CancelledError):
                await caller
            accepted, _ = await loop.sock_accept(server)
            with accepted:
                return await asyncio.wait_for(loop.sock_recv(accepted, 1), 60)

    with contextlib.suppress(ConnectionResetError):
        assert asyncio.run(run()) == b""


@pytest.mark.parametrize(
    ("address", "words"),
    [("127.0.0.1:1", "Connection refused"), ("unix:/nonexistent/socket", "No such file or directory")],
)
def test_errors_of_connecting_have_the_systems_text(address: str, words: str) -> None:
    with pytest.raises((ConnectionRefusedError, FileNotFoundError)) as found:
        asyncio.run(open_connection(asyncio.Protocol, parse_address(address), 60))
    assert connect_error(found.value) == words


def test_a_filter_whose_packets_are_queued_is_not_read_any_further() -> None:
    async def run() -> None:
        transport, connection = Transport(), MilterConnection()
        connection.connection_made(cast(asyncio.Transport, transport))
        negotiating = asyncio.create_task(connection.negotiate(60))
        await asyncio.sleep(0)
        connection.data_received(negotiated())
        await negotiating
        written = asyncio.Event()

        async def change(change: object) -> None:
            await written.wait()

        asked = asyncio.create_task(connection.send(Stage.END_OF_MESSAGE, b"", {}, 60, change))
        await asyncio.sleep(0)
        connection.data_received(packet(b"b", b"x"))
        await asyncio.sleep(0)
        sent = 0
        while not transport.paused and sent < HIGH_WATER_BYTES:
            connection.data_received(PROGRESS * 100)
            sent += len(PROGRESS) * 100
        assert sent < HIGH_WATER_BYTES // 10
        connection.data_received(CONTINUE)
        written.set()
        await asked
        assert not transport.paused

    asyncio.run(run())


async def linked() -> tuple[Link, Transport]:
    link, transport = Link(AuthConversation()), Transport()
    link.connection_made(cast(asyncio.Transport, transport))
    link.data_received(AUTH_HANDSHAKE.encode())
    await link.ready
    transport.written = b""
    return link, transport


def test_logins_of_disconnected_clients_do_not_accumulate_for_a_dovecot_that_does_not_read() -> None:
    async def run() -> None:
        link, transport = await linked()
        link.pause_writing()
        logins = [asyncio.create_task(link.request(LOGIN, asyncio.get_running_loop().time() + 60)) for _ in range(3)]
        await asyncio.sleep(0)
        for each in logins[:2]:
            each.cancel()
        await asyncio.wait(logins[:2])
        assert transport.written == b""
        link.resume_writing()
        while not transport.written:
            await asyncio.sleep(0)
        link.data_received(b"OK\t1\tuser=x\n")
        assert (await logins[2]).number == 1
        assert transport.written.count(b"\n") == 1

    asyncio.run(run())


def test_a_dovecot_that_reads_nothing_is_left_when_a_login_has_waited_for_it() -> None:
    async def run() -> None:
        link, transport = await linked()
        await asyncio.sleep(1)
        link.pause_writing()
        with pytest.raises(Unavailable, match="no reply in time"):
            await link.request(LOGIN, asyncio.get_running_loop().time() + 30)
        assert (link.lost, transport.closed, transport.written) == ("no reply in time", True, b"")

    loop = PassingLoop()
    try:
        loop.run_until_complete(run())
    finally:
        loop.close()
