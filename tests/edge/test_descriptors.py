"""Running out of file descriptors: clients wait, backends are not blamed, and listeners go on afterwards."""

from __future__ import annotations

import contextlib
import os
import resource
import threading

from fumi_core.runtime.acceptor import SPARE_DESCRIPTORS
from tests.edge.backends import StartBackend, smtp
from tests.edge.clients import Clients
from tests.edge.program import StartEdge
from tests.support.certificates import CertificateFiles
from tests.support.peer import Peer
from tests.support.waiting import until


def test_running_out_of_descriptors_is_not_the_backends_fault(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    program = edge("--log-level", "debug", backend=backend())
    pid = program.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)

    def came_too_late() -> bool:
        before_it = len(program.events("connection ended"))
        # One more descriptor is there for a client, and none for its backend; unless one that was counted went meanwhile.
        used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
        free = [number for number in range(len(used) + 2) if number not in used]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[0] + 1, before[1]))
        with contextlib.closing(clients.plain(program.starttls_port)) as client:
            line = client.line()
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        program.ended(before_it + 1)
        return line.startswith(b"421 4.3.2 ")

    until(came_too_late, "a 421")
    assert program.metric("fumi_edge_backend_up") == 1
    assert program.events("backend down") == []
    assert clients.plain(program.starttls_port).line().startswith(b"220")
    assert clients.tls(program.tls_port).line().startswith(b"220")


def test_running_out_of_descriptors_is_survived(
    backend: StartBackend, certificate: CertificateFiles, edge: StartEdge, clients: Clients
) -> None:
    """With few descriptors, accept pauses, says so once, and resumes when some are free."""
    program = edge(backend=backend())
    most = resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (24, most))
    waiting = [clients.plain(program.starttls_port) for _ in range(20)]
    until(lambda: program.events("cannot accept, pausing"), "the pause")
    for client in waiting:
        client.close()
    resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (most, most))

    def answered() -> bool:
        client = clients.tls(program.tls_port)
        return client.line().startswith(b"220")

    until(answered, "an answer")
    assert len(program.events("cannot accept, pausing")) == 1


def test_the_limit_leaves_out_the_descriptors_of_the_edge_itself(backend: StartBackend, edge: StartEdge) -> None:
    program = edge(backend=backend())
    pid = program.process.pid
    allowed, _ = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    clients = program.metric("fumi_edge_connections_limit")
    free = allowed - len(os.listdir(f"/proc/{pid}/fd")) - SPARE_DESCRIPTORS
    assert 0 <= free - 2 * clients <= 3


def test_clients_without_a_free_descriptor_wait_and_get_no_421(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    """A client takes two: where there is one left, it is not accepted, and the backend's are not missed."""
    program = edge("--health-interval", "0.2", backend=backend())
    most = resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (40, most))
    waiting = [clients.plain(program.starttls_port) for _ in range(60)]
    for client in waiting:
        # Whoever has been served makes room for another.
        assert client.line() == b"220 backend.test ESMTP\r\n"
        assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
        assert client.rest() == b""
        client.close()
    assert len(program.events("cannot accept, pausing")) == 1
    assert program.fetch("/readyz") == (200, "ready\n")
    assert {entry["reason"] for entry in program.ended(60)} == {"backend_closed"}


def test_clients_that_upgrade_at_once_find_descriptors_although_backends_are_slow_to_close(
    backend: StartBackend, edge: StartEdge, clients: Clients
) -> None:
    """Each needs a second connection to the backend, and the first one is not closed yet."""
    go = threading.Event()

    def handler(peer: Peer) -> None:
        smtp(peer)
        go.wait(20)

    program = edge("--max-clients", "1000", backend=backend(handler))
    most = resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (120, most))
    peers = [clients.plain(program.starttls_port) for _ in range(36)]
    for peer in peers:
        assert peer.line() == b"220 backend.test ESMTP\r\n"
    for peer in peers:
        assert peer.ask(b"STARTTLS\r\n") == [b"220 2.0.0 Ready to start TLS\r\n"]
    upgraded = [clients.upgrade(peer) for peer in peers]
    for peer in upgraded:
        assert peer.ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    # Others wait for a free descriptor, and are not rejected.
    late = [clients.plain(program.starttls_port) for _ in range(20)]
    until(lambda: program.events("cannot accept, pausing"), "the pause")
    go.set()
    for peer in upgraded:
        peer.close()
    for peer in late:
        assert peer.line() == b"220 backend.test ESMTP\r\n"
