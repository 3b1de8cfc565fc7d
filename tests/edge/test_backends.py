"""Several backends: which one gets a client, what becomes of those that fail, and that no client is the worse for it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import sys
import threading
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

import fumi_edge.backends.choice
import fumi_edge.backends.dialing
import fumi_edge.backends.health
from fumi_core.proxy_protocol import ProxyHeader
from fumi_core.runtime.addresses import parse_address
from fumi_edge.backends.choice import AVOID, Backends
from fumi_edge.backends.dialing import Remote
from fumi_edge.metrics import EdgeMetrics
from tests.ports import kept_port

CORE = Path(sys.executable).with_name("fumi-core")
READY = [b"220 2.0.0 Ready to start TLS\r\n"]
ENDED = b"421 4.3.2 Service not available, closing connection\r\n"


def flags(*backends):
    return [word for each in backends for word in ("--backend", each.address)]


def up(program, server):
    return program.metric("fumi_edge_backend_up", backend=server.address)


def errors(program, server, reason):
    return program.metric("fumi_edge_backend_errors_total", backend=server.address, reason=reason)


def counts(*servers):
    return [len(each.peers) for each in servers]


@pytest.fixture
def served(clients):
    """One client's session, from the banner to the end."""

    def served(program):
        client = clients.tls(program.tls_port)
        assert client.line().startswith(b"220 ")
        assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
        assert client.rest() == b""
        client.close()

    return served


@pytest.fixture
def silent(backend):
    """A backend that accepts and hangs up; with ``reset`` it breaks off."""

    def silent(reset=False, when=lambda peer: True):
        def handler(peer):
            if when(peer):
                if reset:
                    peer.reset()
                return
            peer.say(b"220 silent.test\r\n")
            while peer.line():
                peer.say(b"250 silent.test\r\n")

        return backend(handler)

    return silent


class Flapping:
    """Stands before a backend, there one moment and gone the next."""

    def __init__(self, kit):
        self._kept = kept_port()
        self.port = self._kept.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self._kit = kit
        self._listening = None

    def appear(self):
        self._listening = socket.create_server(("127.0.0.1", self.port), backlog=64)
        threading.Thread(target=self._accept, args=(self._listening,), daemon=True).start()

    def vanish(self):
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self, listening):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._kit.Peer(listening.accept()[0]),), daemon=True).start()

    def _serve(self, peer):
        peer.heard = []
        with contextlib.suppress(OSError, EOFError):
            peer.take_header()
            self._kit.smtp(peer)
        peer.close()


# Choosing


def test_the_backend_with_the_fewest_connections_is_chosen(backend, edge, clients, kit):
    servers = [backend() for _ in range(3)]
    program = edge(*flags(*servers[1:]), backend=servers[0])
    peers = [clients.tls(program.tls_port) for _ in range(9)]
    for client in peers:
        client.line()
    assert counts(*servers) == [3, 3, 3]
    mine = {peer.header.source[1] for peer in servers[1].peers}
    leaving = [client for client in peers if client.sock.getsockname()[1] in mine]
    for client in leaving:
        client.ask(b"QUIT\r\n")
        client.close()
    program.ended(3)
    for _ in range(3):
        clients.tls(program.tls_port).line()
    assert counts(*servers) == [3, 6, 3]


def test_roundrobin_takes_each_in_turn_but_those_that_are_down(backend, edge, served):
    servers = [backend() for _ in range(3)]
    program = edge("--balance", "roundrobin", *flags(*servers[1:]), backend=servers[0])
    for _ in range(6):
        served(program)
    assert counts(*servers) == [2, 2, 2]
    servers[1].close()
    for _ in range(7):
        served(program)
    assert servers[1].peers[2:] == []
    assert abs(len(servers[0].peers) - len(servers[2].peers)) <= 1
    assert len(servers[0].peers) + len(servers[2].peers) == 11


