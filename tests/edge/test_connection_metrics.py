"""The metrics of connections to each backend, and of how many clients there may be."""

from __future__ import annotations

import math
import resource
import signal
from pathlib import Path

import pytest

from tests.edge.backends import StartBackend
from tests.edge.clients import Clients
from tests.edge.program import Program, StartEdge
from tests.support.certificates import CertificateFiles
from tests.support.waiting import until

CONNECTIONS, LIMIT = "fumi_edge_backend_connections_active", "fumi_edge_connections_limit"


def connected(program: Program, backend: str, count: int) -> None:
    until(lambda: program.metric(CONNECTIONS, backend=backend) == count, f"{count} connections to {backend}")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_connections_to_each_backend_are_counted(
    workers: str, backend: StartBackend, edge: StartEdge, clients: Clients
) -> None:
    one, other = backend(), backend()
    program = edge("--workers", workers, "--backend", other.address, "--balance", "first", backend=one)
    open_now = [clients.tls(program.tls_port) for _ in range(4)]
    for client in open_now:
        client.line()
    connected(program, one.address, 4)
    assert program.metric(CONNECTIONS, backend=other.address) == 0
    for client in open_now[1:]:
        client.ask(b"QUIT\r\n")
        client.close()
    connected(program, one.address, 1)


def test_a_backend_that_is_no_longer_named_is_shown_until_its_last_connection_ends(
    backend: StartBackend, clients: Clients, certificate: CertificateFiles, tmp_path: Path
) -> None:
    old, new = backend(), backend()
    config = tmp_path / "edge.toml"
    config.write_text(f'backend = ["{old.address}"]')
    cert, key = map(str, certificate)
    flags = ("--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--health-interval", "0")
    program = Program("--config", str(config), "--cert", cert, "--key", key, *flags)
    client = clients.tls(program.tls_port)
    client.line()
    config.write_text(f'backend = ["{new.address}"]')
    program.process.send_signal(signal.SIGHUP)
    until(lambda: program.events("reloaded"), "the reload")
    assert program.metric(CONNECTIONS, backend=old.address) == 1
    assert program.metric(CONNECTIONS, backend=new.address) == 0
    client.ask(b"QUIT\r\n")
    client.close()
    until(lambda: f'{CONNECTIONS}{{backend="{old.address}"}}' not in program.fetch("/metrics")[1], "the end of the connection")
    program.stop()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_limit_is_that_of_all_workers(workers: str, backend: StartBackend, edge: StartEdge) -> None:
    program = edge("--workers", workers, "--max-clients", "7", backend=backend())
    until(lambda: program.fetch("/readyz")[0] == 200, "the workers")
    assert program.metric(LIMIT) == 7


def test_without_max_clients_each_worker_has_so_many_connections_as_its_descriptors_allow(
    backend: StartBackend, edge: StartEdge
) -> None:
    alone, both = edge(backend=backend()), edge("--workers", "2", backend=backend())
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] == resource.RLIM_INFINITY:
        assert (alone.metric(LIMIT), both.metric(LIMIT)) == (math.inf, math.inf)
    else:
        # The second worker may be late.
        until(lambda: 1.9 < both.metric(LIMIT) / alone.metric(LIMIT) < 2.1, "the limit of two workers")
