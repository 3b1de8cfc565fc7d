"""Health checks of backends: what is sent and expected, what marks a backend down, and what the log and readiness say of it."""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path

import pytest

from fumi_core.proxy_protocol import ProxyHeader
from tests.edge.backends import Flapping, backend_flags, counts, smtp
from tests.edge.metrics import errors, up
from tests.support.ports import free_port
from tests.support.waiting import until

CORE = Path(sys.executable).with_name("fumi-core")


def test_a_check_says_local_and_quit_and_is_no_client(backend, edge):
    heard = []

    def handler(peer):
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
def test_a_check_says_what_the_protocol_has_words_for(backend, edge, version, interval):
    """Version 1 has none that servers take: a check names its own connection, as HAProxy's do."""
    heard, wanted = [], []

    def handler(peer):
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


def named_in_version_1(peer):
    """The header that names the connection's own addresses."""
    client, server = peer.sock.getpeername(), peer.sock.getsockname()
    return f"PROXY TCP4 {client[0]} {server[0]} {client[1]} {server[1]}\r\n".encode()


def test_a_balancers_own_check_is_one_that_a_backend_of_version_1_takes(backend, edge, clients):
    """It comes in as LOCAL, for which version 1 has no word that servers take."""
    heard = []

    def handler(peer):
        heard.append(peer.line() == named_in_version_1(peer))
        peer.say(b"220 hi\r\n")
        peer.line()

    program = edge("--proxy-protocol", "v1", "--accept-proxy", backend=backend(handler, proxy=False))
    client = clients.plain(program.starttls_port)
    client.say(ProxyHeader(2, "LOCAL").to_bytes())
    assert client.line() == b"220 hi\r\n"
    assert heard == [True]


def test_a_backend_that_is_slow_to_greet_is_up(backend, edge):
    """The time to connect is not the time for the banner: postscreen takes six seconds for that."""
    go = threading.Event()

    def handler(peer):
        peer.say(b"220-wait\r\n")
        go.wait(20)
        smtp(peer)

    server = backend(handler)
    program = edge("--health-interval", "0.05", "--connect-timeout", "0.2", backend=server)
    threading.Timer(0.6, go.set).start()
    until(lambda: program.fetch("/readyz")[0] == 200, "readiness")
    assert errors(program, server, "banner") == 0


@pytest.mark.parametrize("interval", ["0.05", "0"], ids=["by the clock", "when asked"])
def test_a_backend_that_does_not_greet_within_the_health_timeout_is_down(backend, edge, interval):
    server = backend(lambda peer: peer.rest())
    program = edge("--health-interval", interval, "--health-timeout", "0.2", backend=server)
    said = f"backend {server.address}: did not greet within 0.2 s\n"
    until(lambda: program.fetch("/readyz") == (503, said), "the fall")


def test_one_backend_that_greets_is_enough_however_long_another_takes(backend, edge):
    hung, well = backend(lambda peer: peer.rest()), backend()
    program = edge("--health-timeout", "3600", *backend_flags(well), backend=hung)
    assert program.fetch("/readyz") == (200, "ready\n")


def test_the_cores_log_says_nothing_of_checks(certificate, edge, programs):
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