def test_first_sends_all_to_the_first_that_is_up(backend, edge, served, kit, clients):
    servers = [backend(), backend()]
    program = edge("--balance", "first", *flags(servers[1]), backend=servers[0])
    for _ in range(3):
        served(program)
    assert counts(*servers) == [3, 0]
    servers[0].close()
    for _ in range(3):
        served(program)
    assert counts(*servers) == [3, 3]
    # Once was enough to find out.
    assert errors(program, servers[0], "refused") == 1
    (line,) = kit.until(lambda: program.events("backend down"), "the line")
    assert (line["level"], line["backends_up"]) == ("warning", 1)
    servers[1].close()
    client = clients.tls(program.tls_port)
    assert client.rest().startswith(b"421 4.3.2")
    (_, last) = kit.until(lambda: len(lines := program.events("backend down")) == 2 and lines, "the last one")
    assert (last["level"], last["backend"], last["backends_up"]) == ("error", servers[1].address, 0)


def test_unix_sockets_are_balanced_like_any_other(backend, edge, clients, tmp_path):
    servers = [backend(path=str(tmp_path / name)) for name in ("one.sock", "two.sock")]
    program = edge(*flags(servers[1]), backend=servers[0])
    for _ in range(4):
        clients.tls(program.tls_port).line()
    assert counts(*servers) == [2, 2]


@pytest.mark.parametrize("balance", ["leastconn", "roundrobin"])
def test_after_the_upgrade_the_client_keeps_its_backend(backend, edge, clients, balance):
    servers = [backend(), backend()]
    program = edge("--balance", balance, *flags(servers[1]), backend=servers[0])
    for _ in range(4):
        client = clients.plain(program.starttls_port)
        client.reply()
        assert client.ask(b"STARTTLS\r\n") == READY
        assert clients.upgrade(client).ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    for server in servers:
        ids = [peer.header.unique_id for peer in server.peers]
        assert len(ids) == 4
        assert len(set(ids)) == 2


def test_after_the_upgrade_another_backend_will_do(backend, edge, clients):
    servers = [backend(), backend()]
    program = edge("--balance", "first", *flags(servers[1]), backend=servers[0])
    client = clients.plain(program.starttls_port)
    client.reply()
    assert client.ask(b"STARTTLS\r\n") == READY
    servers[0].close()
    assert clients.upgrade(client).ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    assert counts(*servers) == [1, 1]


# Failing over


@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
def test_a_backend_that_hangs_up_without_a_word_is_passed_over_unnoticed(backend, silent, edge, clients, reset):
    bad, good = silent(reset), backend()
    program = edge("--balance", "first", *flags(good), backend=bad)
    client = clients.tls(program.tls_port)
    assert client.line() == b"220 backend.test ESMTP\r\n"
    assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
    assert client.rest() == b""
    plain = clients.plain(program.starttls_port)
    assert plain.line() == b"220 backend.test ESMTP\r\n"
    assert plain.ask(b"STARTTLS\r\n") == READY
    plain = clients.upgrade(plain)
    assert plain.ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    assert errors(program, bad, "banner") == 2
    # What happened to one client is no verdict on the backend, or a client who is not welcome there could bring it down.
    assert up(program, bad) == 1


@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
def test_a_backend_that_hangs_up_after_the_upgrade_is_replaced_too(backend, silent, edge, clients, reset):
    bad, good = silent(reset, when=lambda peer: peer.header.tls), backend()
    program = edge("--balance", "first", *flags(good), backend=bad)
    client = clients.plain(program.starttls_port)
    assert client.reply() == [b"220 silent.test\r\n"]
    assert client.ask(b"STARTTLS\r\n") == READY
    client = clients.upgrade(client)
    assert client.ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    assert counts(bad, good) == [2, 1]


