"""Health checks of backends: what is sent and expected, what marks a backend down, and what the log and readiness say of it."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fumi_core.proxy_protocol import ProxyHeader
from fumi_edge.backends import health
from fumi_edge.backends.addresses import BackendAddress
from fumi_edge.backends.dialing import Remote
from fumi_edge.backends.settings import BackendSettings
from tests.edge.backends import Flapping, StartBackend, backend_flags, counts, smtp
from tests.edge.clients import Clients
from tests.edge.metrics import await_backend, errors, up
from tests.edge.program import Program, StartEdge
from tests.support.certificates import CertificateFiles
from tests.support.peer import Peer
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.status_page import read_page
from tests.support.waiting import until

CORE = Path(sys.executable).with_name("fumi-core")


def test_a_check_says_local_and_quit_and_is_no_client(backend: StartBackend, edge: StartEdge) -> None:
    heard = []

    def handler(peer: Peer) -> None:
        peer.say(b"220-backend.test\r\n")
        peer.say(b"220 ESMTP\r\n")
        heard.append((peer.header.version, peer.header.command, peer.header.tls, peer.line()))

    program = edge("--health-interval", "0.05", backend=backend(handler))
    until(lambda: program.fetch("/readyz")[0] == 200, "readiness")
    program.stop()
    assert set(heard) == {(2, "LOCAL", None, b"QUIT\r\n")}
    assert program.events("connection ended") == []


@pytest.mark.parametrize("interval", ["30", "0"], ids=["by the clock", "when asked"])
@pytest.mark.parametrize("version", ["v1", "off"])
def test_a_check_without_version_2_names_its_own_connection_or_nothing(
    backend: StartBackend, edge: StartEdge, version: str, interval: str
) -> None:
    """Version 1 has none that servers take: a check names its own connection, as HAProxy's do."""
    heard, wanted = [], []

    def handler(peer: Peer) -> None:
        if version == "v1":
            wanted.append(named_in_version_1(peer))
            heard.append(peer.line())
        peer.say(b"220 hi\r\n")
        heard.append(peer.line())

    server = backend(handler, proxy=False)
    program = edge("--health-interval", interval, "--proxy-protocol", version, backend=server)
    until(lambda: program.fetch("/readyz")[0] == 200, "readiness")
    until(lambda: heard[-1:] == [b"QUIT\r\n"], "the check")
    assert heard[: len(wanted[:1]) + 1] == [*wanted[:1], b"QUIT\r\n"]


def named_in_version_1(peer: Peer) -> bytes:
    """The header that names the connection's own addresses."""
    client, server = peer.sock.getpeername(), peer.sock.getsockname()
    return f"PROXY TCP4 {client[0]} {server[0]} {client[1]} {server[1]}\r\n".encode()


def test_a_balancers_own_check_is_accepted_by_a_backend_with_version_1(
    backend: StartBackend, edge: StartEdge, clients: Clients
) -> None:
    """It comes in as LOCAL, for which version 1 has no word that servers take."""
    heard = []

    def handler(peer: Peer) -> None:
        heard.append(peer.line() == named_in_version_1(peer))
        peer.say(b"220 hi\r\n")
        peer.line()

    program = edge("--proxy-protocol", "v1", "--accept-proxy", backend=backend(handler, proxy=False))
    client = clients.plain(program.starttls_port)
    client.say(ProxyHeader(2, "LOCAL").to_bytes())
    assert client.line() == b"220 hi\r\n"
    assert heard == [True]


def test_a_backend_that_is_slow_to_greet_is_up(backend: StartBackend, edge: StartEdge) -> None:
    """The time to connect is not the time for the banner: postscreen takes six seconds for that."""
    go = threading.Event()

    def handler(peer: Peer) -> None:
        peer.say(b"220-wait\r\n")
        go.wait(20)
        smtp(peer)

    server = backend(handler)
    program = edge("--health-interval", "0.05", "--connect-timeout", "0.2", backend=server)
    threading.Timer(0.6, go.set).start()
    until(lambda: program.fetch("/readyz")[0] == 200, "readiness")
    assert errors(program, server, "banner") == 0


