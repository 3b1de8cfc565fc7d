"""Clients of a STARTTLS port that never upgrade: their messages pass unchanged, and nothing in them is a command."""

from __future__ import annotations

from hashlib import sha256

import pytest

from tests.edge.backends import StartBackend
from tests.edge.clients import Clients, Greet
from tests.edge.metrics import starttls_total
from tests.edge.program import StartEdge
from tests.edge.replies import GREETED, READY
from tests.support.peer import Peer
from tests.support.waiting import until


def test_a_client_that_never_upgrades_is_passed_through_untouched(backend: StartBackend, edge: StartEdge, greeted: Greet) -> None:
    server = backend()
    program = edge(backend=server)
    client = greeted(program)
    said = [b"EHLO x\r\n", b"MAIL FROM:<a@b>\r\n", b"RCPT TO:<c@d>\r\n", b"DATA\r\n"]
    for command in said:
        assert client.ask(command)[0][:1] in b"23"
    content = [b"Subject: STARTTLS\r\n", b"\r\n", b"STARTTLS\r\n", b"EHLO me\r\n", b"bare\n", b"nul \0\r\n"]
    assert client.ask(b"".join(content) + b".\r\n") == [b"250 2.0.0 queued\r\n"]
    assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
    assert client.rest() == b""
    assert server.peer().heard == [*said, *content, b"QUIT\r\n"]
    assert server.peer().header.tls is None
    starttls_total(program, "plaintext")
    assert len(server.peers) == 1


def test_a_client_may_upgrade_after_a_message_in_plaintext(
    backend: StartBackend, edge: StartEdge, clients: Clients, greeted: Greet
) -> None:
    """STARTTLS is answered for as long as it was offered; what a message holds is no command."""
    server = backend()
    program = edge(backend=server)
    client = greeted(program)
    assert client.ask(b"EHLO x\r\n") == GREETED
    for _ in range(2):
        client.say(b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n")
        assert [client.reply()[0][:3] for _ in range(3)] == [b"250", b"250", b"354"]
        assert client.ask(b"STARTTLS\r\n\n.\nSTARTTLS\r\n.\r\n") == [b"250 2.0.0 queued\r\n"]
    assert clients.starttls(client).ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    assert server.peer(1).header.tls is not None
    starttls_total(program, "upgraded")


def test_bytes_after_starttls_are_refused_after_a_message_too(backend: StartBackend, edge: StartEdge, greeted: Greet) -> None:
    server = backend()
    program = edge(backend=server)
    client = greeted(program)
    assert client.ask(b"EHLO x\r\n") == GREETED
    client.ask(b"DATA\r\n")
    client.say(b"text\r\n.\r\nSTARTTLS\r\nMAIL FROM:<evil@b>\r\n")
    assert client.rest().splitlines()[1][:3] == b"554"
    assert not any(line.startswith(b"MAIL") for line in server.peer().heard)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("way", ["DATA", "BDAT"])
def test_a_long_message_in_plaintext_arrives_as_it_is(
    backend: StartBackend, edge: StartEdge, greeted: Greet, way: str, slow: bool
) -> None:
    text = b"".join(b"line %d \0\xff\n.\r\n..\r\n" % number for number in range(200_000))
    whole = text + b"\r\n.\r\n" if way == "DATA" else text
    received = []

    def handler(peer: Peer) -> None:
        peer.say(b"220 hi\r\n")
        peer.line()
        peer.say(b"250 hi\r\n")
        peer.line()
        if way == "DATA":
            peer.say(b"354 go\r\n")
        size = 0
        pieces = [peer._buffered]
        while (size := size + len(pieces[-1])) < len(whole):
            pieces.append(peer.sock.recv(5_000 if slow else 262_144))
        received.append(sha256(b"".join(pieces)).digest())
        peer._buffered = b""
        peer.say(b"250 queued\r\n")
        peer.rest()

    program = edge(backend=backend(handler))
    client = greeted(program)
    client.ask(b"EHLO x\r\n")
    if way == "DATA":
        assert client.ask(b"DATA\r\n") == [b"354 go\r\n"]
    else:
        client.say(b"BDAT %d LAST\r\n" % len(whole))
    assert client.ask(whole) == [b"250 queued\r\n"]
    assert received == [sha256(whole).digest()]
    assert client.ask(b"STARTTLS\r\n") == READY


@pytest.mark.parametrize("end", ["close", "reset", "end"])
@pytest.mark.parametrize("opening", [b"DATA\r\n", b"BDAT 10 LAST\r\n"])
def test_a_message_cut_off_in_plaintext_is_not_completed(
    backend: StartBackend, edge: StartEdge, greeted: Greet, opening: bytes, end: str
) -> None:
    """A QUIT of the edge's would be the last six octets of this chunk."""
    heard = []

    def handler(peer: Peer) -> None:
        peer.say(b"220 hi\r\n")
        peer.line()
        peer.say(b"250 hi\r\n")
        if peer.line() == b"DATA\r\n":
            peer.say(b"354 go\r\n")
        try:
            heard.append(peer.rest())
        except ConnectionResetError:
            heard.append(b"text")

    program = edge(backend=backend(handler))
    client = greeted(program)
    client.ask(b"EHLO x\r\n")
    client.say(opening)
    if opening == b"DATA\r\n":
        client.reply()
    client.say(b"text")
    getattr(client, end)()
    # A reset may overtake the text.
    assert until(lambda: heard, "the end")[0] in (b"text", b"" if end == "reset" else b"text")


def test_a_whole_pipelined_message_in_plaintext_passes(backend: StartBackend, edge: StartEdge, greeted: Greet) -> None:
    server = backend()
    program = edge(backend=server)
    client = greeted(program)
    client.say(b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nSTARTTLS\r\n.\r\nQUIT\r\n")
    assert client.reply() == GREETED
    assert [client.reply()[0][:3] for _ in range(5)] == [b"250", b"250", b"354", b"250", b"221"]
    assert client.rest() == b""


def test_a_line_that_is_too_long_is_refused_and_forgotten(backend: StartBackend, edge: StartEdge, greeted: Greet) -> None:
    server = backend()
    program = edge(backend=server)
    client = greeted(program)
    before = program.memory()
    client.say(b"NOOP ")
    for _ in range(100):
        client.say(b"x" * 65536)
    assert client.ask(b"\r\n")[0].startswith(b"500 5.5.2 ")
    assert program.memory() - before < 3 << 20
    assert client.ask(b"NOOP after\r\n") == [b"250 2.0.0 ok\r\n"]
    assert server.peer().heard == [b"NOOP after\r\n"]


def test_a_long_auth_line_is_left_to_the_backend(backend: StartBackend, edge: StartEdge, greeted: Greet) -> None:
    server = backend()
    program = edge(backend=server)
    client = greeted(program)
    line = b"AUTH PLAIN " + b"A" * 10_000 + b"\r\n"
    assert client.ask(line) == [b"250 2.0.0 ok\r\n"]
    assert server.peer().heard == [line]


def test_starttls_takes_no_argument(backend: StartBackend, edge: StartEdge, greeted: Greet, clients: Clients) -> None:
    program = edge(backend=backend())
    client = greeted(program)
    assert client.ask(b"STARTTLS now\r\n")[0].startswith(b"501 5.5.4 ")
    assert client.ask(b"starttls \r\n") == READY
    assert clients.upgrade(client).ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