@pytest.mark.parametrize("reset", [False, True], ids=["close", "reset"])
def test_when_every_backend_hangs_up_it_is_as_if_there_were_none(silent, edge, clients, reset):
    servers = [silent(reset), silent(reset)]
    program = edge(*flags(servers[1]), backend=servers[0])
    assert clients.tls(program.tls_port).rest() == ENDED
    assert clients.plain(program.starttls_port).rest() == ENDED
    assert counts(*servers) == [2, 2]


def test_a_client_that_leaves_before_the_banner_is_not_the_backends_fault(backend, edge, clients):
    def handler(peer):
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


def test_a_client_that_has_spoken_is_not_sent_elsewhere(backend, edge, clients):
    """What it said has gone to one backend, and is not said again to another; it is told."""
    heard = []

    def handler(peer):
        heard.append(peer.line())

    servers = [backend(handler), backend(handler)]
    program = edge(*flags(servers[1]), backend=servers[0])
    client = clients.tls(program.tls_port)
    client.say(b"EHLO early\r\n")
    assert client.rest() == b"421 4.3.2 Service not available, closing connection\r\n"
    client.close()
    assert program.ended()[0]["reason"] == "backend_closed"
    assert heard == [b"EHLO early\r\n"]


def test_a_backend_that_comes_and_goes_harms_nobody(backend, edge, served, kit):
    """Two backends, one of them flapping, with and without checks; every client is served."""
    steady, flapping = backend(), Flapping(kit)
    program = edge("--health-interval", "0.1", "--balance", "roundrobin", *flags(flapping), backend=steady)
    over = threading.Event()

    def flap():
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


# Checks


def test_a_check_says_local_and_quit_and_is_no_client(backend, edge, kit):
    heard = []

    def handler(peer):
        peer.say(b"220-backend.test\r\n")
        peer.say(b"220 ESMTP\r\n")
        heard.append((peer.header.version, peer.header.command, peer.header.tls, peer.line()))

    program = edge("--health-interval", "0.05", backend=backend(handler))
    kit.until(lambda: program.fetch("/readyz")[0] == 200, "readiness")
    program.stop()
    assert set(heard) == {(2, "LOCAL", None, b"QUIT\r\n")}
    assert program.events("connection ended") == []


@pytest.mark.parametrize("interval", ["30", "0"], ids=["by the clock", "when asked"])
@pytest.mark.parametrize("version", ["v1", "off"])
def test_a_check_says_what_the_protocol_has_words_for(backend, edge, kit, version, interval):
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
    kit.until(lambda: program.fetch("/readyz")[0] == 200, "readiness")
    kit.until(lambda: heard[-1:] == [b"QUIT\r\n"], "the check")
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


def test_a_backend_that_is_slow_to_greet_is_up(backend, edge, kit):
    """The time to connect is not the time for the banner: postscreen takes six seconds for that."""
    go = threading.Event()

    def handler(peer):
        peer.say(b"220-wait\r\n")
        go.wait(20)
        kit.smtp(peer)

    server = backend(handler)
    program = edge("--health-interval", "0.05", "--connect-timeout", "0.2", backend=server)
    threading.Timer(0.6, go.set).start()
    kit.until(lambda: program.fetch("/readyz")[0] == 200, "readiness")
    assert errors(program, server, "banner") == 0


@pytest.mark.parametrize("interval", ["0.05", "0"], ids=["by the clock", "when asked"])
def test_a_backend_that_does_not_greet_within_the_health_timeout_is_down(backend, edge, kit, interval):
    server = backend(lambda peer: peer.rest())
    program = edge("--health-interval", interval, "--health-timeout", "0.2", backend=server)
    said = f"backend {server.address}: did not greet within 0.2 s\n"
    kit.until(lambda: program.fetch("/readyz") == (503, said), "the fall")


def test_one_backend_that_greets_is_enough_however_long_another_takes(backend, edge):
    hung, well = backend(lambda peer: peer.rest()), backend()
    program = edge("--health-timeout", "3600", *flags(well), backend=hung)
    assert program.fetch("/readyz") == (200, "ready\n")


