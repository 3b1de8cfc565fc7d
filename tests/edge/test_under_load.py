"""What must not be felt while many clients come and go: workers that are killed, and an edge that gives way to another."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from dataclasses import dataclass
from typing import Self

import pytest

from tests.edge.backends import StartBackend
from tests.edge.clients import Clients
from tests.edge.program import Program, StartEdge
from tests.support.peer import Peer
from tests.support.waiting import until


def by_name(peer: Peer) -> None:
    """A backend that greets with the connection's UNIQUE_ID, and answers a few commands."""
    peer.say(b"220 %s\r\n" % (peer.header.unique_id or b"?"))
    while line := peer.line():
        peer.say(b"221 bye\r\n" if line == b"QUIT\r\n" else b"250 ok\r\n")
        if line == b"QUIT\r\n":
            return


@dataclass
class Visit:
    """One client connection: when it lasted, which process of the edge it was with, and what went wrong."""

    begun: float
    ended: float = 0.0
    process: bytes = b""
    problem: str | None = None


class Load:
    """Clients in threads, each connecting anew when it is done, until ``stop()``."""

    def __init__(self, clients: Clients, port: int, threads: int) -> None:
        self._clients, self._port = clients, port
        self._over = threading.Event()
        self.visits: list[Visit] = []
        self._threads = [threading.Thread(target=self._come, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _come(self) -> None:
        context = self._clients.context()
        while not self._over.is_set():
            visit = Visit(time.monotonic())
            client = None
            try:
                client = self._clients.tls(self._port, context=context)
                banner = client.line()
                visit.process = banner[4:].partition(b"-")[0]
                assert banner.startswith(b"220 "), banner
                for _ in range(3):
                    assert client.ask(b"NOOP\r\n") == [b"250 ok\r\n"]
                assert client.ask(b"QUIT\r\n") == [b"221 bye\r\n"]
                assert client.rest() == b""
            except (OSError, AssertionError) as problem:
                visit.problem = repr(problem)
            visit.ended = time.monotonic()
            self.visits.append(visit)
            if client is not None:
                client.close()

    def wait_for(self, more: int) -> None:
        """Wait until so many more visits have ended."""
        enough = len(self.visits) + more
        until(lambda: len(self.visits) >= enough, f"{more} visits")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    @property
    def failures(self) -> list[Visit]:
        return [visit for visit in self.visits if visit.problem]


def test_workers_killed_at_random_cost_only_their_own_connections(
    backend: StartBackend, edge: StartEdge, clients: Clients
) -> None:
    program = edge("--workers", "3", backend=backend(by_name))
    until(lambda: program.fetch("/readyz")[0] == 200, "the workers")
    numbers = random.Random(1)
    kills = []
    with Load(clients, program.tls_port, 8) as load:
        for _ in range(6):
            load.wait_for(20)
            worker = numbers.choice(until(lambda: sorted(program.workers()), "a worker"))
            before = time.monotonic()
            os.kill(worker, signal.SIGKILL)
            kills.append((before, time.monotonic()))
            until(lambda: len(program.events("worker died")) == len(kills), "the news")
    visits = load.visits
    assert len(visits) > 120
    for visit in load.failures:
        # Refused is nobody, and whoever was cut off was there when a worker died.
        assert visit.problem is not None
        assert "Refused" not in visit.problem
        assert any(visit.begun <= after and visit.ended >= before for before, after in kills), visit
        assert not [each for each in visits if each.process == visit.process != b"" and each.begun > visit.ended], visit
    assert len({visit.process for visit in load.failures} - {b""}) <= len(kills)
    until(lambda: program.metric("fumi_edge_worker_restarts_total") == len(kills), "the count")
    assert {entry["reason"] for entry in program.events("worker died")} == {"SIGKILL"}


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_new_edge_beside_the_old_one_takes_over_and_no_connection_fails(
    backend: StartBackend, edge: StartEdge, clients: Clients, workers: str
) -> None:
    """Both have the socket, as services of one systemd socket unit do; the old one is told to stop while all goes on."""
    server = backend(by_name)
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listening:
        flags = ["--listen", f"fd:{listening.fileno()}", "--workers", workers]

        def start() -> Program:
            program = edge(*flags, backend=server, inherited=[listening.fileno()])
            until(lambda: program.fetch("/readyz")[0] == 200, "the edge")
            return program

        old = start()
        with Load(clients, listening.getsockname()[1], 6) as load:
            until(lambda: len(load.visits) > 50, "the first visits")
            new = start()
            assert old.stop() == 0
            seen = len(load.visits)
            until(lambda: len(load.visits) > seen + 60, "visits to the new one")
    assert load.failures == []
    assert len({visit.process for visit in load.visits}) >= 2
    new.ended(50)
    assert {entry["reason"] for entry in old.events("connection ended")} == {"backend_closed"}
