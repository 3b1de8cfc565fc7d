"""Limits by client address: how many at once, how many a second, and a log that a flood does not flood."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from fumi_core.proxy_protocol import ProxyHeader
from fumi_core.runtime.scoreboard import count_of_one_process
from fumi_edge.connection.limits import ClientLimits, Limits, Rate, parse_rate
from tests.edge.backends import StartBackend
from tests.edge.clients import Clients
from tests.edge.metrics import rejected
from tests.edge.program import StartEdge
from tests.support.clock import Clock
from tests.support.peer import Peer
from tests.support.waiting import until

TOO_MANY = b"421 4.7.0 Too many connections, try again later\r\n"


class Come(Protocol):
    """The fixture ``come``."""

    def __call__(self, port: int, host: str = "127.0.0.1") -> Peer: ...


@pytest.fixture
def come() -> Iterator[Come]:
    """A client with an address of this machine's own choosing: all of 127.0.0.0/8 is here."""
    peers: list[Peer] = []

    def come(port: int, host: str = "127.0.0.1") -> Peer:
        sock = socket.create_connection(("127.0.0.1", port), 30, source_address=(host, 0))
        peers.append(Peer(sock))
        return peers[-1]

    yield come
    for peer in peers:
        peer.close()


def test_an_address_has_so_many_connections_and_others_have_their_own(
    backend: StartBackend, edge: StartEdge, clients: Clients, come: Come
) -> None:
    program = edge("--max-clients-per-ip", "2", backend=backend())
    first, second = come(program.starttls_port), clients.tls(program.tls_port)
    first.line()
    second.line()
    assert come(program.starttls_port).rest() == TOO_MANY
    with pytest.raises((ssl.SSLError, OSError)):
        clients.tls(program.tls_port)
    assert rejected(program, "max_clients_per_ip") == 2
    assert come(program.starttls_port, "127.0.0.2").line().startswith(b"220")
    first.ask(b"QUIT\r\n")
    first.close()
    program.ended()
    assert come(program.starttls_port).line().startswith(b"220")
    assert come(program.starttls_port).rest() == TOO_MANY


def test_an_address_may_connect_at_its_rate(backend: StartBackend, edge: StartEdge, clients: Clients, come: Come) -> None:
    program = edge("--rate-per-ip", "3/h", backend=backend())
    for _ in range(2):
        client = come(program.starttls_port)
        client.line()
        client.close()
    assert clients.tls(program.tls_port).line().startswith(b"220")
    assert come(program.starttls_port).rest() == TOO_MANY
    with pytest.raises((ssl.SSLError, OSError)):
        clients.tls(program.tls_port)
    assert rejected(program, "rate") == 2
    assert come(program.starttls_port, "127.0.0.2").line().startswith(b"220")


@pytest.mark.parametrize(("flag", "reason"), [("--max-clients-per-ip", "max_clients_per_ip"), ("--rate-per-ip", "rate")])
def test_behind_a_balancer_it_is_the_clients_address_that_counts(
    backend: StartBackend, edge: StartEdge, clients: Clients, come: Come, flag: str, reason: str
) -> None:
    program = edge("--accept-proxy", flag, "1" if flag.startswith("--max") else "1/h", backend=backend())

    def arrive(host: str, port: int) -> Peer:
        client = come(port)
        transport, other = ("TCP6", "2001:db8::1") if ":" in host else ("TCP4", "192.0.2.1")
        client.say(ProxyHeader(2, "PROXY", transport, (host, 1), (other, 25)).to_bytes())
        return client

    assert arrive("192.0.2.7", program.starttls_port).line().startswith(b"220")
    assert arrive("192.0.2.7", program.starttls_port).rest() == TOO_MANY
    assert arrive("192.0.2.8", program.starttls_port).line().startswith(b"220")
    # One customer has a /64.
    assert arrive("2001:db8:0:1::7", program.starttls_port).line().startswith(b"220")
    assert arrive("2001:db8:0:1:ffff::8", program.starttls_port).rest() == TOO_MANY
    assert arrive("2001:db8:0:2::7", program.starttls_port).line().startswith(b"220")
    with pytest.raises((ssl.SSLError, OSError)):
        clients.upgrade(arrive("192.0.2.7", program.tls_port))
    # The balancer's own checks are no client's.
    for _ in range(3):
        check = come(program.starttls_port)
        check.say(ProxyHeader(2, "LOCAL").to_bytes())
        assert check.line().startswith(b"220")
    assert rejected(program, reason) == 3


def test_a_rejected_client_does_not_count_as_open(backend: StartBackend, edge: StartEdge, come: Come) -> None:
    program = edge("--accept-proxy", "--max-clients", "2", "--max-clients-per-ip", "1", backend=backend())
    header = ProxyHeader(2, "PROXY", "TCP4", ("192.0.2.7", 1), ("192.0.2.1", 25)).to_bytes()
    listener = f"127.0.0.1:{program.starttls_port}"
    first = come(program.starttls_port)
    first.say(header)
    first.line()
    for number in range(1, 6):
        client = come(program.starttls_port)
        client.say(header)
        assert client.rest() == TOO_MANY
        client.close()
        until(lambda: program.metric("fumi_edge_connections_active", listener=listener) == 1, "its end")
        assert rejected(program, "max_clients_per_ip") == number
    first.ask(b"QUIT\r\n")
    first.close()
    program.ended()
    again = come(program.starttls_port)
    again.say(header)
    assert again.line().startswith(b"220")


