"""fumi-edge as an operator meets it: flags, limits, signals, metrics."""

from __future__ import annotations

import signal
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest

from tests.edge.backends import StartBackend
from tests.edge.clients import Clients
from tests.edge.program import StartEdge
from tests.support.peer import Peer
from tests.support.waiting import until


def test_beyond_max_clients_tls_is_closed_and_starttls_gets_421(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    program = edge("--max-clients", "2", backend=backend())
    first, second = clients.tls(program.tls_port), clients.plain(program.starttls_port)
    first.line()
    second.line()
    with pytest.raises((ssl.SSLError, OSError)):
        clients.tls(program.tls_port)
    assert clients.plain(program.starttls_port).rest() == b"421 4.7.0 Too many connections, try again later\r\n"
    assert program.metric("fumi_edge_rejected_total", reason="max_clients") == 2
    first.ask(b"QUIT\r\n")
    first.close()
    program.ended()
    assert clients.tls(program.tls_port).line().startswith(b"220")


def test_one_client_too_many_that_sends_early_still_gets_421(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    program = edge("--max-clients", "1", backend=backend())
    first = clients.plain(program.starttls_port)
    first.line()
    program.process.send_signal(signal.SIGSTOP)
    early = clients.plain(program.starttls_port)
    early.say(b"EHLO early\r\n")
    program.process.send_signal(signal.SIGCONT)
    assert early.rest() == b"421 4.7.0 Too many connections, try again later\r\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_accepting_and_drains_connections(
    backend: StartBackend, edge: StartEdge, clients: Clients, number: signal.Signals
) -> None:
    program = edge(backend=backend())
    ports = program.tls_port, program.starttls_port
    client = clients.tls(program.tls_port)
    client.line()
    program.process.send_signal(number)
    until(lambda: program.events("draining"), "the drain")
    for port in ports:
        with pytest.raises(ConnectionRefusedError):
            clients.plain(port)
    assert client.ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
    assert client.rest() == b""
    client.close()
    assert program.process.wait(30) == 0


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_sigusr1_and_sigusr2_are_ignored(
    backend: StartBackend, edge: StartEdge, clients: Clients, number: signal.Signals, workers: str
) -> None:
    program = edge("--workers", workers, backend=backend())
    program.process.send_signal(number)
    client = clients.tls(program.tls_port)
    assert client.line().startswith(b"220")
    client.close()
    assert program.stop() == 0


def test_connections_open_after_the_drain_timeout_are_closed(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    program = edge("--drain-timeout", "0.2", backend=backend())
    client, plain = clients.tls(program.tls_port), clients.plain(program.starttls_port)
    client.line()
    plain.line()
    assert program.stop() == 0
    assert client.rest() == b""
    assert {entry["reason"] for entry in program.events("connection ended")} == {"shutdown"}


def test_metrics_are_there_from_the_start_and_count(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    server = backend()
    program = edge(backend=server)
    status, text = program.fetch("/metrics")
    assert status == 200
    counters = ["connections", "handshakes", "tls_sessions", "starttls", "bytes", "backend_errors", "rejected"]
    histograms = ["handshake_seconds", "backend_connect_seconds", "session_seconds"]
    gauges = ["connections_active", "backend_up", "certificate_not_after_timestamp_seconds", "build_info"]
    for name in [*(f"{each}_total" for each in counters), *(f"{each}_count" for each in histograms), *gauges]:
        assert f"\nfumi_edge_{name}" in text, name
    before = {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    listener = f"127.0.0.1:{program.tls_port}"
    for result in ("ok", "timeout", "protocol", "certificate", "reset"):
        assert program.metric("fumi_edge_handshakes_total", listener=listener, result=result) == 0
    client = clients.tls(program.tls_port)
    banner = client.line()
    assert program.metric("fumi_edge_connections_active", listener=listener) == 1
    client.ask(b"QUIT\r\n")
    client.close()
    program.ended()
    until(lambda: program.metric("fumi_edge_connections_active", listener=listener) == 0, "the end")
    assert program.metric("fumi_edge_connections_total", listener=listener) == 1
    assert program.metric("fumi_edge_handshakes_total", listener=listener, result="ok") == 1
    assert program.metric("fumi_edge_handshake_seconds_count") == 1
    assert program.metric("fumi_edge_session_seconds_count") == 1
    assert program.metric("fumi_edge_backend_connect_seconds_count", backend=server.address) == 1
    assert program.metric("fumi_edge_bytes_total", direction="in") == 6
    assert program.metric("fumi_edge_bytes_total", direction="out") == len(banner) + len(b"221 2.0.0 bye\r\n")
    cipher = program.events("connection ended")[0]["cipher"]
    assert program.metric("fumi_edge_tls_sessions_total", version="TLSv1.3", cipher=cipher, resumed="false") == 1
    assert program.metric("fumi_edge_certificate_not_after_timestamp_seconds", name="localhost") > 1.7e9
    after = {line.rpartition(" ")[0] for line in program.fetch("/metrics")[1].splitlines() if not line.startswith("#")}
    assert before == after  # nothing a client did has made a new series


def test_a_connection_that_lasts_counts_its_bytes_meanwhile(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    program = edge("--idle-timeout", "4", backend=backend())
    client = clients.tls(program.tls_port)
    client.line()
    client.ask(b"NOOP\r\n")
    until(lambda: program.metric("fumi_edge_bytes_total", direction="in") == 6, "the bytes")


def test_ready_means_that_a_backend_answers(backend: StartBackend, edge: StartEdge) -> None:
    server = backend()
    program = edge(backend=server)
    assert program.fetch("/healthz") == (200, "ok\n")
    assert program.fetch("/readyz") == (200, "ready\n")
    server.close()
    status, text = program.fetch("/readyz")
    assert status == 503
    assert server.address in text
    assert program.fetch("/healthz")[0] == 200


def test_a_listening_socket_may_be_a_unix_socket(backend: StartBackend, edge: StartEdge, tmp_path: Path) -> None:
    server = backend()
    path = str(tmp_path / "edge.sock")
    edge("--starttls-listen", f"unix:{path}", backend=server)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        client = Peer(sock)
        assert client.line() == b"220 backend.test ESMTP\r\n"
        assert server.peer().header.transport == "UNIX"
        assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_unix_sockets_get_the_requested_mode(backend: StartBackend, edge: StartEdge, tmp_path: Path, workers: str) -> None:
    paths = [tmp_path / name for name in ("a.sock", "b.sock")]
    listeners = ("--starttls-listen", f"unix:{paths[0]}", "--listen", f"unix:{paths[1]}")
    edge(*listeners, "--socket-mode", "0622", "--workers", workers, backend=backend())
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [0o622, 0o622]


def test_a_client_that_vanishes_at_every_step_leaves_no_trace(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    program = edge("--log-level", "debug", backend=backend())

    def vanish(step: int) -> None:
        client = clients.plain(program.starttls_port)
        if step > 0:
            client.line()
        if step > 1:
            client.say(b"EHLO x\r\n")
        if step > 2:
            client.reply()
            client.say(b"STARTTLS\r\n")
        if step > 3:
            client.reply()
            client = clients.upgrade(client)
        if step > 4:
            client.ask(b"NOOP\r\n")
        client.reset() if step % 2 else client.close()

    threads = [threading.Thread(target=vanish, args=(step,)) for step in range(6) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    program.ended(30)
    until(lambda: program.metric("fumi_edge_connections_active", listener=f"127.0.0.1:{program.starttls_port}") == 0, "the end")
