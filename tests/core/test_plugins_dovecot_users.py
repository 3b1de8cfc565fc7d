"""RCPT is accepted for users that exist in Dovecot, and deferred while Dovecot is unavailable."""

from __future__ import annotations

import pytest

from fumi_core import Fumi, plugins
from fumi_core.testing import running
from tests.core.client import Client, Connect
from tests.core.dovecot_server import AUTH_HANDSHAKE, USERDB_HANDSHAKE, Peer, StartDovecot
from tests.support.ports import free_port

KNOWN = b"250 2.1.5 Ok\r\n"
UNKNOWN = b"550 5.1.1 Recipient address rejected: User unknown\r\n"
TEMPORARY = b"451 4.3.0 Recipient address rejected: Temporary lookup failure\r\n"


def build(address: str, **more: str) -> Fumi:
    return Fumi(auth_optional=True, close_timeout=0.2, lenient_addresses=True).use(plugins.dovecot_users(address, **more))


def ready(client: Client) -> Client:
    client.say("EHLO client.example")
    assert client.say("MAIL FROM:<a@b.example>").startswith(b"250")
    return client


@pytest.mark.parametrize(
    ("recipient", "user"),
    [
        ("joe@d.example", "joe@d.example"),
        ("joe+news@d.example", "joe@d.example"),
        ("joe+a+b@D.example", "joe@D.example"),
        ("+joe@d.example", "+joe@d.example"),
        ('"joe"@d.example', "joe@d.example"),
        ('"joe\\ x+y"@d.example', "joe x@d.example"),
        ("Postmaster", "Postmaster"),
        ('"a\\\\b"@d.example', "a\\b@d.example"),
    ],
)
def test_the_user_is_the_address_without_quotes_and_detail(
    dovecot: StartDovecot, connect: Connect, recipient: str, user: str
) -> None:
    asked: list[list[str]] = []

    def serve(peer: Peer) -> None:
        peer.raw(USERDB_HANDSHAKE)
        for fields in peer.lines():
            asked.append(fields)
            if fields[0] == "USER":
                peer.send("USER", fields[1], fields[2], "uid=8")

    with running(build(dovecot(serve).address)) as server:
        assert ready(connect(server.port)).say(f"RCPT TO:<{recipient}>") == KNOWN
    assert asked == [["VERSION", "1", "1"], ["USER", "1", user, "service=smtp"]]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (["USER", "joe@d.example", "uid=8", "home=/home/jo\x01t"], KNOWN),
        (["NOTFOUND"], UNKNOWN),
        (["FAIL"], TEMPORARY),
        (["FAIL", "reason=no"], TEMPORARY),
        (["OK", "user=joe"], TEMPORARY),
        (["CONT", ""], TEMPORARY),
    ],
    ids=str,
)
def test_dovecots_answers_lead_to_these_replies(
    dovecot: StartDovecot, connect: Connect, reply: list[str], expected: bytes
) -> None:
    def serve(peer: Peer) -> None:
        peer.raw(USERDB_HANDSHAKE)
        for fields in peer.requests():
            peer.send(reply[0], fields[1], *reply[1:])

    with running(build(dovecot(serve).address)) as server:
        assert ready(connect(server.port)).say("RCPT TO:<joe@d.example>") == expected


def test_recipients_of_all_clients_share_a_connection(dovecot: StartDovecot, connect: Connect) -> None:
    def serve(peer: Peer) -> None:
        peer.raw(USERDB_HANDSHAKE)
        for fields in peer.requests():
            peer.send("USER" if fields[2].startswith("joe@") else "NOTFOUND", fields[1], fields[2])

    fake = dovecot(serve)
    with running(build(fake.address)) as server:
        for client in (ready(connect(server.port)) for _ in range(3)):
            assert client.say("RCPT TO:<joe@d.example>") == KNOWN
            assert client.say("RCPT TO:<ann@d.example>") == UNKNOWN
    assert fake.connections == 1


def test_the_delimiter_is_a_choice(dovecot: StartDovecot, connect: Connect) -> None:
    def serve(peer: Peer) -> None:
        peer.raw(USERDB_HANDSHAKE)
        for fields in peer.requests():
            peer.send("USER" if fields[2] == "joe@d.example" else "NOTFOUND", fields[1], fields[2])

    fake = dovecot(serve)
    for delimiter, plus, minus in (("-", UNKNOWN, KNOWN), ("+-", KNOWN, KNOWN), ("", UNKNOWN, UNKNOWN)):
        with running(build(fake.address, recipient_delimiter=delimiter)) as server:
            client = ready(connect(server.port))
            assert client.say("RCPT TO:<joe+x@d.example>") == plus
            assert client.say("RCPT TO:<joe-x@d.example>") == minus


@pytest.mark.parametrize("handshake", ["", "VERSION\t2\t0\nSPID\t1\n", AUTH_HANDSHAKE, "USER\t1\tjoe\n"], ids=repr)
def test_a_server_that_is_not_a_userdb_accepts_no_recipient(
    dovecot: StartDovecot, connect: Connect, handshake: str, caplog: pytest.LogCaptureFixture
) -> None:
    def serve(peer: Peer) -> None:
        peer.raw(handshake)
        if handshake:
            list(peer.lines())

    with running(build(dovecot(serve).address)) as server:
        client = ready(connect(server.port))
        assert client.say("RCPT TO:<joe@d.example>") == TEMPORARY
        assert client.say("RCPT TO:<joe@d.example>") == TEMPORARY
    assert len([record for record in caplog.records if "Dovecot" in record.getMessage()]) == 1


def test_without_a_dovecot_recipients_are_deferred(connect: Connect) -> None:
    with running(build(f"127.0.0.1:{free_port()}")) as server:
        assert ready(connect(server.port)).say("RCPT TO:<joe@d.example>") == TEMPORARY


@pytest.mark.parametrize("delimiter", ["a", "@", "/", ".", " ", "\n", "\u00e9", "+1"])
def test_a_delimiter_that_splits_names_is_an_error(delimiter: str) -> None:
    with pytest.raises(ValueError, match="delimit"):
        plugins.dovecot_users("unix:/run/dovecot/auth-userdb", recipient_delimiter=delimiter)
