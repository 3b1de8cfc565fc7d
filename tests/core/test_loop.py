"""The event loop: readers and writers as asyncio has them, and all else of asyncio's that goes through the selector."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fumi_core.runtime.loop import Loop
from tests.support.ports import free_port


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def turn(loop: Loop) -> None:
    """One round of the loop, with whatever is ready now."""
    loop.call_soon(loop.stop)
    loop.run_forever()


def test_a_reader_is_called_while_there_is_something_to_read(loop: Loop, pair: tuple[socket.socket, ...]) -> None:
    ours, theirs = pair
    heard: list[str] = []
    loop.add_reader(ours, heard.append, "here")
    turn(loop)
    assert heard == []
    theirs.send(b"x")
    turn(loop)
    turn(loop)
    assert heard == ["here", "here"]
    ours.recv(1)
    turn(loop)
    assert heard == ["here", "here"]
    theirs.close()
    turn(loop)
    assert len(heard) == 3
    assert loop.remove_reader(ours) is True
    assert loop.remove_reader(ours) is False
    turn(loop)
    assert len(heard) == 3


def test_a_writer_is_called_while_there_is_room(loop: Loop, pair: tuple[socket.socket, ...]) -> None:
    ours, theirs = pair
    called: list[str] = []
    loop.add_writer(ours.fileno(), called.append, "room")
    turn(loop)
    assert called == ["room"]
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(bytes(65536))
    turn(loop)
    assert called == ["room"]
    theirs.close()
    turn(loop)
    # Nobody is left to read: whoever writes is to find out.
    assert len(called) == 2
    assert loop.remove_writer(ours.fileno()) is True
    assert loop.remove_writer(ours.fileno()) is False


def test_reader_and_writer_of_one_socket_are_apart(loop: Loop, pair: tuple[socket.socket, ...]) -> None:
    ours, theirs = pair
    called: list[str] = []
    loop.add_reader(ours, called.append, "read")
    loop.add_writer(ours, called.append, "write")
    turn(loop)
    assert called == ["write"]
    theirs.send(b"x")
    turn(loop)
    assert called == ["write", "read", "write"]
    loop.remove_writer(ours)
    loop.add_reader(ours, called.append, "another")
    turn(loop)
    assert called[3:] == ["another"]


def test_who_was_removed_in_the_same_round_is_not_called(loop: Loop) -> None:
    """Nor is the next owner of its number, for what was there for it."""
    pairs = [socket.socketpair() for _ in range(2)]
    called: list[str] = []
    fresh: list[socket.socket] = []

    def first(index: int) -> None:
        called.append(f"first {index}")
        for ours, _ in pairs:
            loop.remove_reader(ours)
        other, _ = pairs[1 - index]
        number = other.fileno()
        other.close()
        while not fresh or fresh[-1].fileno() != number:
            fresh.extend(socket.socketpair())
        loop.add_reader(number, called.append, "the next owner")

    for index, (ours, theirs) in enumerate(pairs):
        theirs.send(b"x")
        loop.add_reader(ours, first, index)
    turn(loop)
    assert len(called) == 1
    assert called[0].startswith("first")
    for sock in (*fresh, *(each for pair in pairs for each in pair)):
        sock.close()


def test_an_error_in_a_reader_is_told_and_the_others_are_called(loop: Loop) -> None:
    told: list[dict[str, Any]] = []
    called: list[str] = []
    loop.set_exception_handler(lambda _, context: told.append(context))

    def fail() -> None:
        raise ValueError("on purpose")

    with socket.socketpair()[0] as one, socket.socketpair()[0] as other:
        loop.add_writer(one, fail)
        loop.add_writer(other, called.append, "called")
        turn(loop)
        assert called == ["called"]
        assert [str(each["exception"]) for each in told] == ["on purpose"]
        loop.remove_writer(one)
        loop.remove_writer(other)


def test_what_cannot_be_waited_for_is_an_error(loop: Loop, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, pytest.raises(PermissionError):
        loop.add_reader(file.fileno(), print)
    with pytest.raises(OSError, match="Bad file descriptor"):
        loop.add_reader(9999, print)
    assert loop.remove_reader(9999) is False


async def everything() -> None:
    """asyncio's own doings, all of which use the selector."""
    loop = asyncio.get_running_loop()
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    big = os.urandom(4 << 20)
    writer.write(big)
    writer.write_eof()
    assert await reader.read(-1) == big
    writer.close()
    server.close()
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as client:
        listening.setblocking(False)
        client.setblocking(False)
        accepting = asyncio.ensure_future(loop.sock_accept(listening))
        await loop.sock_connect(client, listening.getsockname())
        accepted, _ = await accepting
        with accepted:
            await loop.sock_sendall(client, b"hello")
            assert await loop.sock_recv(accepted, 10) == b"hello"
    assert await asyncio.to_thread(lambda: 7) == 7
    assert await loop.getaddrinfo("127.0.0.1", 25)
    signalled = asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR1, signalled.set)
    os.kill(os.getpid(), signal.SIGUSR1)
    await signalled.wait()
    loop.remove_signal_handler(signal.SIGUSR1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await asyncio.Event().wait()


async def refused() -> None:
    """A connection that fails leaves nothing behind for the next one with the same descriptor."""
    loop = asyncio.get_running_loop()
    address = ("127.0.0.1", free_port())
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            await loop.create_connection(asyncio.Protocol, *address)
    with socket.create_server(address):
        async with asyncio.timeout(30):
            transport, _ = await loop.create_connection(asyncio.Protocol, *address)
        transport.close()


@pytest.mark.parametrize("factory", [Loop, asyncio.SelectorEventLoop])
def test_a_connection_that_was_refused_is_forgotten(factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(refused())


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.read(-1))
    await writer.drain()
    writer.close()


@pytest.mark.parametrize("factory", [Loop, asyncio.SelectorEventLoop])
def test_asyncio_works_in_it(factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(everything())
