"""What happens to a TLS terminator in its life, after the scenarios that ghostunnel's integration suite names for a server.

| scenario | where |
| --- | --- |
| half-close, backend first | test_stream_ends: test_a_backend_that_ends_its_side_still_gets_what_the_client_sends |
| half-close, client first | test_stream_ends: test_a_client_that_ends_its_side_still_gets_the_replies |
| half-close by close_notify | test_stream_ends: test_a_close_notify_ends_the_clients_side_only |
| half-close that goes on | test_stream_ends: test_a_client_that_uploads_slowly_to_a_half_closed_backend_is_not_cut_off |
| half-close on Unix sockets | here: test_unix_sockets_on_both_sides_carry_tls_and_every_end |
| abortive close of an idle client | test_stream_ends: test_a_client_that_resets_resets_the_connection_to_the_backend |
| abortive close at every step | test_program: test_a_client_that_vanishes_at_every_step_leaves_no_trace |
| connection churn | here: test_hundreds_of_short_connections_leave_no_descriptor |
| connection churn, ports | test_backend_endings: test_hundreds_of_short_connections_use_up_no_ports |
| concurrent connections | test_tunnel: test_two_hundred_connections_at_once_do_not_mix_their_bytes |
| full duplex, large transfer | test_tunnel: test_every_byte_arrives_in_order_in_both_directions_at_once |
| slow client | here: test_a_client_that_reads_a_byte_at_a_time_gets_all_and_costs_no_memory |
| slow backend | test_tunnel: test_memory_stays_small_behind_a_backend_that_stalls |
| backend flapping | test_backends: test_a_backend_that_goes_down_and_up_affects_no_client |
| no backend | test_implicit_tls: test_without_a_backend_the_client_gets_421_over_tls_and_a_clean_close |
| reload | test_reload: test_sighup_puts_new_certificates_into_service_and_drops_no_connection |
| reload by itself | test_reload: test_a_change_is_noticed_without_a_signal |
| reload of a broken certificate | test_reload_faults: test_a_bad_file_leaves_the_old_certificate_in_service |
| reload of the client authorities | test_client_certificates: test_new_client_cas_are_used_after_the_next_reload |
| accept errors | test_descriptors: test_running_out_of_descriptors_is_survived |
| connect errors of our own | test_descriptors: test_running_out_of_descriptors_is_not_the_backends_fault |
| idle timeout | test_tunnel: test_silence_ends_at_the_idle_timeout |
| shutdown, drain | test_program: test_a_signal_stops_accepting_and_drains_connections |
| shutdown, queue | test_abuse: test_connections_that_wait_in_the_queue_at_sigterm_are_served |
| shutdown, timeout | test_program: test_connections_open_after_the_drain_timeout_are_closed |
| shutdown, second signal | here: test_a_second_signal_ends_a_drain_at_once |
| shutdown, everywhere | here: test_a_shutdown_meets_connections_at_every_step |
| port conflict, invalid flags | test_settings: test_a_wrong_setting_is_one_line_and_status_2 |
| Unix socket to listen on | test_program: test_a_listening_socket_may_be_a_unix_socket |
| Unix socket as backend | test_tunnel: test_a_unix_socket_serves_as_backend |
| socket activation | here: test_an_inherited_socket_loses_no_client_while_the_edge_restarts |
| socket activation, errors | here: test_what_is_inherited_and_no_listening_socket_is_one_line |
"""

from __future__ import annotations

import contextlib
import random
import re
import resource
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import TextIO

import pytest

from tests.edge.backends import StartBackend
from tests.edge.clients import Clients
from tests.edge.metrics import gone
from tests.edge.program import Program, StartEdge
from tests.support.certificates import CertificateFiles
from tests.support.peer import Peer
from tests.support.starter import BIN
from tests.support.waiting import until


def test_every_test_named_above_is_there() -> None:
    rows = re.findall(r"\| (\w+): (test_\w+) \|$", __doc__, re.MULTILINE)
    assert len(rows) > 30
    for module, name in rows:
        path = Path(__file__) if module == "here" else Path(__file__).with_name(f"{module}.py")
        assert f"\ndef {name}(" in path.read_text(), name


# Ends


def test_unix_sockets_on_both_sides_carry_tls_and_every_end(
    backend: StartBackend, edge: StartEdge, clients: Clients, tmp_path: Path
) -> None:
    heard = []

    def handler(peer: Peer) -> None:
        peer.say(b"220 hello\r\n")
        heard.append(peer.rest())
        peer.say(b"%d\r\n" % len(heard[0]))

    server = backend(handler, path=str(tmp_path / "backend"))
    program = edge("--listen", f"unix:{tmp_path / 'tls'}", "--starttls-listen", f"unix:{tmp_path / 'starttls'}", backend=server)
    with contextlib.ExitStack() as sockets:
        for name in ("tls", "starttls"):
            sock = sockets.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(tmp_path / name))
            client = Peer(sock)
            if name == "starttls":
                assert client.line() == b"220 hello\r\n"
                assert client.ask(b"STARTTLS\r\n") == [b"220 2.0.0 Ready to start TLS\r\n"]
            client = clients.upgrade(client)
            if name == "tls":
                assert client.line() == b"220 hello\r\n"
            client.say(b"x" * 500_000)
            client.end()
            # With ragged ends not suppressed, this is a close_notify.
            assert client.rest() == b"500000\r\n"
            told = server.peers[-1]
            assert (told.header.transport, told.client_tls.version) == ("UNIX", "TLSv1.3")
    assert {(entry["client_ip"], entry["reason"]) for entry in program.ended(2)} == {("unix", "client_closed")}