def test_the_cores_log_says_nothing_of_checks(certificate, edge, kit, programs):
    core, metrics = programs.free_port(), programs.free_port()
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
    kit.until(lambda: program.fetch("/readyz")[0] == 200, "readiness")
    kit.until(lambda: quits(metrics) >= 5, "five checks")
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


def test_backend_up_and_readiness_follow_the_checks(backend, edge, kit):
    flapping = Flapping(kit)
    program = edge("--health-interval", "0.05", backend=flapping)
    kit.until(lambda: up(program, flapping) == 0, "the fall")
    status, text = program.fetch("/readyz")
    assert (status, text) == (503, f"backend {flapping.address}: Connection refused\n")
    for _ in range(2):
        flapping.appear()
        kit.until(lambda: up(program, flapping) == 1, "the rise")
        assert program.fetch("/readyz") == (200, "ready\n")
        flapping.vanish()
        kit.until(lambda: up(program, flapping) == 0, "the fall")
        assert program.fetch("/readyz")[0] == 503
    assert errors(program, flapping, "refused") >= 3
    # One line for each change.
    kit.until(lambda: len(program.events("backend down")) >= 3, "the last line in the log")
    assert len(program.events("backend down")) == 3
    assert len(program.events("backend up")) == 2


def test_a_backend_that_greets_with_something_else_gets_nobody(backend, edge, served, kit):
    """Connecting to it works, and still nothing but the checks brings it back."""
    answers = [b"421 4.3.2 draining\r\n"]

    def handler(peer):
        peer.say(answers[0])
        peer.heard = []
        if answers[0].startswith(b"220"):
            peer.line()
            peer.say(b"221 2.0.0 bye\r\n")

    sick, well = backend(handler), backend()
    program = edge("--health-interval", "0.05", "--balance", "first", *flags(well), backend=sick)
    kit.until(lambda: up(program, sick) == 0, "the fall")
    for _ in range(5):
        served(program)
    assert counts(sick, well) == [0, 5]
    kit.until(lambda: program.fetch("/readyz")[0] == 200, "readiness")
    assert errors(program, sick, "banner") >= 1
    answers[0] = b"220 again\r\n"
    kit.until(lambda: up(program, sick) == 1, "the rise")
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
def test_a_backend_that_answers_header_or_quit_with_an_error_is_down(backend, edge, kit, version, answers, words, together):
    """It greets, as one that knows no PROXY protocol does; and no client could talk to it."""

    def handler(peer):
        peer.say(b"220 hi\r\n" + (answers if together else b""))
        while b"QUIT\r\n" not in (line := peer.line()):
            if not line:
                return  # the edge has been stopped
        peer.say(b"221 bye\r\n" if together else answers)

    server = backend(handler, proxy=False)
    program = edge("--health-interval", "0.05", "--proxy-protocol", version, backend=server)
    kit.until(lambda: up(program, server) == 0, "the fall")
    detail = f"answered {answers.split(bytes((13,)))[0].decode()!r} to {words}"
    assert program.fetch("/readyz") == (503, f"backend {server.address}: {detail}\n")
    assert errors(program, server, "banner") >= 1
    (failed,) = kit.until(lambda: program.events("backend down"), "the line in the log")
    assert (failed["reason"], failed["error"]) == ("banner", detail)


def test_a_backend_that_waits_for_a_header_that_is_off_is_said_to(backend, edge, kit):
    server = backend(lambda peer: peer.rest(), proxy=False)
    program = edge("--health-interval", "0.05", "--health-timeout", "0.1", "--proxy-protocol", "off", backend=server)
    kit.until(lambda: up(program, server) == 0, "the fall")
    assert program.fetch("/readyz")[1].endswith(": did not greet within 0.1 s; or it waits for a PROXY header\n")


