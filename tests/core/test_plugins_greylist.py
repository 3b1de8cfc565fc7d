"""greylist: who waits, for how long, and for whom it is forgotten."""

from __future__ import annotations

from typing import Any

import pytest

from fumi_core import Fumi, plugins
from fumi_core.plugins.greylist import RETENTION_SECONDS, RETRY_WINDOW_SECONDS, Triplets
from fumi_core.testing import running
from tests.core.client import Client, ConnectFrom
from tests.support.clock import Clock


@pytest.fixture
def app(clock: Clock) -> Fumi:
    app = Fumi(auth_optional=True, proxy_protocol="required", allow_insecure_auth=True, close_timeout=0.2)
    return app.use(plugins.greylist(300, clock=clock))


def rcpt(client: Client, sender: str = "a@b.example", recipient: str = "c@d.example") -> bytes:
    client.say("EHLO x")
    client.say(f"MAIL FROM:<{sender}>")
    reply: bytes = client.say(f"RCPT TO:<{recipient}>")
    return reply


def test_the_first_try_waits_and_one_after_the_delay_does_not(app: Fumi, connect_from: ConnectFrom, clock: Clock) -> None:
    with running(app) as server:
        client = connect_from(server.port, "192.0.2.1")
        assert rcpt(client).startswith(b"450 4.7.1 ")
        clock.now += 299
        assert rcpt(client).startswith(b"450")  # and its time does not begin again
        clock.now += 1
        assert rcpt(client).startswith(b"250")
        clock.now += 1
        assert rcpt(client, "A@B.EXAMPLE", "C@d.example").startswith(b"250")


def test_two_spellings_of_a_domain_are_one_recipient(app: Fumi, connect_from: ConnectFrom, clock: Clock) -> None:
    with running(app) as server:
        client = connect_from(server.port, "192.0.2.1")
        assert rcpt(client, recipient="c@xn--mnchen-3ya.example").startswith(b"450")
        clock.now += 300
        client.say("EHLO x")
        client.say("MAIL FROM:<a@b.example> SMTPUTF8")
        assert client.say("RCPT TO:<c@münchen.example>").startswith(b"250")


@pytest.mark.parametrize(
    ("address", "sender", "recipient", "known"),
    [
        ("192.0.2.77", "a@b.example", "c@d.example", True),
        ("192.0.3.1", "a@b.example", "c@d.example", False),
        ("192.0.2.1", "x@b.example", "c@d.example", False),
        ("192.0.2.1", "a@b.example", "x@d.example", False),
        ("192.0.2.1", "", "c@d.example", False),
        ("2001:db8:0:1:2::2", "a@b.example", "c@d.example", True),
        ("2001:db8:0:2::1", "a@b.example", "c@d.example", False),
    ],
)
def test_a_triplet_is_a_network_a_sender_and_a_recipient(
    app: Fumi, connect_from: ConnectFrom, clock: Clock, address: str, sender: str, recipient: str, known: bool
) -> None:
    with running(app) as server:
        for first in ("192.0.2.1", "2001:db8:0:1::1"):
            rcpt(connect_from(server.port, first))
        clock.now += 300
        assert rcpt(connect_from(server.port, address), sender, recipient)[:3] == (b"250" if known else b"450")


def test_a_try_long_after_the_first_is_a_first_one(app: Fumi, connect_from: ConnectFrom, clock: Clock) -> None:
    with running(app) as server:
        client = connect_from(server.port, "192.0.2.1")
        rcpt(client)
        clock.now += RETRY_WINDOW_SECONDS + 1
        assert rcpt(client).startswith(b"450")
        clock.now += 300
        assert rcpt(client).startswith(b"250")


def test_a_triplet_is_remembered_while_it_is_used(app: Fumi, connect_from: ConnectFrom, clock: Clock) -> None:
    with running(app) as server:
        client = connect_from(server.port, "192.0.2.1")
        rcpt(client)
        clock.now += 300
        for _ in range(3):
            assert rcpt(client).startswith(b"250")
            clock.now += RETENTION_SECONDS - 1
        clock.now += 2
        assert rcpt(client).startswith(b"450")


def test_authenticated_users_do_not_wait(app: Fumi, connect_from: ConnectFrom) -> None:
    app.on_auth(lambda ctx, next: ctx.accept("joe"))
    with running(app) as server:
        client = connect_from(server.port, "192.0.2.1")
        client.say("EHLO x")
        client.say("AUTH PLAIN AGpvZQBzZWNyZXQ=")
        assert rcpt(client).startswith(b"250")


def test_memory_is_bounded_for_any_number_of_clients() -> None:
    triplets = Triplets(shards=4, size=8)
    for number in range(1000):
        triplets.put((str(number), "a", "b"), 1.0)
    assert len(triplets) == 32


def test_one_client_cannot_have_the_others_forgotten() -> None:
    triplets = Triplets()
    others = [(f"192.0.{number}.0/24", "a@b.example", "c@d.example") for number in range(200)]
    for other in others:
        triplets.put(other, 1.0)
    for number in range(5000):
        triplets.put(("198.51.100.0/24", f"{number}@spam.example", "c@d.example"), 2.0)
    # Those in the flood's own shard are gone: one in 256 of them, by a chance that the client cannot help.
    assert sum(triplets.get(other) is not None for other in others) > 180


@pytest.mark.parametrize(("put", "kept"), [("abac", "ac"), ("abc", "bc"), ("abb", "ab")])
def test_the_longest_untouched_is_forgotten_first(put: str, kept: str) -> None:
    triplets = Triplets(shards=1, size=2)
    for sender in put:
        triplets.put(("block", sender, "x"), 1.0)
    assert "".join(sender for sender in "abc" if triplets.get(("block", sender, "x")) is not None) == kept


@pytest.mark.parametrize("delay", [0, -1, float("nan"), float("inf"), "300", True, RETRY_WINDOW_SECONDS])
def test_a_delay_that_cannot_be_is_refused(delay: Any) -> None:
    with pytest.raises(ValueError, match=r"delay (is|must be)"):
        plugins.greylist(delay)