@pytest.mark.parametrize("behind_a_balancer", [False, True])
def test_a_flood_is_counted_whole_and_logged_in_few_lines(
    backend: StartBackend, edge: StartEdge, come: Come, behind_a_balancer: bool
) -> None:
    flags = ("--accept-proxy",) if behind_a_balancer else ()
    header = b"PROXY TCP4 192.0.2.7 192.0.2.1 1 25\r\n" if behind_a_balancer else b""
    program = edge("--max-clients-per-ip", "1", *flags, backend=backend())
    first = come(program.starttls_port)
    first.say(header)
    first.line()
    for _ in range(300):
        client = come(program.starttls_port)
        client.say(header)
        assert client.rest() == TOO_MANY
        client.close()
    assert rejected(program, "max_clients_per_ip") == 300

    def said() -> int:
        suppressed: int = sum(entry["count"] for entry in program.events("rejected, more suppressed"))
        return len(program.events("rejected")) + suppressed

    until(lambda: said() == 300, "the count in the log")
    assert len(program.events("rejected") + program.events("rejected, more suppressed")) < 60
    assert program.events("rejected")[0]["client_ip"] == ("192.0.2.7" if behind_a_balancer else "127.0.0.1")
    assert program.events("connection ended") == []


def test_rejections_not_logged_yet_are_logged_at_the_end(backend: StartBackend, edge: StartEdge, come: Come) -> None:
    program = edge("--max-clients-per-ip", "1", "--drain-timeout", "0", backend=backend())
    come(program.starttls_port).line()
    for _ in range(5):
        assert come(program.starttls_port).rest() == TOO_MANY
    program.stop()
    assert len(program.events("rejected")) + sum(entry["count"] for entry in program.events("rejected, more suppressed")) == 5


def test_clients_on_a_unix_socket_have_no_address_to_limit(backend: StartBackend, edge: StartEdge, tmp_path: Path) -> None:
    path = str(tmp_path / "edge.sock")
    edge("--starttls-listen", f"unix:{path}", "--max-clients-per-ip", "1", "--rate-per-ip", "1/h", backend=backend())
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            assert Peer(sock).line().startswith(b"220")


# The counting itself, with a clock of our own


def test_rates_are_read() -> None:
    assert parse_rate("10/s") == Rate(10, 1)
    assert parse_rate("600/m") == Rate(600, 60)
    assert parse_rate("1000/h") == Rate(1000, 3600)
    for wrong in ("", "10", "/s", "0/s", "-1/s", "1.5/s", "10/d", "10 /s", "10/s ", "1/1s", "99999999/s", "\u0663/s"):
        with pytest.raises(ValueError, match="is not a rate"):
            parse_rate(wrong)


@pytest.mark.parametrize("rate", [Rate(1, 1), Rate(3, 1), Rate(10, 1), Rate(600, 60), Rate(1000, 3600), Rate(7, 60)])
def test_a_bucket_holds_so_many_and_fills_steadily(rate: Rate) -> None:
    clock = Clock()
    limits = Limits(ClientLimits(None, None, rate), count_of_one_process(), clock=clock)

    def taken() -> int:
        count = 0
        while limits.admit("192.0.2.1") is None:
            count += 1
        return count

    assert taken() == rate.clients
    clock.now += rate.seconds / rate.clients * 1.001
    assert taken() == 1
    clock.now += rate.seconds * 0.5
    assert taken() in (rate.clients // 2, rate.clients // 2 + 1)
    clock.now += rate.seconds * 100
    assert taken() == rate.clients


def test_rejected_connections_do_not_delay_the_next_admission() -> None:
    clock = Clock()
    limits = Limits(ClientLimits(None, None, Rate(1, 1)), count_of_one_process(), clock=clock)
    assert limits.admit("192.0.2.1") is None
    for _ in range(100):
        clock.now += 0.009
        assert limits.admit("192.0.2.1") == "rate"
    clock.now += 0.2
    assert limits.admit("192.0.2.1") is None


def test_clients_that_have_left_take_no_memory() -> None:
    limits = Limits(ClientLimits(10, 1, None), count_of_one_process(), clock=Clock())
    for number in range(200):
        host = f"10.0.0.{number}"
        assert limits.enter(host) is None
        assert limits.enter(host) == "max_clients_per_ip"
        limits.leave(host)
    assert not limits._clients_of
    assert [limits.enter(f"10.0.1.{number}") for number in range(11)] == [None] * 10 + ["max_clients"]


def test_an_ipv4_mapped_address_is_the_ipv4_address() -> None:
    limits = Limits(ClientLimits(None, 1, None), count_of_one_process(), clock=Clock())
    assert limits.enter("::ffff:192.0.2.1") is None
    assert limits.enter("::ffff:192.0.2.2") is None
    for host in ("192.0.2.1", "::ffff:192.0.2.1", "::ffff:c000:201", "::FFFF:192.0.2.1"):
        assert limits.enter(host) == "max_clients_per_ip"
    limits.leave("::ffff:c000:201")
    assert limits.enter("192.0.2.1") is None