def test_when_all_are_down_they_are_tried_all_the_same(backend, edge, clients, kit):
    """Between two checks a backend may have come back; and its own words are better than ours."""

    def handler(peer):
        peer.say(b"421 4.3.2 draining\r\n")

    servers = [backend(handler), backend(handler)]
    program = edge("--health-interval", "0.05", *flags(servers[1]), backend=servers[0])
    for server in servers:
        kit.until(lambda server=server: up(program, server) == 0, "the fall")
    assert clients.tls(program.tls_port).rest() == b"421 4.3.2 draining\r\n"
    assert [up(program, server) for server in servers] == [0, 0]
    assert program.events("backend up") == []


def test_checks_that_hang_hold_up_nobody(edge, clients, kit, backend):
    """A backend that accepts and says nothing is down; clients go to the other."""

    def handler(peer):
        peer.rest()

    hung, well = backend(handler), backend()
    # So long a timeout that the other one answers in time, however busy this machine is.
    hanging = ("--health-interval", "0.05", "--health-timeout", "2", "--balance", "first")
    program = edge(*hanging, *flags(well), backend=hung)
    kit.until(lambda: up(program, hung) == 0, "the fall")
    assert clients.tls(program.tls_port).line().startswith(b"220")
    assert hung.peers == []


# In one process: what takes too long outside


@pytest.fixture
def pool():
    def pool(*addresses, timeout=20.0, balance="leastconn"):
        metrics = EdgeMetrics(CollectorRegistry(), [], "0")
        return Backends([Remote(parse_address(each)) for each in addresses], timeout, metrics, balance)

    return pool


def test_a_backend_that_failed_is_tried_again_after_a_while_by_one_client_at_a_time(pool):
    backends = pool("127.0.0.1:1", "127.0.0.1:2", balance="first")
    first, second = backends.all
    first.failed(100.0, "refused", "no")
    assert list(backends.candidates(100.0 + AVOID * 0.9)) == [second, first]
    assert list(backends.candidates(100.0 + AVOID)) == [first, second]
    first.trying(100.0 + AVOID)
    assert list(backends.candidates(100.0 + AVOID)) == [second, first]
    first.connected(0.1)
    assert list(backends.candidates(100.0 + AVOID)) == [first, second]


def test_what_the_checks_call_down_does_not_come_back_by_waiting(pool):
    backends = pool("127.0.0.1:1", "127.0.0.1:2", balance="first")
    first, second = backends.all
    first.unhealthy("banner", "554")
    first.connected(0.1)
    assert list(backends.candidates(1e9)) == [second, first]
    first.healthy()
    assert list(backends.candidates(1e9)) == [first, second]


class Resolver:
    """Answers in the system's place; ``answer`` is a list of addresses, or an error, or empty for silence."""

    def __init__(self, monkeypatch, *answer):
        self.answer = list(answer)
        self.asked = 0
        self._monkeypatch = monkeypatch

    def install(self):
        self._monkeypatch.setattr(fumi_edge.backends.dialing.socket, "getaddrinfo", self._resolve)

    def _resolve(self, host, port, *, type):
        self.asked += 1
        if not self.answer:
            threading.Event().wait()
        if isinstance(self.answer[0], Exception):
            raise self.answer[0]
        return [(socket.AF_INET, type, 6, "", (each, port)) for each in self.answer]


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


def test_addresses_are_kept_when_the_resolver_fails_later(pool, monkeypatch, listening, caplog):
    async def scenario():
        resolver = Resolver(monkeypatch, "127.0.0.1")
        resolver.install()
        backends = pool(f"mail.test:{listening}")
        monkeypatch.setattr(fumi_edge.backends.dialing, "RESOLVE", 0.0)
        for number in range(1, 4):
            while resolver.asked < number:  # a connection does not ask while the one before is still asking
                sock, backend = await backends.connect(b"")
                sock.close()
                await asyncio.sleep(0.01)
            resolver.answer = [socket.gaierror("no more")]
        assert backend.up
        while "keeping the old addresses" not in caplog.text:
            await asyncio.sleep(0)

    asyncio.run(scenario())