@pytest.mark.parametrize("interval", ["0.05", "0"], ids=["by the clock", "when asked"])
def test_a_backend_that_does_not_greet_within_the_health_timeout_is_down(
    backend: StartBackend, edge: StartEdge, interval: str
) -> None:
    server = backend(lambda peer: peer.rest())
    program = edge("--health-interval", interval, "--health-timeout", "0.2", backend=server)
    said = f"backend {server.address}: sent no banner within 0.2 s\n"
    until(lambda: program.fetch("/readyz") == (503, said), "the fall")


def silent(backend: StartBackend) -> BackendSettings:
    """A backend that is never given up, and says nothing."""
    host, _, port = backend(lambda peer: peer.rest()).address.rpartition(":")
    return BackendSettings((Remote(BackendAddress("tcp", host=host, port=int(port))),), health_interval=0, health_timeout=3600)


def test_readiness_names_a_backend_that_has_not_answered_yet(backend: StartBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "ANSWER_SECONDS", 0.05)
    pool = silent(backend)
    assert health.pool_problems([pool]) == [f"backend {pool.destinations[0].name}: no answer yet after 0.05 s"]


@pytest.mark.long
def test_readiness_is_answered_in_time_whatever_the_health_timeout(backend: StartBackend, edge: StartEdge) -> None:
    server = backend(lambda peer: peer.rest())
    program = edge("--health-interval", "0", "--health-timeout", "3600", backend=server)
    assert program.fetch("/readyz") == (503, f"backend {server.address}: no answer yet after 8 s\n")
    page, _ = read_page(program.metrics_port)
    assert [each for each in page.words if "no answer from the backends within 6 s" in each]


def test_one_backend_that_greets_is_enough_however_long_another_takes(backend: StartBackend, edge: StartEdge) -> None:
    hung, well = backend(lambda peer: peer.rest()), backend()
    program = edge("--health-timeout", "3600", *backend_flags(well), backend=hung)
    assert program.fetch("/readyz") == (200, "ready\n")


def test_the_cores_log_says_nothing_of_checks(certificate: CertificateFiles, edge: StartEdge, programs: Programs) -> None:
    core, metrics = free_port(), free_port()
    command = (
        CORE,
        "--listen",
        f"127.0.0.1:{core}",
        "--metrics",
        f"127.0.0.1:{metrics}",
        "--deliver",
        "discard:",
        "--name",
        "mx.test",
    )
    programs.start(*command, port=core, log="core.log")
    program = edge("--health-interval", "0.05", backend=f"127.0.0.1:{core}")
    until(lambda: program.fetch("/readyz")[0] == 200, "readiness")
    until(lambda: quits(metrics) >= 5, "five checks")
    log = (programs.directory / "core.log").read_text()
    assert "session" not in log
    assert "WARN" not in log
    assert program.events("backend down") == []


