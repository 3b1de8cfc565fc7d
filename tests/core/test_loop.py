"""The event loop: readers and writers as asyncio has them, and all else of asyncio's that goes through the selector."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import threading
import weakref
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


def test_what_a_removed_reader_was_called_with_is_released_although_the_writer_stays(
    loop: Loop, pair: tuple[socket.socket, ...]
) -> None:
    ours, _ = pair
    argument = threading.Event()
    released = weakref.ref(argument)
    loop.add_writer(ours, print, "not called")
    loop.add_reader(ours, print, argument)
    loop.remove_reader(ours)
    del argument
    assert released() is None
    loop.remove_writer(ours)


@pytest.mark.parametrize("add", [Loop.add_reader, asyncio.SelectorEventLoop.add_reader])
def test_a_reader_removed_in_the_same_round_is_not_called(loop: Loop, add: Callable[..., None]) -> None:
    """Nor is the next owner of its number, for what was there for it, even if asyncio itself waits for that."""
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
        while number not in (each.fileno() for each in fresh):
            fresh.extend(socket.socketpair())
        add(loop, number, called.append, "the next owner")

    for index, (ours, theirs) in enumerate(pairs):
        theirs.send(b"x")
        loop.add_reader(ours, first, index)
    turn(loop)
    assert len(called) == 1
    assert called[0].startswith("first")
    for sock in (*fresh, *(each for pair in pairs for each in pair)):
        sock.close()


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError, GeneratorExit])
def test_an_error_in_a_reader_is_reported_and_the_others_are_called(loop: Loop, error: type[BaseException]) -> None:
    told: list[dict[str, Any]] = []
    called: list[str] = []
    loop.set_exception_handler(lambda _, context: told.append(context))

    def fail() -> None:
        raise error("on purpose")

    with socket.socketpair()[0] as one, socket.socketpair()[0] as other:
        loop.add_writer(one, fail)
        loop.add_writer(other, called.append, "called")
        turn(loop)
        assert called == ["called"]
        assert [str(each["exception"]) for each in told] == ["on purpose"]
        loop.remove_writer(one)
        loop.remove_writer(other)


def test_a_descriptor_that_cannot_be_watched_is_an_error(loop: Loop, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, pytest.raises(PermissionError):
        loop.add_reader(file.fileno(), print)
    with pytest.raises(OSError, match="Bad file descriptor"):
        loop.add_reader(9999, print)
    assert loop.remove_reader(9999) is False


PATIENCE = 20_000
"""Rounds in which there is always something to read, until a test gives up."""


def run_busily(loop: Loop, pair: tuple[socket.socket, ...], each_round: Callable[[int], object]) -> int:
    """Run the loop until it is stopped, with a reader for which there is always something. Returns how often it was called."""
    ours, theirs = pair
    rounds = 0

    def readable() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == PATIENCE:
            loop.stop()
        each_round(rounds)

    theirs.send(b"never read")
    loop.add_reader(ours, readable)
    loop.run_forever()
    loop.remove_reader(ours)
    return rounds


def test_a_reader_that_stops_the_loop_is_the_last_one(loop: Loop, pair: tuple[socket.socket, ...]) -> None:
    def each(rounds: int) -> None:
        if rounds == 3:
            loop.stop()

    assert run_busily(loop, pair, each) == 3


def test_a_reader_stops_the_loop_when_there_is_nothing_more_to_read(loop: Loop, pair: tuple[socket.socket, ...]) -> None:
    ours, theirs = pair

    def readable() -> None:
        ours.recv(1)
        loop.stop()

    loop.add_reader(ours, readable)
    theirs.send(b"x")
    loop.run_forever()
    loop.remove_reader(ours)


def test_a_callback_that_a_reader_queues_runs_before_the_next_wait(loop: Loop, pair: tuple[socket.socket, ...]) -> None:
    called: list[int] = []

    def each(rounds: int) -> None:
        if rounds <= 3:
            assert called == list(range(1, rounds))
            loop.call_soon(called.append, rounds)
        else:
            loop.stop()

    assert run_busily(loop, pair, each) == 4
    assert called == [1, 2, 3]


def test_a_timer_ends_the_loop_although_there_is_always_something_to_read(loop: Loop, pair: tuple[socket.socket, ...]) -> None:
    loop.call_later(3600, print)
    loop.call_later(0.01, loop.stop)
    assert run_busily(loop, pair, lambda _: None) < PATIENCE


@pytest.mark.parametrize("others", [0, 1])
def test_a_timer_that_a_reader_sets_is_called_although_there_is_nothing_more_to_read(
    loop: Loop, pair: tuple[socket.socket, ...], others: int
) -> None:
    ours, theirs = pair
    for _ in range(others):
        loop.call_later(3600, print)
    wrong = loop.call_later(60, loop.stop)
    wrong.cancel()

    def readable() -> None:
        ours.recv(1)
        loop.call_later(0.02, loop.stop)
        # An earlier one, which is no longer wanted.
        loop.call_later(0.01, called.append, "cancelled").cancel()

    called: list[str] = []
    loop.add_reader(ours, readable)
    theirs.send(b"x")
    begun = loop.time()
    loop.run_forever()
    assert 0.02 <= loop.time() - begun < 30
    assert called == []
    loop.remove_reader(ours)


def test_timers_that_readers_cancel_do_not_pile_up(loop: Loop, pair: tuple[socket.socket, ...]) -> None:
    def each(rounds: int) -> None:
        loop.call_later(3600, print).cancel()
        if rounds == 5000:
            loop.stop()

    run_busily(loop, pair, each)
    assert sum(isinstance(each, asyncio.TimerHandle) for each in gc.get_objects()) < 1000


def test_calls_of_another_thread_run_although_there_is_always_something_to_read(
    loop: Loop, pair: tuple[socket.socket, ...]
) -> None:
    def each(rounds: int) -> None:
        if rounds == 1:
            thread.start()
            thread.join()

    thread = threading.Thread(target=loop.call_soon_threadsafe, args=(loop.stop,))
    assert run_busily(loop, pair, each) < 3


def test_a_signal_is_handled_although_there_is_always_something_to_read(loop: Loop, pair: tuple[socket.socket, ...]) -> None:
    def each(rounds: int) -> None:
        if rounds == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    loop.add_signal_handler(signal.SIGUSR1, loop.stop)
    assert run_busily(loop, pair, each) < PATIENCE
    loop.remove_signal_handler(signal.SIGUSR1)


def test_an_interrupt_in_a_reader_leaves_the_loop_usable(loop: Loop, pair: tuple[socket.socket, ...]) -> None:
    def interrupt(rounds: int) -> None:
        raise KeyboardInterrupt

    def stop(rounds: int) -> None:
        if rounds == 2:
            loop.stop()

    with pytest.raises(KeyboardInterrupt):
        run_busily(loop, pair, interrupt)
    assert run_busily(loop, pair, stop) == 2


def test_the_next_owner_of_a_number_is_called_for_its_own_events_only(loop: Loop, pair: tuple[socket.socket, ...]) -> None:
    """The number changes hands between two waits of the selector, while asyncio has nothing to do."""
    first, theirs = socket.socketpair()
    theirs.send(b"x")
    number = first.fileno()
    called: list[str] = []
    fresh: list[socket.socket] = []

    def close() -> None:
        loop.remove_reader(number)
        first.close()
        while not fresh or number not in (each.fileno() for each in fresh):
            fresh.extend(socket.socketpair())
        loop.add_reader(number, called.append, "the next owner")

    def each(rounds: int) -> None:
        if rounds == 5:
            loop.stop()

    loop.add_reader(number, close)
    run_busily(loop, pair, each)
    assert called == []
    owner = next(each for each in fresh if each.fileno() == number)
    fresh[fresh.index(owner) ^ 1].send(b"x")
    turn(loop)
    assert called == ["the next owner"]
    loop.remove_reader(number)
    for sock in (*fresh, theirs):
        sock.close()


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


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("factory", [Loop, asyncio.SelectorEventLoop])
def test_asyncio_works_in_it(factory: Callable[[], asyncio.AbstractEventLoop], debug: bool) -> None:
    with asyncio.Runner(loop_factory=factory, debug=debug) as runner:
        runner.run(everything())