def test_a_resolver_that_hangs_is_given_up_after_the_connect_timeout(pool, monkeypatch):
    async def scenario():
        resolver = Resolver(monkeypatch)
        resolver.install()
        backends = pool("mail.test:25", timeout=0.1)
        results = await asyncio.gather(*(backends.connect(b"") for _ in range(20)), return_exceptions=True)
        assert {type(each) for each in results} == {fumi_edge.backends.choice.NoBackend}
        assert resolver.asked == 1  # each question takes a thread
        assert not backends.all[0].up

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_fault_of_ours_is_not_the_last_check(monkeypatch, pool, caplog):
    async def scenario():
        outcomes = [RuntimeError("can't start new thread"), None]

        async def health_check(*_):
            if (outcome := outcomes.pop(0) if outcomes else None) is not None:
                raise outcome

        monkeypatch.setattr(fumi_edge.backends.health, "health_check", health_check)
        backends = pool("127.0.0.1:1")
        checks = fumi_edge.backends.health.Checks(backends, 0.01, fumi_edge.backends.health.Manner("off", 1.0, 1.0))
        while backends.local_problem() is not None:
            await asyncio.sleep(0.01)
        await checks.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert "check failed" in caplog.text


def test_of_several_addresses_the_one_that_answered_comes_first_from_then_on(pool, monkeypatch, listening):
    async def scenario():
        resolver = Resolver(monkeypatch, "127.0.0.3", "127.0.0.1")
        resolver.install()
        backends = pool(f"mail.test:{listening}")
        (await backends.connect(b""))[0].close()
        targets = await backends.all[0].destination.targets(asyncio.get_running_loop(), 1.0)
        assert [name[0] for _, name in targets] == ["127.0.0.1", "127.0.0.3"]

    asyncio.run(scenario())


def test_an_address_that_does_not_answer_costs_one_client_its_time_and_not_one_at_each_question(pool, monkeypatch, listening):
    """It stays behind those that answer, in whatever order the resolver names them."""

    async def scenario():
        resolver = Resolver(monkeypatch, "127.0.0.3", "127.0.0.1")
        resolver.install()
        connected = []
        connect = fumi_edge.backends.dialing._connect

        def told(loop, target, *rest):
            connected.append(target[1][0])
            return connect(loop, target, *rest)

        monkeypatch.setattr(fumi_edge.backends.dialing, "_connect", told)
        monkeypatch.setattr(fumi_edge.backends.dialing, "RESOLVE", 0.0)
        backends = pool(f"mail.test:{listening}")
        while resolver.asked < 5:
            (await backends.connect(b""))[0].close()
            await asyncio.sleep(0.01)
        assert connected.count("127.0.0.3") == 1
        # When there is nothing else, it gets its chance.
        resolver.answer = ["127.0.0.3"]
        while connected[-1] != "127.0.0.3":
            with contextlib.suppress(fumi_edge.backends.choice.NoBackend):
                (await backends.connect(b""))[0].close()
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(scenario(), 30))


@pytest.fixture
def listening_everywhere():
    """A port of all of this machine's addresses, and which of them were connected to."""
    with socket.create_server(("", 0), backlog=64) as server:

        def connected():
            with server.accept()[0] as sock:
                return sock.getsockname()[0]

        yield server.getsockname()[1], connected


def test_the_addresses_of_a_name_take_turns(pool, monkeypatch, listening_everywhere):
    port, connected = listening_everywhere

    async def scenario():
        Resolver(monkeypatch, "127.0.0.1", "127.0.0.2", "127.0.0.3").install()
        backends = pool(f"mail.test:{port}")
        for _ in range(6):
            (await backends.connect(b""))[0].close()

    asyncio.run(scenario())
    assert sorted(connected() for _ in range(6)) == [f"127.0.0.{n}" for n in (1, 1, 2, 2, 3, 3)]


