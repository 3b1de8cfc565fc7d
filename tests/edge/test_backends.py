"""Several backends: which one gets a client, what becomes of those that fail, and that no client is the worse for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.edge.backends import Backend, Flapping, StartBackend, backend_flags, counts
from tests.edge.clients import Clients
from tests.edge.metrics import errors, up
from tests.edge.program import Program, StartEdge
from tests.edge.replies import ENDED, READY
from tests.support.peer import Peer
from tests.support.waiting import until


@pytest.fixture
def silent(backend: StartBackend) -> Callable[..., Backend]:
    """A backend that accepts and hangs up; with ``reset`` it breaks off."""

    def silent(reset: bool = False, when: Callable[[Peer], bool] = lambda peer: True) -> Backend:
        def handler(peer: Peer) -> None:
            if when(peer):
                if reset:
                    peer.reset()
                return
            peer.say(b"220 silent.test\r\n")
            while peer.line():
                peer.say(b"250 silent.test\r\n")

        return backend(handler)

    return silent


def test_the_backend_with_the_fewest_connections_is_chosen(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    servers = [backend() for _ in range(3)]
    program = edge(*backend_flags(*servers[1:]), backend=servers[0])
    peers = [clients.tls(program.tls_port) for _ in range(9)]
    for client in peers:
        client.line()
    assert counts(*servers) == [3, 3, 3]
    mine = {peer.header.source for peer in servers[1].peers}
    leaving = [client for client in peers if client.sock.getsockname() in mine]
    for client in leaving:
        client.ask(b"QUIT\r\n")
        client.close()
    program.ended(3)
    for _ in range(3):
        clients.tls(program.tls_port).line()
    assert counts(*servers) == [3, 6, 3]


def test_roundrobin_takes_each_in_turn_but_those_that_are_down(
    backend: StartBackend, edge: StartEdge, served: Callable[[Program], None]
) -> None:
    servers = [backend() for _ in range(3)]
    program = edge("--balance", "roundrobin", *backend_flags(*servers[1:]), backend=servers[0])
    for _ in range(6):
        served(program)
    assert counts(*servers) == [2, 2, 2]
    servers[1].close()
    for _ in range(7):
        served(program)
    assert servers[1].peers[2:] == []
    assert abs(len(servers[0].peers) - len(servers[2].peers)) <= 1
    assert len(servers[0].peers) + len(servers[2].peers) == 11


def test_first_sends_all_to_the_first_that_is_up(
    backend: StartBackend, edge: StartEdge, served: Callable[[Program], None], clients: Clients
) -> None:
    servers = [backend(), backend()]
    program = edge("--balance", "first", *backend_flags(servers[1]), backend=servers[0])
    for _ in range(3):
        served(program)
    assert counts(*servers) == [3, 0]
    servers[0].close()
    for _ in range(3):
        served(program)
    assert counts(*servers) == [3, 3]
    # Once was enough to find out.
    assert errors(program, servers[0], "refused") == 1
    (line,) = until(lambda: program.events("backend down"), "the line")
    assert (line["level"], line["backends_up"]) == ("warning", 1)
    servers[1].close()
    client = clients.tls(program.tls_port)
    assert client.rest().startswith(b"421 4.3.2")
    until(lambda: len(program.events("backend down")) == 2, "the last one")
    last = program.events("backend down")[1]
    assert (last["level"], last["backend"], last["backends_up"]) == ("error", servers[1].address, 0)


def test_unix_sockets_are_balanced_like_any_other(
    backend: StartBackend, edge: StartEdge, clients: Clients, tmp_path: Path
) -> None:
    servers = [backend(path=str(tmp_path / name)) for name in ("one.sock", "two.sock")]
    program = edge(*backend_flags(servers[1]), backend=servers[0])
    for _ in range(4):
        clients.tls(program.tls_port).line()
    assert counts(*servers) == [2, 2]


@pytest.mark.parametrize("balance", ["leastconn", "roundrobin"])
def test_after_the_upgrade_the_client_keeps_its_backend(
    backend: StartBackend, edge: StartEdge, clients: Clients, balance: str
) -> None:
    servers = [backend(), backend()]
    program = edge("--balance", balance, *backend_flags(servers[1]), backend=servers[0])
    for _ in range(4):
        client = clients.plain(program.starttls_port)
        client.reply()
        assert clients.starttls(client).ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    for server in servers:
        ids = [peer.header.unique_id for peer in server.peers]
        assert len(ids) == 4
        assert len(set(ids)) == 2


def test_after_the_upgrade_another_backend_will_do(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    servers = [backend(), backend()]
    program = edge("--balance", "first", *backend_flags(servers[1]), backend=servers[0])
    client = clients.plain(program.starttls_port)
    client.reply()
    assert client.ask(b"STARTTLS\r\n") == READY
    servers[0].close()
    assert clients.upgrade(client).ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    assert counts(*servers) == [1, 1]


@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
def test_if_a_backend_closes_without_a_banner_another_one_serves_the_client(
    backend: StartBackend, silent: Callable[..., Backend], edge: StartEdge, clients: Clients, reset: bool
) -> None:
    bad, good = silent(reset), backend()
    program = edge("--balance", "first", *backend_flags(good), backend=bad)
    client = clients.tls(program.tls_port)
    assert client.line() == b"220 backend.test ESMTP\r\n"
    assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
    assert client.rest() == b""
    plain = clients.plain(program.starttls_port)
    assert plain.line() == b"220 backend.test ESMTP\r\n"
    plain = clients.starttls(plain)
    assert plain.ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    assert errors(program, bad, "banner") == 2
    # What happened to one client is no verdict on the backend, or a client who is not welcome there could bring it down.
    assert up(program, bad) == 1


@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
def test_a_backend_that_hangs_up_after_the_upgrade_is_replaced_too(
    backend: StartBackend, silent: Callable[..., Backend], edge: StartEdge, clients: Clients, reset: bool
) -> None:
    bad, good = silent(reset, when=lambda peer: peer.header.tls), backend()
    program = edge("--balance", "first", *backend_flags(good), backend=bad)
    client = clients.plain(program.starttls_port)
    assert client.reply() == [b"220 silent.test\r\n"]
    client = clients.starttls(client)
    assert client.ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    assert counts(bad, good) == [2, 1]


@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
def test_when_every_backend_closes_without_a_banner_the_client_gets_421(
    silent: Callable[..., Backend], edge: StartEdge, clients: Clients, reset: bool
) -> None:
    servers = [silent(reset), silent(reset)]
    program = edge(*backend_flags(servers[1]), backend=servers[0])
    assert clients.tls(program.tls_port).rest() == ENDED
    assert clients.plain(program.starttls_port).rest() == ENDED
    assert counts(*servers) == [2, 2]


def test_a_client_that_leaves_before_the_banner_is_not_the_backends_fault(
    backend: StartBackend, edge: StartEdge, clients: Clients
) -> None:
    def handler(peer: Peer) -> None:
        peer.rest()  # no word before the client's end

    server = backend(handler)
    program = edge(backend=server)
    client = clients.tls(program.tls_port)
    server.peer()
    client.end()
    assert client.rest() == b""
    client.close()
    assert program.ended()[0]["reason"] == "client_closed"
    assert errors(program, server, "banner") == 0
    assert len(server.peers) == 1


def test_a_client_that_has_spoken_is_not_sent_elsewhere(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    """What it said has gone to one backend, and is not said again to another; it is told."""
    heard = []

    def handler(peer: Peer) -> None:
        heard.append(peer.line())

    servers = [backend(handler), backend(handler)]
    program = edge(*backend_flags(servers[1]), backend=servers[0])
    client = clients.tls(program.tls_port)
    client.say(b"EHLO early\r\n")
    assert client.rest() == b"421 4.3.2 Service not available, closing connection\r\n"
    client.close()
    assert program.ended()[0]["reason"] == "backend_closed"
    assert heard == [b"EHLO early\r\n"]


def test_a_backend_that_goes_down_and_up_affects_no_client(
    backend: StartBackend, edge: StartEdge, served: Callable[[Program], None]
) -> None:
    """Two backends, one of them flapping, with and without checks; every client is served."""
    steady, flapping = backend(), Flapping()
    program = edge("--health-interval", "0.1", "--balance", "roundrobin", *backend_flags(flapping), backend=steady)
    over = threading.Event()

    def flap() -> None:
        while not over.is_set():
            flapping.appear()
            over.wait(0.07)
            flapping.vanish()
            over.wait(0.07)

    thread = threading.Thread(target=flap)
    thread.start()
    try:
        for _ in range(150):
            served(program)
    finally:
        over.set()
        thread.join()
    assert {entry["reason"] for entry in program.ended(150)} <= {"backend_closed", "closed"}
