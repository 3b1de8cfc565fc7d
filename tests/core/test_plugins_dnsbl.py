"""dnsbl: what is asked, what counts as an answer, and that a resolver's trouble is not the client's."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address
from typing import Any

import pytest

from fumi_core import Fumi, plugins
from fumi_core.plugins.dnsbl import Blocklist
from fumi_core.runtime.resolver import Resolver
from fumi_core.testing import RunningServer, running
from tests.core.client import Connect, ConnectFrom
from tests.support.clock import Clock

HEADER = b"PROXY TCP4 8.8.4.%d 192.0.2.1 1234 25\r\n"


class Zone:
    """A resolver that knows a few names, and remembers what it was asked."""

    def __init__(self, names: dict[str, Any] | None = None) -> None:
        self.names = names or {}
        self.asked: list[str] = []

    def __call__(self, name: str) -> Sequence[str]:
        self.asked.append(name)
        answer = self.names.get(name, ())
        if isinstance(answer, OSError):
            raise answer
        return answer.split() if isinstance(answer, str) else answer


@pytest.fixture
def app() -> Fumi:
    return Fumi(auth_optional=True, proxy_protocol="required", close_timeout=0.2)


Banner = Callable[..., bytes]


@pytest.fixture
def banner(app: Fumi, connect_from: ConnectFrom) -> Banner:
    """What a client hears from an app that asks bl.example and then other.example."""

    def hear(resolve: Any, address: str = "8.8.4.4", **options: Any) -> bytes:
        app.use(plugins.dnsbl(["bl.example", "other.example"], resolve=resolve, **options))
        with running(app) as server:
            return connect_from(server.port, address).banner

    return hear


def test_the_reply_to_a_listed_client_names_the_zone(banner: Banner) -> None:
    assert banner(Zone({"4.4.8.8.bl.example": "127.0.0.2"})) == b"554 5.7.1 Client host [8.8.4.4] blocked using bl.example\r\n"


def test_zones_are_queried_in_order_until_one_lists_it(banner: Banner) -> None:
    resolve = Zone({"4.4.8.8.other.example": "127.0.0.10"})
    assert b"blocked using other.example" in banner(resolve)
    assert resolve.asked == ["4.4.8.8.bl.example", "4.4.8.8.other.example"]


def test_the_first_zone_that_lists_it_is_the_last_queried(banner: Banner) -> None:
    resolve = Zone({"4.4.8.8.bl.example": "127.0.0.2"})
    banner(resolve)
    assert resolve.asked == ["4.4.8.8.bl.example"]


def test_an_ipv6_address_is_looked_up_by_nibbles(banner: Banner) -> None:
    resolve = Zone()
    assert banner(resolve, "2a00:1450:4001::1b").startswith(b"220")
    assert resolve.asked[0] == "b.1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.1.0.0.4.0.5.4.1.0.0.a.2.bl.example"


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "192.168.1.1", "169.254.1.1", "::1", "fe80::1", "fd00::1"])
def test_an_address_that_is_not_public_is_not_looked_up(banner: Banner, address: str) -> None:
    resolve = Zone()
    assert banner(resolve, address).startswith(b"220")
    assert resolve.asked == []


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("127.255.255.254", "error code"),
        ("127.255.255.252 127.255.255.255", "error code"),
        ("203.0.113.9", "not an answer of a blocklist"),
        ("nonsense", "nonsense"),
        (OSError("the resolver is ill"), "the resolver is ill"),
    ],
)
def test_an_invalid_answer_of_a_zone_admits_the_client_and_logs_one_line(
    banner: Banner, caplog: pytest.LogCaptureFixture, answer: Any, problem: str
) -> None:
    with caplog.at_level(logging.WARNING):
        assert banner(Zone({"4.4.8.8.bl.example": answer})).startswith(b"220")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert problem in lines[0]
    assert "zone=bl.example" in lines[0]


def test_an_error_code_beside_a_verdict_does_not_void_it(banner: Banner) -> None:
    assert banner(Zone({"4.4.8.8.bl.example": "127.255.255.254 127.0.0.4"})).startswith(b"554")


def test_a_failing_zone_does_not_silence_the_next(banner: Banner) -> None:
    resolve = Zone({"4.4.8.8.bl.example": OSError("down"), "4.4.8.8.other.example": "127.0.0.2"})
    assert b"blocked using other.example" in banner(resolve)


@pytest.mark.parametrize("failure", [OSError("down"), "203.0.113.9"])
def test_an_answer_is_remembered_for_a_while_and_a_failure_for_less(
    app: Fumi, connect_from: ConnectFrom, clock: Clock, failure: Any
) -> None:
    resolve = Zone({"4.4.8.8.bl.example": failure})
    app.use(plugins.dnsbl(["bl.example"], resolve=resolve, clock=clock))
    with running(app) as server:
        for code, asked, later in (
            (b"220", 1, 59),
            (b"220", 1, 2),
            (b"554", 2, 299),
            (b"554", 2, 2),
            (b"220", 3, 299),
            (b"220", 3, 0),
        ):
            assert connect_from(server.port, "8.8.4.4").banner.startswith(code)
            assert len(resolve.asked) == asked
            resolve.names = {"4.4.8.8.bl.example": "127.0.0.2"} if asked == 1 else {}
            clock.now += later


class DeadZone(Zone):
    """Answers every name with the same."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer
        self.clients = 0

    def __call__(self, name: str) -> Sequence[str]:
        self.names = {name: self.answer}
        return super().__call__(name)