# Numbers, and slowness


def test_hundreds_of_short_connections_leave_no_descriptor(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    """Whatever becomes of them: by TLS, upgraded, in plaintext, broken off in the handshake, turned away."""
    program = edge("--health-interval", "0.05", "--log-level", "debug", backend=backend())

    def over_tls() -> Peer:
        client = clients.tls(program.tls_port)
        client.line()
        client.ask(b"QUIT\r\n")
        return client

    def upgraded() -> Peer:
        client = clients.plain(program.starttls_port)
        client.line()
        client.ask(b"STARTTLS\r\n")
        client = clients.upgrade(client)
        client.ask(b"QUIT\r\n")
        return client

    def in_plaintext() -> Peer:
        client = clients.plain(program.starttls_port)
        client.line()
        client.ask(b"QUIT\r\n")
        return client

    def not_tls() -> Peer:
        client = clients.plain(program.tls_port)
        client.say(b"EHLO me\r\n")
        return client

    def injected() -> Peer:
        client = clients.plain(program.starttls_port)
        client.line()
        client.say(b"STARTTLS\r\nEHLO me\r\n")
        return client

    def silent() -> Peer:
        return clients.plain(program.tls_port)

    ways = (over_tls, upgraded, in_plaintext, not_tls, injected, silent)
    for way in ways:
        way().close()
    program.ended(len(ways))
    until(lambda: program.metric("fumi_edge_backend_up") == 1, "the checks")
    before = until(lambda: quiet(program), "a moment's rest")

    def come(seed: int) -> None:
        numbers = random.Random(seed)
        for _ in range(100):
            client = numbers.choice(ways)()
            client.reset() if numbers.random() < 0.3 else client.close()

    threads = [threading.Thread(target=come, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(program.ended(600 + len(ways))) == 600 + len(ways)
    # A check may be under way at either look.
    until(lambda: program.descriptors() <= before, "the end of the last socket")
    for port in (program.tls_port, program.starttls_port):
        gone(program, f"127.0.0.1:{port}")


def quiet(program: Program) -> int:
    """The fewest descriptors seen in a while; 0, which is no answer, as long as connections are open."""
    if program.metric("fumi_edge_connections_active") > 0:
        return 0
    return min(program.descriptors() for _ in range(500))


@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plaintext"])
def test_a_client_that_reads_a_byte_at_a_time_gets_all_and_costs_no_memory(
    backend: StartBackend, edge: StartEdge, clients: Clients, tls: bool
) -> None:
    size = 64 << 20
    sent = []

    def handler(peer: Peer) -> None:
        peer.say(b"220 hello\r\n")
        peer.line()
        for _ in range(size >> 20):
            peer.sock.sendall(bytes(1 << 20))
            sent.append(1 << 20)

    program = edge(backend=backend(handler))
    client = (clients.tls if tls else clients.plain)(program.tls_port if tls else program.starttls_port, buffer=4096)
    client.line()
    before = program.memory()
    client.say(b"GO\r\n" if tls else b"BDAT 0\r\n")
    for _ in range(20_000):
        assert client.sock.recv(1) == b"\0"
    # What the backend could not get rid of is in the kernel's buffers, and not in ours.
    assert sum(sent) < size
    assert program.memory() - before < 5 << 20
    left = size - 20_000
    while left:
        got = len(client.sock.recv(1 << 16))
        assert got, f"the end {left} bytes too early"
        left -= got
    assert program.memory() - before < 5 << 20


# Stopping and starting


def test_a_second_signal_ends_a_drain_at_once(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    program = edge("--drain-timeout", "600", backend=backend())
    client = clients.tls(program.tls_port)
    client.line()
    program.process.send_signal(signal.SIGTERM)
    until(lambda: program.events("draining"), "the drain")
    assert client.ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    assert program.stop(signal.SIGINT) == 128 + signal.SIGINT
    with contextlib.suppress(OSError):
        assert client.rest() == b""


def test_a_shutdown_meets_connections_at_every_step(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    """Silent, before STARTTLS, behind its 220, in the handshake, or talking: all get their end."""
    silent = threading.Event()
    program = edge("--drain-timeout", "0.3", "--accept-proxy", backend=backend())
    held = backend(lambda peer: silent.wait(30))
    other = edge("--drain-timeout", "0.3", backend=held)
    header = b"PROXY TCP4 192.0.2.1 192.0.2.2 7 25\r\n"
    peers = []
    for commands in ((), (b"EHLO me\r\n",), (b"STARTTLS\r\n",), (b"STARTTLS\r\n", b"\x16\x03\x01")):
        client = clients.plain(program.starttls_port)
        client.say(header)
        client.line()
        for command in commands:
            client.say(command)
            if command.endswith(b"\n"):
                client.reply()
        peers.append(client)
    # Late, for whoever has not sent a header in time is given up.
    peers += [clients.plain(program.tls_port), clients.plain(program.starttls_port)]
    client = clients.plain(program.tls_port)
    client.say(header)
    client = clients.upgrade(client)
    client.line()
    peers.append(client)
    waiting = clients.plain(other.starttls_port)
    held.peer()
    for each, count in ((program, 7), (other, 1)):
        assert each.stop() == 0
        assert len(each.ended(count)) == count
        assert {entry["reason"] for entry in each.ended(count)} == {"shutdown"}
    told = []
    for client in (*peers, waiting):
        with contextlib.suppress(ConnectionResetError):
            told.append(client.rest())
    # Three are in plaintext, and SMTP has a word for that; one of them has not had a banner.
    assert told == [*[b"421 4.3.2 Service shutting down, closing connection\r\n"] * 2, b"", b"", b"", b"", b"", told[0]]
    silent.set()


def test_an_inherited_socket_loses_no_client_while_the_edge_restarts(
    backend: StartBackend, edge: StartEdge, clients: Clients
) -> None:
    """The test is the service manager: it holds both listening sockets, and those who come meanwhile wait in their queue."""
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        ports = [each.getsockname()[1] for each in (first, second)]
        early = clients.plain(ports[1])

        def start() -> Program:
            flags = ["--listen", f"fd:{first.fileno()}", "--starttls-listen", f"fd:{second.fileno()}"]
            return edge(*flags, backend=server, inherited=[first.fileno(), second.fileno()])

        server = backend()
        program = start()
        assert early.line() == b"220 backend.test ESMTP\r\n"
        staying = clients.tls(ports[0])
        staying.line()
        program.process.send_signal(signal.SIGTERM)
        until(lambda: program.events("draining"), "the drain")
        between = clients.plain(ports[1])
        for client in (staying, early):
            assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
            client.rest()
            client.close()
        assert program.process.wait(30) == 0
        program = start()
        assert between.line() == b"220 backend.test ESMTP\r\n"
        assert clients.tls(ports[0]).line() == b"220 backend.test ESMTP\r\n"
        names = {f"fd:{first.fileno()}", f"fd:{second.fileno()}"}
        assert {entry["listener"] for entry in program.events("listening")} >= names
        assert program.metric("fumi_edge_connections_total", listener=f"fd:{second.fileno()}") == 1


def test_an_inherited_abstract_unix_socket_is_listened_on(backend: StartBackend, edge: StartEdge) -> None:
    """systemd's ListenStream=@name."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("")  # the kernel chooses the name
        listening.listen()
        program = edge("--starttls-listen", f"fd:{listening.fileno()}", backend=backend(), inherited=[listening.fileno()])
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(listening.getsockname())
            client = Peer(sock)
            assert client.line() == b"220 backend.test ESMTP\r\n"
            assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
        assert program.ended()[0]["listener"] == f"fd:{listening.fileno()}"


def test_the_edge_stops_while_accepting_pauses_for_lack_of_descriptors(
    backend: StartBackend, edge: StartEdge, clients: Clients
) -> None:
    program = edge("--drain-timeout", "0.2", backend=backend())
    resource.prlimit(program.process.pid, resource.RLIMIT_NOFILE, (program.descriptors() + 6,) * 2)
    for _ in range(20):
        clients.plain(program.tls_port)
    until(lambda: program.events("cannot accept, pausing"), "the pause")
    assert program.stop() == 0


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [("file", "is not an open socket"), ("connected", "is not a listening socket"), ("datagram", "is not a listening socket")],
)
def test_what_is_inherited_and_no_listening_socket_is_one_line(
    certificate: CertificateFiles, tmp_path: Path, kind: str, complaint: str
) -> None:
    with contextlib.ExitStack() as things:
        thing: socket.socket | TextIO
        if kind == "file":
            thing = things.enter_context((tmp_path / "file").open("w"))
        elif kind == "connected":
            thing, other = (things.enter_context(each) for each in socket.socketpair())
            assert other
        else:
            thing = things.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        command: list[str | Path] = [BIN / "fumi-edge", "--cert", certificate[0], "--key", certificate[1]]
        command += ["--backend", "127.0.0.1:9", "--listen", f"fd:{thing.fileno()}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, pass_fds=[thing.fileno()])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert complaint in done.stderr
