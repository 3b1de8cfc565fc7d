"""Who accepts a connection: workers share them out, and a stop accepts what has come."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import resource
import socket
from functools import partial

import pytest

from fumi_core.runtime.acceptor import Acceptor, DescriptorLimit
from fumi_core.runtime.scoreboard import Scoreboard, Slot, WorkerState, count_of_one_process


def test_connections_that_stay_are_shared_out() -> None:
    async def shared() -> list[int]:
        board = Scoreboard(3)
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=64))
            for slot in board.slots:
                slot.state = WorkerState.SERVING
            for slot in board.slots:
                sock = listener.dup()
                sock.setblocking(False)
                acceptor = Acceptor(sock, "", logging.getLogger(), partial(admit, slot, stack), slot.connection_count)
                stack.callback(acceptor.close)
            for _ in range(40):
                stack.enter_context(socket.create_connection(listener.getsockname()))
            while sum(board.connections) < 40:
                await asyncio.sleep(0.001)
            return list(board.connections)

    def admit(slot: Slot, stack: contextlib.ExitStack, sock: socket.socket, peer: object, own: object) -> None:
        stack.enter_context(sock)
        slot.connection_count.opened()

    counts = asyncio.run(shared())
    assert max(counts) < 20


def test_a_stop_in_a_flood_accepts_what_has_come_and_serves_meanwhile() -> None:
    """Each connection that is accepted brings another one, so that the queue is never empty."""
    queued, most = 100, 2000

    async def flood() -> tuple[int, int]:
        accepted, turns = 0, 0
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=256))
            listener.setblocking(False)
            address = listener.getsockname()

            def admit(sock: socket.socket, peer: object, own: object) -> None:
                nonlocal accepted
                accepted += 1
                stack.enter_context(sock)
                if accepted < most:
                    stack.enter_context(socket.create_connection(address))

            def turn() -> None:
                nonlocal turns
                turns += 1
                loop.call_soon(turn)

            acceptor = Acceptor(listener, "", logging.getLogger(), admit, count_of_one_process())
            for _ in range(queued):
                stack.enter_context(socket.create_connection(address))
            loop.call_soon(turn)
            await acceptor.close_after_queue()
            return accepted, turns

    accepted, turns = asyncio.run(flood())
    assert accepted == queued
    assert turns >= 3


def test_a_system_that_does_not_tell_its_descriptors_has_a_limit_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(path: str) -> list[str]:
        raise FileNotFoundError(path)

    monkeypatch.setattr("os.listdir", unknown)
    monkeypatch.setattr("resource.getrlimit", lambda which: (1024, 1024))
    limit = DescriptorLimit(2)
    assert not limit.reached(400)
    assert limit.reached(500)


def test_it_says_for_how_many_connections_there_are_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    closing = 10
    limit = DescriptorLimit(2, lambda: closing)
    monkeypatch.setattr("resource.getrlimit", lambda which: (1024, 1024))
    assert limit.reached(int(limit.connections))
    assert not limit.reached(int(limit.connections) - closing)
    monkeypatch.setattr("resource.getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert limit.connections == math.inf
