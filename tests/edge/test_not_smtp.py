"""STARTTLS ports and clients that send something else than the dialogue expects: hidden STARTTLS, junk, other protocols, TLS."""

from __future__ import annotations

import pytest

from tests.edge.backends import StartBackend
from tests.edge.clients import Clients, Greet
from tests.edge.metrics import await_rejections
from tests.edge.program import StartEdge
from tests.edge.replies import READY
from tests.support.peer import Peer
from tests.support.waiting import until


def insists_on_tls(peer: Peer) -> None:
    """A backend that accepts mail and AUTH only from clients with TLS, according to the header."""
    peer.say(b"220 backend.test ESMTP\r\n")
    while line := peer.line():
        peer.heard.append(line)
        verb = line.split()[0].upper()
        if verb in (b"MAIL", b"AUTH") and peer.header.tls is None:
            peer.say({b"MAIL": b"530 5.7.0 STARTTLS first\r\n", b"AUTH": b"538 5.7.11 Encryption required\r\n"}[verb])
        elif verb == b"DATA":
            peer.say(b"354 go ahead\r\n")
            while (content := peer.line()) not in (b".\r\n", b""):
                peer.heard.append(content)
            peer.say(b"250 2.0.0 queued\r\n")
        else:
            peer.say(b"250 2.0.0 ok\r\n")


@pytest.mark.parametrize("command", [b"MAIL FROM:<a@b>\r\n", b"AUTH PLAIN AGEAYg==\r\n"])
def test_a_client_whose_backend_insists_on_tls_can_upgrade_then_and_send(
    backend: StartBackend, edge: StartEdge, clients: Clients, greeted: Greet, command: bytes
) -> None:
    server = backend(insists_on_tls)
    program = edge(backend=server)
    client = greeted(program)
    client.ask(b"EHLO plain.test\r\n")
    assert client.ask(command)[0][:3] in (b"530", b"538")
    assert client.ask(command)[0][:3] in (b"530", b"538")
    client = clients.starttls(client)
    mail = [b"EHLO secure.test\r\n", b"MAIL FROM:<a@b>\r\n", b"RCPT TO:<c@d>\r\n", b"DATA\r\n"]
    assert [client.ask(line)[0][:3] for line in mail] == [b"250", b"250", b"250", b"354"]
    assert client.ask(b"hello\r\n.\r\n") == [b"250 2.0.0 queued\r\n"]
    assert server.peer(1).heard == [*mail, b"hello\r\n"]
    until(lambda: program.metric("fumi_edge_starttls_total", result="upgraded") == 1, "the upgrade")


def test_starttls_inside_a_message_that_comes_with_its_envelope_is_only_text(
    backend: StartBackend, edge: StartEdge, greeted: Greet
) -> None:
    server = backend()
    client = greeted(edge(backend=server))
    envelope = [b"MAIL FROM:<a@b>\r\n", b"RCPT TO:<c@d>\r\n", b"DATA\r\n"]
    content = [b"Subject: x\r\n", b"\r\n", b"STARTTLS\r\n", b"EHLO me\r\n", b"STARTTLS\r\n"]
    client.say(b"".join([*envelope, *content, b".\r\n", b"QUIT\r\n"]))
    assert [client.line()[:3] for _ in range(5)] == [b"250", b"250", b"354", b"250", b"221"]
    assert client.rest() == b""
    assert server.peer().heard == [*envelope, *content, b"QUIT\r\n"]
    assert len(server.peers) == 1


def test_a_response_to_an_auth_challenge_is_no_command(backend: StartBackend, edge: StartEdge, greeted: Greet) -> None:
    """STARTTLS is good base64."""

    def handler(peer: Peer) -> None:
        peer.say(b"220 hi\r\n")
        for answer in (b"334 VXNlcm5hbWU6\r\n", b"334 UGFzc3dvcmQ6\r\n", b"235 2.7.0 welcome\r\n", b"250 ok\r\n"):
            peer.heard.append(peer.line())
            peer.say(answer)

    server = backend(handler)
    client = greeted(edge(backend=server))
    said = [b"AUTH LOGIN\r\n", b"STARTTLS\r\n", b"c2VjcmV0\r\n", b"NOOP\r\n"]
    assert [client.ask(line)[0][:3] for line in said] == [b"334", b"334", b"235", b"250"]
    assert server.peer().heard == said


@pytest.mark.parametrize(
    "line", [b"STARTTLS\x0b\r\n", b"STARTTLS\x0c\r\n", b"STARTTLS\r\r\n", b"STARTTLS\xa0\r\n", b"STARTTLS\0\r\n"]
)
def test_what_only_looks_like_starttls_does_not_upgrade(
    backend: StartBackend, edge: StartEdge, greeted: Greet, line: bytes
) -> None:
    program = edge(backend=backend())
    client = greeted(program)
    assert not client.ask(line)[0].startswith(b"220")
    assert client.ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    assert program.metric("fumi_edge_starttls_total", result="upgraded") == 0


NOT_SMTP = [b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10", b"\xff\xfe\x00\x01" * 300, b"\xff\xfe\x00\x01\n" * 3]
HTTP = [b"GET / HTTP/1.1\r\nHost: x\r\nAccept: y\r\n\r\n", b"POST /a HTTP/1.0\r\n\r\nMAIL FROM:<a@b>\r\n"]


@pytest.mark.parametrize(
    ("flags", "hellos"), [((), NOT_SMTP), (("--require-tls",), NOT_SMTP + HTTP)], ids=["", "require-tls"]
)  # fmt: skip
def test_a_client_that_does_not_send_smtp_gets_one_554_and_is_disconnected(
    backend: StartBackend, edge: StartEdge, greeted: Greet, flags: tuple[str, ...], hellos: list[bytes]
) -> None:
    server = backend()
    program = edge(*flags, backend=server)
    for number, hello in enumerate(hellos, 1):
        client = greeted(program)
        client.say(hello)
        words = client.rest()
        assert words.startswith(b"554 5.5.1 ")
        assert words.count(b"\n") == 1
        client.close()
        await_rejections(program, "not_smtp", number)
    assert [entry["reason"] for entry in program.ended(len(hellos))] == ["not_smtp"] * len(hellos)
    assert not {line for peer in server.peers for line in peer.heard} - {b"QUIT\r\n"}


def test_with_require_tls_junk_ends_after_some_errors_with_a_421(backend: StartBackend, edge: StartEdge, greeted: Greet) -> None:
    server = backend()
    program = edge("--require-tls", backend=server)
    client = greeted(program)
    client.say(b"X\r\n" * 5000)
    words = client.rest().splitlines()
    assert words[-1].startswith(b"421 4.7.0 ")
    assert all(line.startswith(b"530 ") for line in words[:-1])
    assert 0 < len(words) < 100
    client.close()
    program.ended()
    # Who makes the odd mistake is not bothered.
    other = greeted(program)
    assert other.ask(b"X\r\n")[0].startswith(b"530 ")
    assert other.ask(b"STARTTLS\r\n") == READY


@pytest.mark.parametrize("hello", [b"\x16\x03\x01\x02\x00\x01\x00", b"\0\0\0\n", b"\x16\x03\x01\n\n"])
def test_tls_and_other_binary_data_on_a_starttls_port_is_rejected(
    backend: StartBackend, edge: StartEdge, greeted: Greet, hello: bytes
) -> None:
    program = edge(backend=backend())
    client = greeted(program)
    client.say(hello)
    assert client.rest().startswith(b"554 5.5.1 ")
    client.close()
    program.ended()
    assert program.metric("fumi_edge_rejected_total", reason="not_smtp") == 1