def quits(port: int) -> float:
    """How often the core has received QUIT."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
    return float(next(line.split()[-1] for line in text.splitlines() if 'commands_total{command="QUIT"}' in line))


def test_backend_up_and_readiness_follow_the_checks(backend: StartBackend, edge: StartEdge) -> None:
    flapping = Flapping()
    program = edge("--health-interval", "0.05", backend=flapping.address)
    await_backend(program, flapping, 0)
    status, text = program.fetch("/readyz")
    assert (status, text) == (503, f"backend {flapping.address}: Connection refused\n")
    for _ in range(2):
        flapping.appear()
        await_backend(program, flapping, 1)
        assert program.fetch("/readyz") == (200, "ready\n")
        flapping.vanish()
        await_backend(program, flapping, 0)
        assert program.fetch("/readyz")[0] == 503
    assert errors(program, flapping, "refused") >= 3
    # One line for each change.
    until(lambda: len(program.events("backend down")) >= 3, "the last line in the log")
    assert len(program.events("backend down")) == 3
    assert len(program.events("backend up")) == 2


@pytest.mark.parametrize("interval", ["0", "0.05"])
def test_when_all_backends_are_down_readiness_names_each(interval: str, edge: StartEdge, tmp_path: Path) -> None:
    sock = f"unix:{tmp_path}/nobody"
    program = edge("--health-interval", interval, "--backend", "127.0.0.1:9", backend=sock)
    wanted = f"backend {sock}: No such file or directory; backend 127.0.0.1:9: Connection refused\n"
    until(lambda: program.fetch("/readyz") == (503, wanted), "the checks")


def test_a_backend_with_another_banner_than_220_gets_no_clients(
    backend: StartBackend, edge: StartEdge, served: Callable[[Program], None]
) -> None:
    """Connecting to it works, and still nothing but the checks brings it back."""
    answers = [b"421 4.3.2 draining\r\n"]

    def handler(peer: Peer) -> None:
        peer.say(answers[0])
        peer.heard = []
        if answers[0].startswith(b"220"):
            peer.line()
            peer.say(b"221 2.0.0 bye\r\n")

    sick, well = backend(handler), backend()
    program = edge("--health-interval", "0.05", "--balance", "first", *backend_flags(well), backend=sick)
    await_backend(program, sick, 0)
    for _ in range(5):
        served(program)
    assert counts(sick, well) == [0, 5]
    until(lambda: program.fetch("/readyz")[0] == 200, "readiness")
    assert errors(program, sick, "banner") >= 1
    answers[0] = b"220 again\r\n"
    await_backend(program, sick, 1)
    served(program)
    assert counts(sick, well) == [1, 5]


IGNORANT = "if it does not know the PROXY protocol, use --proxy-protocol off"


@pytest.mark.parametrize(
    ("version", "answers", "words"),
    [
        ("v2", b"500 5.5.2 Error: bad syntax\r\n221 2.0.0 Bye\r\n", "the PROXY header; " + IGNORANT),
        ("v1", b"502 5.5.2 Error: command not recognized\r\n", "the PROXY header; " + IGNORANT),
        ("off", b"421 4.3.2 shutting down\r\n", "QUIT"),
    ],
)
@pytest.mark.parametrize("together", [True, False], ids=["together", "apart"])
def test_a_backend_that_answers_header_or_quit_with_an_error_is_down(
    backend: StartBackend, edge: StartEdge, version: str, answers: bytes, words: str, together: bool
) -> None:
    """It greets, as one that knows no PROXY protocol does; and no client could talk to it."""

    def handler(peer: Peer) -> None:
        peer.say(b"220 hi\r\n" + (answers if together else b""))
        while b"QUIT\r\n" not in (line := peer.line()):
            if not line:
                return  # the edge has been stopped
        peer.say(b"221 bye\r\n" if together else answers)

    server = backend(handler, proxy=False)
    program = edge("--health-interval", "0.05", "--proxy-protocol", version, backend=server)
    await_backend(program, server, 0)
    detail = f"answered {answers.split(bytes((13,)))[0].decode()!r} to {words}"
    assert program.fetch("/readyz") == (503, f"backend {server.address}: {detail}\n")
    assert errors(program, server, "banner") >= 1
    (failed,) = until(lambda: program.events("backend down"), "the line in the log")
    assert (failed["reason"], failed["error"]) == ("banner", detail)


def test_a_backend_that_waits_for_a_header_that_is_off_is_reported(backend: StartBackend, edge: StartEdge) -> None:
    server = backend(lambda peer: peer.rest(), proxy=False)
    program = edge("--health-interval", "0.05", "--health-timeout", "0.1", "--proxy-protocol", "off", backend=server)
    await_backend(program, server, 0)
    assert program.fetch("/readyz")[1].endswith(": sent no banner within 0.1 s; it may be waiting for a PROXY header\n")


def test_when_all_are_down_they_are_tried_all_the_same(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    """Between two checks a backend may have come back; and its own words are better than ours."""

    def handler(peer: Peer) -> None:
        peer.say(b"421 4.3.2 draining\r\n")

    servers = [backend(handler), backend(handler)]
    program = edge("--health-interval", "0.05", *backend_flags(servers[1]), backend=servers[0])
    for server in servers:
        await_backend(program, server, 0)
    assert clients.tls(program.tls_port).rest() == b"421 4.3.2 draining\r\n"
    assert [up(program, server) for server in servers] == [0, 0]
    assert program.events("backend up") == []


def test_checks_that_hang_delay_no_client(edge: StartEdge, clients: Clients, backend: StartBackend) -> None:
    """A backend that accepts and says nothing is down; clients go to the other."""

    def handler(peer: Peer) -> None:
        peer.rest()

    hung, well = backend(handler), backend()
    # So long a timeout that the other one answers in time, however busy this machine is.
    hanging = ("--health-interval", "0.05", "--health-timeout", "2", "--balance", "first")
    program = edge(*hanging, *backend_flags(well), backend=hung)
    await_backend(program, hung, 0)
    assert clients.tls(program.tls_port).line().startswith(b"220")
    assert hung.peers == []
