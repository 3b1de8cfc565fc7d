"""A connection whose peer vanishes is ended after half a minute, and one whose peer only reads slowly is not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Iterator
from typing import cast

import pytest

from fumi_core.client.connection import NextHopConnection
from fumi_core.runtime.acceptor import Acceptor
from fumi_core.runtime.dead_peers import check_window, detect_dead_peer
from fumi_core.runtime.scoreboard import count_of_one_process
from tests.core.scripted_hop import StartHop
from tests.support.waiting import until

OPTIONS = {
    socket.TCP_USER_TIMEOUT: 30_000,
    socket.TCP_KEEPIDLE: 10,
    socket.TCP_KEEPINTVL: 2,
    socket.TCP_KEEPCNT: 10,
}


TCP_RTO_MAX_MS = 44
"""Linux has it since 6.15."""


def assert_detects(sock: socket.socket) -> None:
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert {option: sock.getsockopt(socket.IPPROTO_TCP, option) for option in OPTIONS} == OPTIONS
    with contextlib.suppress(OSError):
        assert sock.getsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS) == 3_000


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_accepted_connections_have_the_listeners_options(host: str) -> None:
    async def accepted() -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        found: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
        with socket.create_server((host, 0), family=family) as listener:
            listener.setblocking(False)
            acceptor = Acceptor(
                listener, "", logging.getLogger(), lambda sock, peer, own: found.set_result(sock), count_of_one_process()
            )
            with socket.create_connection(listener.getsockname()[:2]), await found as sock:
                assert_detects(sock)
            acceptor.close()

    asyncio.run(accepted())


def test_a_connection_to_a_next_hop_has_the_options(scripted_hop: StartHop) -> None:
    async def connected() -> None:
        host, port = scripted_hop().sock.getsockname()
        transport, _ = await asyncio.get_running_loop().create_connection(NextHopConnection, host, port)
        assert_detects(transport.get_extra_info("socket"))
        transport.abort()

    asyncio.run(connected())


def test_unix_sockets_and_systems_without_the_options_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for sock in socket.socketpair():
        with sock:
            detect_dead_peer(sock)
            assert not check_window(sock)
    monkeypatch.setattr("fumi_core.runtime.dead_peers._OPTIONS", [])
    monkeypatch.setattr("fumi_core.runtime.dead_peers._USER_TIMEOUT", None)
    monkeypatch.setattr("fumi_core.runtime.dead_peers._TCP_RTO_MAX_MS", 9999)
    with socket.socket() as sock:
        detect_dead_peer(sock)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert not check_window(sock)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A sender, and a reader with a small buffer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        with socket.create_connection(listener.getsockname()) as sender, listener.accept()[0] as reader:
            detect_dead_peer(sender)
            sender.setblocking(False)
            reader.setblocking(False)
            yield sender, reader


def timeout_of(sock: socket.socket) -> int:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


def test_a_closed_window_suspends_the_user_timeout_until_data_flows_again(pair: tuple[socket.socket, socket.socket]) -> None:
    sender, reader = pair
    assert not check_window(sender)
    with contextlib.suppress(BlockingIOError):
        while True:
            sender.send(bytes(65536))
    until(lambda: check_window(sender) and timeout_of(sender) == 0)

    def empty() -> bool:
        with contextlib.suppress(BlockingIOError):
            reader.recv(1 << 20)
        return not check_window(sender)

    until(empty)

    def resumed() -> bool:
        # Now and then the kernel acknowledges a byte so late that it is seen in flight.
        empty()
        sender.send(b"x")
        return check_window(sender) and timeout_of(sender) == 30_000

    until(resumed)


class Kernel:
    """What the kernel says of a connection, and its user timeout."""

    family = socket.AF_INET

    def __init__(self, timeout: int, probes: int, unacked: int, silent_ms: int, notsent: int) -> None:
        self.timeout = timeout
        self._info = struct.pack("3xB20xI28xI84xI", probes, unacked, silent_ms, notsent)

    def getsockopt(self, level: int, option: int, size: int = 0) -> int | bytes:
        return self._info if option == socket.TCP_INFO else self.timeout

    def setsockopt(self, level: int, option: int, value: int) -> None:
        assert option == socket.TCP_USER_TIMEOUT
        self.timeout = value


@pytest.mark.parametrize(
    ("probes", "unacked", "silent_ms", "notsent", "timeout"),
    [
        (0, 0, 0, 1, 0),
        (0, 0, 0, 0, None),
        (1, 0, 30_000, 1, None),
        (2, 0, 30_000, 1, None),
        (3, 0, 29_999, 1, None),
        (3, 0, 30_000, 1, 30_000),
        (0, 1, 0, 0, 30_000),
        (0, 1, 0, 1, 30_000),
    ],
)
@pytest.mark.parametrize("before", [0, 30_000])
def test_the_user_timeout_is_suspended_only_while_the_window_is_closed_and_probes_are_answered(
    probes: int, unacked: int, silent_ms: int, notsent: int, timeout: int | None, before: int
) -> None:
    kernel = Kernel(before, probes, unacked, silent_ms, notsent)
    assert check_window(cast(socket.socket, kernel)) == bool(unacked or notsent)
    assert kernel.timeout == (before if timeout is None else timeout)


def test_a_closed_socket_is_left_to_its_owner(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[0].close()
    assert check_window(pair[0])