def asked_by(clients: int, server: RunningServer, connect_from: ConnectFrom, resolve: DeadZone) -> int:
    """How many of so many new clients, one after another, a zone is asked about; all are let in."""
    before = len(resolve.asked)
    for _ in range(clients):
        resolve.clients += 1
        assert connect_from(server.port, f"8.8.4.{resolve.clients}").banner.startswith(b"220")
    return len(resolve.asked) - before


@pytest.mark.parametrize(
    ("failure", "needed"), [(OSError("down"), 3), (TimeoutError(), 3), ("203.0.113.9", 3), ("127.255.255.254", 1)]
)
def test_a_dead_zone_is_skipped_and_then_queried_for_one_client_a_minute(
    app: Fumi, connect_from: ConnectFrom, clock: Clock, caplog: pytest.LogCaptureFixture, failure: Any, needed: int
) -> None:
    resolve = DeadZone(failure)
    app.use(plugins.dnsbl(["bl.example"], resolve=resolve, clock=clock))
    with running(app) as server:
        assert asked_by(10, server, connect_from, resolve) == needed
        assert caplog.text.count("blocklist unavailable") == needed
        for _ in range(2):
            clock.now += 61
            assert asked_by(5, server, connect_from, resolve) == 1
        resolve.answer = ()
        clock.now += 61
        assert asked_by(5, server, connect_from, resolve) == 5


def test_failures_that_are_not_in_a_row_leave_a_zone_in(app: Fumi, connect_from: ConnectFrom, clock: Clock) -> None:
    resolve = DeadZone(())
    app.use(plugins.dnsbl(["bl.example"], resolve=resolve, clock=clock))
    with running(app) as server:
        for answer in (OSError("down"), OSError("down"), ()) * 3:
            resolve.answer = answer
            assert asked_by(1, server, connect_from, resolve) == 1


def test_a_zone_that_is_left_out_does_not_silence_the_next(app: Fumi, connect_from: ConnectFrom, clock: Clock) -> None:
    dead = {f"{number}.4.8.8.bl.example": "127.255.255.254" for number in range(9)}
    resolve = Zone({**dead, **{f"{number}.4.8.8.other.example": "127.0.0.2" for number in range(9)}})
    app.use(plugins.dnsbl(["bl.example", "other.example"], resolve=resolve, clock=clock))
    with running(app) as server:
        for number in range(9):
            assert b"blocked using other.example" in connect_from(server.port, f"8.8.4.{number}").banner
    assert sum(name.endswith("bl.example") for name in resolve.asked) == 1


def test_memory_is_bounded_for_any_number_of_addresses(clock: Clock) -> None:
    blocklist = Blocklist("bl.example", Resolver(Zone(), timeout=30), clock, limit=8)

    async def ask() -> None:
        for number in range(100):
            assert not await blocklist.lists(IPv4Address(f"8.8.4.{number}"), "1")

    asyncio.run(ask())
    assert len(blocklist) == 8


def test_a_resolver_that_hangs_delays_no_other_client_and_uses_few_threads(
    app: Fumi, connect: Connect, connect_from: ConnectFrom, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()
    hanging: set[threading.Thread] = set()

    def hang(name: str) -> Sequence[str]:
        hanging.add(threading.current_thread())
        release.wait(60)
        return ["127.0.0.2"]

    app.use(plugins.dnsbl(["bl.example"], resolve=hang, timeout=0.3))
    try:
        with running(app) as server, caplog.at_level(logging.WARNING):
            slow = [connect(server.port, HEADER % number, banner=False) for number in range(40)]
            assert connect_from(server.port, "127.0.0.1").banner.startswith(b"220")
            assert [client.reply()[:3] for client in slow] == [b"220"] * 40
            assert 0 < len(hanging) <= 8
    finally:
        release.set()
    assert caplog.text.count("no answer in time") == 40


@pytest.mark.parametrize(
    "zones", [[], "zen.spamhaus.org", ["spamhaus"], ["zen spamhaus.org"], ["-a.example"], ["a..example"], ["b" * 190 + ".x"], [1]]
)
def test_an_invalid_zone_is_an_error(zones: Any) -> None:
    with pytest.raises(ValueError, match=r"zen\.spamhaus\.org"):
        plugins.dnsbl(zones)


def test_a_timeout_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="timeout is a number above 0"):
        plugins.dnsbl(["bl.example"], timeout=0)
