"""rate_limit: who may send how much."""

from __future__ import annotations

from typing import Any

import pytest

from fumi_core import Fumi, plugins
from fumi_core.testing import running
from tests.core.client import Client, ConnectFrom
from tests.support.clock import Clock


@pytest.fixture
def app() -> Fumi:
    return Fumi(auth_optional=True, proxy_protocol="required", close_timeout=0.2)


def mail(client: Client) -> bytes:
    client.say("RSET")
    reply: bytes = client.say("MAIL FROM:<a@b.example>")
    return reply


def test_a_burst_is_taken_and_then_the_rate(app: Fumi, connect_from: ConnectFrom, clock: Clock) -> None:
    with running(app.use(plugins.rate_limit(6, 3, clock=clock))) as server:
        client = connect_from(server.port, "192.0.2.1")
        client.say("EHLO x")
        assert [mail(client)[:9] for _ in range(5)] == [b"250 2.1.0"] * 3 + [b"450 4.7.1"] * 2
        clock.now += 9.9
        assert mail(client).startswith(b"450")
        clock.now += 0.2  # sixty seconds for six: ten for one, whatever was refused meanwhile
        assert [mail(client)[:3] for _ in range(2)] == [b"250", b"450"]
        clock.now += 3600
        assert [mail(client)[:3] for _ in range(4)] == [b"250"] * 3 + [b"450"]


def test_a_client_is_an_address_whatever_its_connections(app: Fumi, connect_from: ConnectFrom, clock: Clock) -> None:
    with running(app.use(plugins.rate_limit(1, 1, clock=clock))) as server:
        for address, reply in {
            "192.0.2.1": b"250",
            "192.0.2.2": b"250",
            "2001:db8:0:1::1": b"250",
            "2001:db8:0:2::1": b"250",
        }.items():
            client = connect_from(server.port, address)
            client.say("EHLO x")
            assert mail(client)[:3] == reply, address
        for address in ("192.0.2.1", "2001:db8:0:1:ffff::7"):
            client = connect_from(server.port, address)
            client.say("EHLO x")
            assert mail(client).startswith(b"450 4.7.1"), address


@pytest.mark.parametrize(
    ("per_minute", "burst", "problem"),
    [
        (0, 1, "per_minute is a number above 0"),
        (-1, 1, "per_minute"),
        (float("nan"), 1, "per_minute"),
        (float("inf"), 1, "per_minute"),
        ("10", 1, "per_minute"),
        (True, 1, "per_minute"),
        (1, 0, "burst is a whole number of at least 1"),
        (1, 1.5, "burst"),
        (1, "5", "burst"),
    ],
)
def test_an_invalid_rate_is_an_error(per_minute: Any, burst: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        plugins.rate_limit(per_minute, burst)