def test_an_address_that_failed_is_used_again_after_a_while(pool, monkeypatch, listening_everywhere):
    port, connected = listening_everywhere
    monkeypatch.setattr(fumi_edge.backends.dialing, "AVOID_ADDRESS", 0.05)

    async def scenario():
        Resolver(monkeypatch, "127.0.0.1", "127.0.0.2").install()
        backends = pool(f"mail.test:{port}")
        dial = fumi_edge.backends.dialing._connect

        async def broken(loop, target, *rest):
            if target[1][0] == "127.0.0.2":
                raise ConnectionRefusedError(errno.ECONNREFUSED, "no")
            return await dial(loop, target, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(fumi_edge.backends.dialing, "_connect", broken)
            for _ in range(4):
                (await backends.connect(b""))[0].close()
                assert connected() == "127.0.0.1"
        seen = set()
        while "127.0.0.2" not in seen:
            (await backends.connect(b""))[0].close()
            seen.add(connected())
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_when_no_address_of_a_name_can_be_connected_to_it_is_resolved_at_once(pool, monkeypatch, listening):
    """The client that finds out is served where the name has moved to."""

    async def scenario():
        resolver = Resolver(monkeypatch, "127.0.0.3", "127.0.0.4")
        resolver.install()
        backends = pool(f"mail.test:{listening}")
        monkeypatch.setattr(fumi_edge.backends.dialing, "RESOLVE_AGAIN", 3600.0)
        for _ in range(5):
            with pytest.raises(fumi_edge.backends.choice.NoBackend):
                await backends.connect(b"")
        assert resolver.asked == 1  # so long ago is a second
        resolver.answer = ["127.0.0.1"]
        monkeypatch.setattr(fumi_edge.backends.dialing, "RESOLVE_AGAIN", 0.0)
        results = await asyncio.gather(*(backends.connect(b"") for _ in range(10)))
        assert resolver.asked == 2
        assert backends.all[0].up
        for sock, _ in results:
            sock.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_name_that_cannot_be_resolved_any_more_is_one_line_in_the_log(pool, monkeypatch, caplog):
    async def scenario():
        resolver = Resolver(monkeypatch, "127.0.0.3")
        resolver.install()
        monkeypatch.setattr(fumi_edge.backends.dialing, "RESOLVE_AGAIN", 0.0)
        backends = pool("mail.test:9")
        for _ in range(5):
            with pytest.raises(fumi_edge.backends.choice.NoBackend):
                await backends.connect(b"")
            resolver.answer = [socket.gaierror("no more")]
        assert resolver.asked >= 5

    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert caplog.text.count("keeping the old addresses") == 1


def test_a_backend_that_no_address_of_ours_can_reach_is_down_and_said_to_be(pool, monkeypatch, caplog):
    """``[::1]`` without IPv6, or no port left: neither must look like a backend that is merely not busy."""

    async def nowhere(*_):
        raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")

    async def scenario():
        monkeypatch.setattr(fumi_edge.backends.dialing, "_connect", nowhere)
        backends = pool("[::1]:2525", "[::1]:2526")
        with pytest.raises(fumi_edge.backends.choice.NoBackend, match="Cannot assign requested address"):
            await backends.connect(b"")
        assert [backend.up for backend in backends.all] == [False, False]

    asyncio.run(scenario())
    assert caplog.text.count("reason=unreachable") == 2


def test_a_backend_that_cannot_be_connected_to_in_time_is_said_to_be(pool, monkeypatch, caplog):
    async def nowhere(*_):
        raise TimeoutError

    async def scenario():
        monkeypatch.setattr(fumi_edge.backends.dialing, "_connect", nowhere)
        with pytest.raises(fumi_edge.backends.choice.NoBackend, match="timed out"):
            await pool("127.0.0.1:2525").connect(b"")

    asyncio.run(scenario())
    assert 'reason=timeout error="timed out"' in caplog.text


def test_a_check_that_could_not_be_made_says_why(pool, monkeypatch):
    async def exhausted(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    async def scenario():
        monkeypatch.setattr(fumi_edge.backends.health, "health_check", exhausted)
        backends = pool("127.0.0.1:2525")
        checks = fumi_edge.backends.health.Checks(backends, 0.01, fumi_edge.backends.health.Manner("off", 1.0, 1.0))
        while backends.local_problem() != "backend 127.0.0.1:2525: Too many open files":
            await asyncio.sleep(0.01)
        await checks.close()
        assert backends.all[0].up
        assert backends.all[0].metrics.errors["other"].value

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_farewells_to_backends_that_do_not_answer_are_bounded(pool, monkeypatch, listening):
    monkeypatch.setattr(fumi_edge.backends.choice, "RETIRING", 5)

    async def scenario():
        backends = pool(f"127.0.0.1:{listening}")
        for _ in range(20):
            backends.retire((await backends.connect(b""))[0])
        assert len(backends._retiring) == 5
        for task in list(backends._retiring):
            task.cancel()
        await backends.close()

    asyncio.run(scenario())


# Ports


def time_waits(port):
    """Sockets of ours, towards this port, that only wait for stragglers."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[2].endswith(f":{port:04X}") and row[3] == "06" for row in rows)


def test_thousands_of_short_connections_leave_no_port_behind(backend, edge, clients, kit):
    """With QUIT, with an upgrade, and without a word; it is the backend that closes first and keeps the TIME_WAIT."""
    server = backend()
    program = edge("--log-level", "debug", backend=server)
    each, threads = 50, 10
    failures = []

    def visit(number):
        try:
            if number % 2:
                client = clients.plain(program.starttls_port)
                client.reply()
                if number % 4 == 1:
                    client.close()
                    return
                assert client.ask(b"STARTTLS\r\n") == READY
                client = clients.upgrade(client)
            else:
                client = clients.tls(program.tls_port)
                client.reply()
            assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
            client.rest()
            client.close()
        except Exception as error:
            failures.append(error)

    def visits(first):
        for number in range(each):
            visit(first + number)

    workers = [threading.Thread(target=visits, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert failures == []
    program.ended(each * threads)
    port = int(server.address.rpartition(":")[2])
    assert len(server.peers) > each * threads
    assert time_waits(port) < each * threads // 100


def test_a_backend_that_goes_on_sending_after_quit_is_broken_off_and_holds_up_nobody(pool):
    """Something to read is always there, so the event loop would never get a turn, nor a timeout its time."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, stop = server.getsockname()[1], threading.Event()

        def flood():
            with contextlib.suppress(OSError), server.accept()[0] as peer:
                while not stop.is_set():
                    peer.send(b"x" * 65536)

        async def scenario():
            sock, _ = await pool(f"127.0.0.1:{port}").connect(b"")
            await fumi_edge.backends.dialing.receive(asyncio.get_running_loop(), sock, 1)
            return await fumi_edge.backends.dialing.quit_and_close(sock, 3600.0)

        sender = threading.Thread(target=flood)
        sender.start()
        try:
            said = asyncio.run(asyncio.wait_for(scenario(), 20))
        finally:
            stop.set()
            sender.join(20)
        assert set(said) == set(b"x")
        assert not sender.is_alive()


def test_a_backend_that_does_not_go_after_quit_is_broken_off(pool, monkeypatch):
    """The port would be ours for a minute otherwise."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        async def scenario():
            sock, _ = await pool(f"127.0.0.1:{port}").connect(b"")
            assert await fumi_edge.backends.dialing.quit_and_close(sock, 0.01) == b""

        asyncio.run(scenario())
        with server.accept()[0] as peer:
            assert peer.recv(100) == b"QUIT\r\n"
            with pytest.raises(ConnectionResetError):
                peer.recv(100)
    assert time_waits(port) == 0