def quits(port):
    """How often the core has been told QUIT."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = b"".join(iter(lambda: sock.recv(65536), b"")).decode()
    return float(next(line.split()[-1] for line in text.splitlines() if 'commands_total{command="QUIT"}' in line))


def test_backend_up_and_readiness_follow_the_checks(backend, edge):
    flapping = Flapping()
    program = edge("--health-interval", "0.05", backend=flapping)
    until(lambda: up(program, flapping) == 0, "the fall")
    status, text = program.fetch("/readyz")
    assert (status, text) == (503, f"backend {flapping.address}: Connection refused\n")
    for _ in range(2):
        flapping.appear()
        until(lambda: up(program, flapping) == 1, "the rise")
        assert program.fetch("/readyz") == (200, "ready\n")
        flapping.vanish()
        until(lambda: up(program, flapping) == 0, "the fall")
        assert program.fetch("/readyz")[0] == 503
    assert errors(program, flapping, "refused") >= 3
    # One line for each change.
    until(lambda: len(program.events("backend down")) >= 3, "the last line in the log")
    assert len(program.events("backend down")) == 3
    assert len(program.events("backend up")) == 2


def test_a_backend_that_greets_with_something_else_gets_nobody(backend, edge, served):
    """Connecting to it works, and still nothing but the checks brings it back."""
    answers = [b"421 4.3.2 draining\r\n"]

    def handler(peer):
        peer.say(answers[0])
        peer.heard = []
        if answers[0].startswith(b"220"):
            peer.line()
            peer.say(b"221 2.0.0 bye\r\n")

    sick, well = backend(handler), backend()
    program = edge("--health-interval", "0.05", "--balance", "first", *backend_flags(well), backend=sick)
    until(lambda: up(program, sick) == 0, "the fall")
    for _ in range(5):
        served(program)
    assert counts(sick, well) == [0, 5]
    until(lambda: program.fetch("/readyz")[0] == 200, "readiness")
    assert errors(program, sick, "banner") >= 1
    answers[0] = b"220 again\r\n"
    until(lambda: up(program, sick) == 1, "the rise")
    served(program)
    assert counts(sick, well) == [1, 5]


IGNORANT = "does it know the PROXY protocol? else --proxy-protocol off"


@pytest.mark.parametrize(
    ("version", "answers", "words"),
    [
        ("v2", b"500 5.5.2 Error: bad syntax\r\n221 2.0.0 Bye\r\n", "the PROXY header; " + IGNORANT),
        ("v1", b"502 5.5.2 Error: command not recognized\r\n", "the PROXY header; " + IGNORANT),
        ("off", b"421 4.3.2 shutting down\r\n", "QUIT"),
    ],
)
@pytest.mark.parametrize("together", [True, False], ids=["together", "apart"])
def test_a_backend_that_answers_header_or_quit_with_an_error_is_down(backend, edge, version, answers, words, together):
    """It greets, as one that knows no PROXY protocol does; and no client could talk to it."""

    def handler(peer):
        peer.say(b"220 hi\r\n" + (answers if together else b""))
        while b"QUIT\r\n" not in (line := peer.line()):
            if not line:
                return  # the edge has been stopped
        peer.say(b"221 bye\r\n" if together else answers)

    server = backend(handler, proxy=False)
    program = edge("--health-interval", "0.05", "--proxy-protocol", version, backend=server)
    until(lambda: up(program, server) == 0, "the fall")
    detail = f"answered {answers.split(bytes((13,)))[0].decode()!r} to {words}"
    assert program.fetch("/readyz") == (503, f"backend {server.address}: {detail}\n")
    assert errors(program, server, "banner") >= 1
    (failed,) = until(lambda: program.events("backend down"), "the line in the log")
    assert (failed["reason"], failed["error"]) == ("banner", detail)


def test_a_backend_that_waits_for_a_header_that_is_off_is_said_to(backend, edge):
    server = backend(lambda peer: peer.rest(), proxy=False)
    program = edge("--health-interval", "0.05", "--health-timeout", "0.1", "--proxy-protocol", "off", backend=server)
    until(lambda: up(program, server) == 0, "the fall")
    assert program.fetch("/readyz")[1].endswith(": did not greet within 0.1 s; or it waits for a PROXY header\n")


def test_when_all_are_down_they_are_tried_all_the_same(backend, edge, clients):
    """Between two checks a backend may have come back; and its own words are better than ours."""

    def handler(peer):
        peer.say(b"421 4.3.2 draining\r\n")

    servers = [backend(handler), backend(handler)]
    program = edge("--health-interval", "0.05", *backend_flags(servers[1]), backend=servers[0])
    for server in servers:
        until(lambda server=server: up(program, server) == 0, "the fall")
    assert clients.tls(program.tls_port).rest() == b"421 4.3.2 draining\r\n"
    assert [up(program, server) for server in servers] == [0, 0]
    assert program.events("backend up") == []


def test_checks_that_hang_hold_up_nobody(edge, clients, backend):
    """A backend that accepts and says nothing is down; clients go to the other."""

    def handler(peer):
        peer.rest()

    hung, well = backend(handler), backend()
    # So long a timeout that the other one answers in time, however busy this machine is.
    hanging = ("--health-interval", "0.05", "--health-timeout", "2", "--balance", "first")
    program = edge(*hanging, *backend_flags(well), backend=hung)
    until(lambda: up(program, hung) == 0, "the fall")
    assert clients.tls(program.tls_port).line().startswith(b"220")
    assert hung.peers == []
