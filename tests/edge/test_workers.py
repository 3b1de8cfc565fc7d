"""fumi-edge --workers: one edge to its clients, whichever process they come to."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import pytest

from tests.edge.backends import Backend, StartBackend
from tests.edge.clients import Clients
from tests.edge.program import Program, StartEdge
from tests.support.certificates import Authority, MakeAuthority, shown_pem
from tests.support.peer import Peer
from tests.support.waiting import until


def ready(program: Program) -> bool:
    return program.fetch("/readyz")[0] == 200


def replaced(program: Program, number: int = signal.SIGKILL) -> None:
    """Kill all workers; returns once others are there."""
    before = program.workers()
    for pid in before:
        os.kill(pid, number)
    until(lambda: len(program.workers() - before) == len(before) and ready(program), "new workers")


ESTABLISHED = 1


def cut_off(client: Peer) -> bool:
    """As the kernel knows: with OpenSSL 3.6, Python 3.14 raises what came of one TLS socket at the next one, too."""
    (state,) = client.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)
    return state != ESTABLISHED


class StartTwo(Protocol):
    """The fixture ``two``."""

    def __call__(self, *flags: str, behind: Backend | None = None, certs: Sequence[str | Path] | None = None) -> Program: ...


@pytest.fixture
def two(edge: StartEdge, backend: StartBackend) -> StartTwo:
    """Starts an edge of two workers."""

    def start(*flags: str, behind: Backend | None = None, certs: Sequence[str | Path] | None = None) -> Program:
        flags = ("--workers", "2", *flags)
        server = behind or backend()
        program = edge(*flags, backend=server) if certs is None else edge(*flags, backend=server, certs=certs)
        until(lambda: ready(program) and len(program.workers()) == 2, "two workers")
        return program

    return start


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_workers_resume_each_others_sessions(two: StartTwo, clients: Clients, version: ssl.TLSVersion) -> None:
    program = two()
    context = clients.context()
    context.minimum_version = context.maximum_version = version
    first = clients.tls(program.tls_port, context=context)
    first.line()
    replaced(program)
    sock = context.wrap_socket(clients.plain(program.tls_port).sock, server_hostname="localhost", session=first.tls.session)
    with sock:
        assert sock.session_reused


def test_workers_resume_each_others_sessions_after_a_new_client_ca_too(
    two: StartTwo, clients: Clients, authority: Authority, make_authority: MakeAuthority, tmp_path: Path
) -> None:
    """All of them use the same new ticket keys, and none the old."""
    ca = tmp_path / "ca.pem"
    ca.write_text(authority.path.read_text())
    program = two("--client-ca", str(ca), "--cert-reload-interval", "0.05")
    context = clients.context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    def visit(session: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, bool | None]:
        """The session of a connection, and whether it resumed the one given."""
        sock = context.wrap_socket(clients.plain(program.tls_port).sock, server_hostname="localhost", session=session)
        with sock:
            assert sock.recv(3) == b"220"
            return sock.session, sock.session_reused

    old, _ = visit(None)
    assert all(visit(old)[1] for _ in range(20))
    ca.write_text(ca.read_text() + make_authority("Another CA").path.read_text())
    until(lambda: program.metric("fumi_edge_certificate_reloads_total", result="ok") == 2, "the reload in both")
    assert not any(visit(old)[1] for _ in range(20))
    new, _ = visit(None)
    assert all(visit(new)[1] for _ in range(20))


def test_a_killed_worker_takes_only_its_own_connections_with_it(two: StartTwo, clients: Clients) -> None:
    program = two()
    held = [clients.tls(program.tls_port) for _ in range(12)]
    for client in held:
        assert client.line().startswith(b"220")
    assert program.fetch("/readyz") == (200, "ready\n")
    until(lambda: program.metric("fumi_edge_handshakes_total", result="ok") == 12, "the sum")
    before = program.workers()
    os.kill(min(before), signal.SIGKILL)
    until(lambda: len(program.workers() - before) == 1, "a new worker")
    alive = 0
    for client in held:
        if not cut_off(client):
            client.say(b"NOOP\r\n")
            alive += client.line().startswith(b"250")
    assert 0 < alive < 12
    until(lambda: program.metric("fumi_edge_connections_active", listener=f"127.0.0.1:{program.tls_port}") == alive, "the rest")
    assert program.metric("fumi_edge_worker_restarts_total") == 1
    assert program.metric("fumi_edge_handshakes_total", result="ok") == 12
    (death,) = until(lambda: program.events("worker died"), "the line")
    assert (death["pid"], death["reason"]) == (min(before), "SIGKILL")
    assert clients.tls(program.tls_port).line().startswith(b"220")


def test_metrics_are_there_from_the_start_and_state_is_not_added_up(two: StartTwo) -> None:
    program = two()
    assert program.metric("fumi_edge_worker_restarts_total") == 0
    assert program.metric("fumi_edge_handshakes_total", result="timeout") == 0
    assert program.metric("fumi_edge_build_info") == 1
    assert program.metric("fumi_edge_backend_up") == 1
    assert 1.7e9 < program.metric("fumi_edge_certificate_not_after_timestamp_seconds", name="localhost") < 2.5e9


def test_max_clients_counts_over_all_workers(two: StartTwo, clients: Clients) -> None:
    program = two("--max-clients", "3")
    for _ in range(3):
        assert clients.tls(program.tls_port).line().startswith(b"220")
    assert clients.plain(program.tls_port).rest() == b""
    until(lambda: program.metric("fumi_edge_rejected_total", reason="max_clients") == 1, "the rejection")


def test_all_workers_are_ready_or_not_by_what_the_checks_find(two: StartTwo, backend: StartBackend) -> None:
    behind = backend()
    program = two("--health-interval", "0.1", behind=behind)
    behind.close()
    until(lambda: program.fetch("/readyz")[0] == 503, "the loss of the backend")
    assert "backend" in program.fetch("/readyz")[1]


def test_sighup_renews_the_certificate_of_every_worker_and_of_those_to_come(
    two: StartTwo, authority: Authority, clients: Clients, tmp_path: Path
) -> None:
    files = tmp_path / "cert.pem", tmp_path / "key.pem"
    old, new = authority.issue("localhost"), authority.issue("localhost")
    for path, source in zip(files, old, strict=True):
        path.write_bytes(source.read_bytes())
    program = two("--cert-reload-interval", "0", certs=("--cert", files[0], "--key", files[1]))
    for path, source in zip(files, new, strict=True):
        path.write_bytes(source.read_bytes())
    context = ssl.create_default_context(cafile=authority.path)

    def shown() -> str:
        client = clients.tls(program.tls_port, context=context)
        return shown_pem(client.tls)

    program.process.send_signal(signal.SIGHUP)
    until(lambda: program.events("reloaded"), "the reload")
    expected = ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(new[0].read_text()))
    assert {shown() for _ in range(8)} == {expected}
    replaced(program)
    assert {shown() for _ in range(8)} == {expected}


def test_sigterm_drains_the_connections_of_all_workers(two: StartTwo, clients: Clients) -> None:
    program = two()
    held = [clients.tls(program.tls_port) for _ in range(8)]
    for client in held:
        client.line()
    program.process.send_signal(signal.SIGTERM)
    until(lambda: refused(program.tls_port), "the end of accepting")
    for client in held:
        assert client.ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
        assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
        assert client.rest() == b""
        client.close()
    assert program.process.wait(60) == 0
    assert program.events("worker died") == []


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=30).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False


def test_dev_is_one_process(edge: StartEdge, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="--dev is one process"):
        Program("--dev", "--workers", "2", cwd=tmp_path)


def test_a_worker_that_takes_anothers_place_has_the_certificate_of_today(
    two: StartTwo, authority: Authority, tmp_path: Path
) -> None:
    """Its master has read that of the start, and the files have been renewed since."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    (old_cert, old_key), (new_cert, new_key) = authority.issue("localhost"), authority.issue("localhost")
    shutil.copy(old_cert, cert)
    shutil.copy(old_key, key)
    program = two("--cert-reload-interval", "3600", certs=("--cert", cert, "--key", key))
    for path, new in ((key, new_key), (cert, new_cert)):
        shutil.copy(new, tmp_path / "new")
        os.replace(tmp_path / "new", path)
    replaced(program)
    context = ssl.create_default_context(cafile=str(authority.path))
    for _ in range(8):
        with (
            socket.create_connection(("127.0.0.1", program.tls_port), 30) as sock,
            context.wrap_socket(sock, server_hostname="localhost") as tls,
        ):
            served = shown_pem(tls)
        assert served.strip() == new_cert.read_text().strip()
