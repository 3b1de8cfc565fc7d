"""What a hostile review broke: clients, backends and operators at their worst, each with the fault it once found."""

from __future__ import annotations

import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.edge.backends import StartBackend
from tests.edge.clients import Clients, Dial, Greet
from tests.edge.memory_tls import Engine
from tests.edge.metrics import gone
from tests.edge.program import StartEdge
from tests.support.peer import Peer
from tests.support.waiting import until


@pytest.mark.parametrize("ahead", [b"", b"EHLO ahead\r\n"])
@pytest.mark.parametrize("hang", ["the second banner", "a reply to EHLO", "the first banner"])
def test_a_client_that_resets_while_it_waits_for_a_backend_is_soon_closed(
    backend: StartBackend, edge: StartEdge, clients: Clients, hang: str, ahead: bytes
) -> None:
    waits = []

    def handler(peer: Peer) -> None:
        if hang == "the first banner" or (hang == "the second banner" and peer.header.tls):
            waits.append(peer)
            peer.rest()
        peer.say(b"220 hi\r\n")
        line = peer.line()
        if line.startswith(b"EHLO"):
            waits.append(peer)
        peer.rest()

    program = edge("--log-level", "debug", backend=backend(handler))
    peers = []
    for _ in range(10):
        client = clients.plain(program.starttls_port)
        if hang != "the first banner":
            client.reply()
        if hang == "a reply to EHLO":
            client.say(b"EHLO x\r\nNOOP\r\n")
        elif hang == "the second banner":
            client = clients.starttls(client)
        peers.append(client)
    until(lambda: len(waits) == 10, "the wait")
    for client in peers:
        client.say(ahead)
    for client in peers:
        client.reset()
    gone(program, f"127.0.0.1:{program.starttls_port}")
    assert {entry["reason"] for entry in program.ended(10)} == {"client_reset"}


def test_a_client_that_never_reads_is_disconnected_even_when_the_220_does_not_fit(
    backend: StartBackend, edge: StartEdge, dial: Dial, tmp_path: Path
) -> None:
    def handler(peer: Peer) -> None:
        peer.say(b"220 hi\r\n")
        while line := peer.line():
            peer.say(b"250 " + b"z" * 994 + b"\r\n" if line.startswith(b"NOOP") else b"221 bye\r\n")

    # How many replies of 1000 bytes a socket takes that nobody reads: here, and so there.
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        most = 0
        while most < 100_000:
            try:
                near.send(bytes(1000))
            except BlockingIOError:
                break
            most += 1
    path = tmp_path / "edge.sock"
    program = edge(
        *("--starttls-listen", f"unix:{path}", "--idle-timeout", "0.5", "--handshake-timeout", "0.5"),
        backend=backend(handler, path=str(tmp_path / "backend.sock")),
    )
    counts = range(most - 8, most + 3)
    for count in counts:
        dial(path).say(b"NOOP\r\n" * count + b"STARTTLS\r\n")
    entries = program.ended(len(counts))
    gone(program, f"unix:{path}")
    # Those for whom the 220 did fit have been asked to shake hands.
    assert {entry["reason"] for entry in entries} <= {"idle_timeout", "handshake_timeout"}
    assert "idle_timeout" in {entry["reason"] for entry in entries}


def test_a_plaintext_clients_bytes_are_counted_once(backend: StartBackend, edge: StartEdge, greeted: Greet) -> None:
    program = edge(backend=backend())
    client = greeted(program)
    said = [b"EHLO x\r\n", b"MAIL FROM:<a@b>\r\n", b"RCPT TO:<c@d>\r\n", b"DATA\r\n", b"text\r\n.\r\nQUIT\r\n"]
    for command in said:
        client.ask(command)
    client.rest()
    client.close()
    program.ended()
    # And one whose message comes behind BDAT at once.
    other = greeted(program)
    other.say(b"BDAT 4 LAST\r\ntext")
    other.reply()
    other.reset()
    assert [entry["bytes_in"] for entry in program.ended(2)] == [len(b"".join(said)), 17]
    total = len(b"".join(said)) + 17
    until(lambda: program.metric("fumi_edge_bytes_total", direction="in") == total, "the count")


def test_clients_that_reset_after_the_handshake_affect_no_other_client(edge: StartEdge, clients: Clients) -> None:
    """Their descriptors pass to others. Many dead backends keep the edge busy, so that the reset comes before it has the 421."""
    dead = [f"127.0.0.{number}:9" for number in range(1, 255)]
    program = edge("--handshake-timeout", "20", *(f"--backend={address}" for address in dead[1:]), backend=dead[0])
    peers = [clients.plain(program.tls_port) for _ in range(10)]
    for client, engine in [(client, Engine(client.sock, clients.context())) for client in peers]:
        engine.flush()
        assert client.more()  # the session ticket: the edge has the handshake behind it
        time.sleep(0.002)
        client.reset()
    gone(program, f"127.0.0.1:{program.tls_port}")
    answers: list[bytes | OSError] = []

    def well_behaved() -> None:
        try:
            client = clients.tls(program.tls_port)
            answers.append(client.rest()[:4])
            client.close()
        except OSError as error:
            answers.append(error)

    threads = [threading.Thread(target=well_behaved) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [b"421 "] * 20


def test_connections_that_wait_in_the_queue_at_sigterm_are_served(
    backend: StartBackend, edge: StartEdge, clients: Clients, greeted: Greet, tmp_path: Path
) -> None:
    program = edge("--connect-timeout", "30", backend=backend(path=str(tmp_path / "backend.sock")))
    port = program.starttls_port
    greeted(program).close()
    program.process.send_signal(signal.SIGSTOP)
    peers = [clients.plain(port) for _ in range(200)]
    program.process.send_signal(signal.SIGTERM)
    program.process.send_signal(signal.SIGCONT)
    answers: list[bytes | OSError] = []
    for client in peers:
        try:
            answers.append(client.line()[:3])
        except OSError as error:
            answers.append(error)
        client.close()
    assert answers == [b"220"] * 200
    assert program.process.wait(30) == 0


def test_an_edge_that_drains_is_not_ready(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    program = edge(backend=backend())
    client = clients.tls(program.tls_port)
    client.line()
    assert program.fetch("/readyz")[0] == 200
    program.process.send_signal(signal.SIGTERM)
    until(lambda: program.events("draining"), "the drain")
    assert program.fetch("/readyz")[0] == 503
    assert program.fetch("/healthz")[0] == 200
    assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
    client.close()
    assert program.process.wait(30) == 0
