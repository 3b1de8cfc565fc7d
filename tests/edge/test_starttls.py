"""STARTTLS ports against the real program: the offer, the upgrade, and that nothing said in plaintext survives it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest

from tests.edge.backends import StartBackend
from tests.edge.clients import Clients, Greet
from tests.edge.metrics import starttls_total
from tests.edge.program import StartEdge
from tests.edge.replies import GREETED, READY
from tests.support.peer import Peer
from tests.support.waiting import until


def test_after_an_upgrade_the_backend_gets_a_new_connection_with_the_tls_facts(
    backend: StartBackend, edge: StartEdge, clients: Clients, greeted: Greet
) -> None:
    server = backend()
    program = edge(backend=server)
    client = greeted(program)
    assert client.ask(b"EHLO plain.test\r\n") == GREETED
    client = clients.starttls(client)
    assert client.ask(b"EHLO secure.test\r\n") == [b"250-backend.test\r\n", b"250-PIPELINING\r\n", b"250 SIZE 1000\r\n"]
    assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
    assert client.rest() == b""
    first, second = server.peer(0), server.peer(1)
    assert first.header.tls is None
    assert second.client_tls.version == "TLSv1.3"
    assert second.client_tls.sni == "localhost"
    assert first.header.unique_id == second.header.unique_id
    assert first.header.source == second.header.source
    until(lambda: b"QUIT\r\n" in first.heard, "the first connection's QUIT")
    assert first.heard == [b"EHLO plain.test\r\n", b"QUIT\r\n"]
    assert second.heard == [b"EHLO secure.test\r\n", b"QUIT\r\n"]
    starttls_total(program, "upgraded")
    assert len(server.peers) == 2


@pytest.mark.parametrize("behind", [b"EHLO x\r\n", b"MAIL FROM:<a@example.org>\r\n", b"\r\n", b"x"])
def test_bytes_after_starttls_are_rejected_and_never_reach_the_backend(
    backend: StartBackend, edge: StartEdge, greeted: Greet, behind: bytes
) -> None:
    server = backend()
    program = edge(backend=server)
    client = greeted(program)
    client.ask(b"EHLO plain.test\r\n")
    assert client.ask(b"STARTTLS\r\n" + behind)[0].startswith(b"554 5.7.0 ")
    assert client.rest() == b""
    starttls_total(program, "injection")
    assert program.metric("fumi_edge_rejected_total", reason="injection") == 1
    until(lambda: b"QUIT\r\n" in server.peer().heard, "QUIT")
    assert server.peer().heard == [b"EHLO plain.test\r\n", b"QUIT\r\n"]
    assert len(server.peers) == 1


def test_ehlo_and_starttls_may_come_in_one_packet(
    backend: StartBackend, edge: StartEdge, clients: Clients, greeted: Greet
) -> None:
    program = edge(backend=backend())
    client = greeted(program)
    client.say(b"EHLO x\r\nSTARTTLS\r\n")
    assert client.reply() == GREETED
    assert client.reply() == READY
    client = clients.upgrade(client)
    assert client.ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]


def test_ehlo_may_come_byte_by_byte(backend: StartBackend, edge: StartEdge, clients: Clients, greeted: Greet) -> None:
    program = edge(backend=backend())
    client = greeted(program)
    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in b"EHLO bytes.test\r\n":
        client.say(bytes([byte]))
    assert client.reply() == GREETED
    for byte in b"STARTTLS\r\n":
        client.say(bytes([byte]))
    assert client.reply() == READY
    assert clients.upgrade(client).ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]


def test_a_backend_that_offers_starttls_itself_is_not_offered_twice(
    backend: StartBackend, edge: StartEdge, greeted: Greet
) -> None:
    def handler(peer: Peer) -> None:
        peer.say(b"220 hi\r\n")
        peer.line()
        peer.say(b"250-hi\r\n250-starttls\r\n250 SIZE\r\n")
        peer.rest()

    program = edge(backend=backend(handler))
    assert greeted(program).ask(b"EHLO x\r\n") == [b"250-hi\r\n", b"250-starttls\r\n", b"250 SIZE\r\n"]


def test_hide_starttls_hides_it_and_still_accepts_it(
    backend: StartBackend, edge: StartEdge, clients: Clients, greeted: Greet
) -> None:
    program = edge("--hide-starttls", backend=backend())
    client = greeted(program)
    assert client.ask(b"EHLO x\r\n") == [b"250-backend.test\r\n", b"250-PIPELINING\r\n", b"250 SIZE 1000\r\n"]
    assert clients.starttls(client).ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]


def test_the_first_banner_of_several_lines_is_relayed_and_the_second_is_not(
    backend: StartBackend, edge: StartEdge, clients: Clients
) -> None:
    def handler(peer: Peer) -> None:
        for part in (b"220-first\r\n22", b"0-second\r", b"\n220 third\r\n"):
            peer.say(part)
        while line := peer.line():
            peer.say(b"250 " + line)

    program = edge(backend=backend(handler))
    client = clients.plain(program.starttls_port)
    assert client.reply() == [b"220-first\r\n", b"220-second\r\n", b"220 third\r\n"]
    assert clients.starttls(client).ask(b"NOOP me\r\n") == [b"250 NOOP me\r\n"]


def test_a_slow_banner_is_waited_for_and_commands_wait_with_it(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    go = threading.Event()

    def handler(peer: Peer) -> None:
        peer.say(b"220-wait\r\n220 f")
        go.wait(20)
        peer.say(b"or it\r\n")
        while line := peer.line():
            peer.say(b"250 " + line)

    server = backend(handler)
    program = edge(backend=server)
    client = clients.plain(program.starttls_port)
    client.say(b"NOOP early\r\nSTARTTLS\r\n")
    server.peer()
    go.set()
    assert client.reply() == [b"220-wait\r\n", b"220 for it\r\n"]
    assert client.reply() == [b"250 NOOP early\r\n"]
    assert client.reply() == READY
    assert clients.upgrade(client).ask(b"NOOP\r\n") == [b"250 NOOP\r\n"]


def test_a_banner_that_refuses_is_relayed_with_what_follows(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    def handler(peer: Peer) -> None:
        peer.say(b"554-go\r\n554 away\r\n")
        while line := peer.line():
            peer.say(b"221 bye\r\n" if line.startswith(b"QUIT") else b"503 bad sequence\r\n")

    client = clients.plain(edge(backend=backend(handler)).starttls_port)
    assert client.reply() == [b"554-go\r\n", b"554 away\r\n"]
    assert client.ask(b"EHLO x\r\n") == [b"503 bad sequence\r\n"]
    assert client.ask(b"QUIT\r\n") == [b"221 bye\r\n"]


@pytest.mark.parametrize("last", [b"554 go away\r\n", b"421 4.7.0 busy\r\n", b"220 cut of", b"220-cut\r\n"])
def test_the_text_of_a_backend_that_closes_after_its_banner_is_relayed(
    backend: StartBackend, edge: StartEdge, clients: Clients, last: bytes
) -> None:
    server = backend(lambda peer: peer.say(last))
    program = edge(backend=server)
    client = clients.plain(program.starttls_port)
    assert client.rest() == last
    client.close()
    assert program.ended()[0]["reason"] == "backend_closed"
    assert len(server.peers) == 1


def test_helo_suffices_before_starttls_and_ehlo_may_be_repeated(
    backend: StartBackend, edge: StartEdge, clients: Clients, greeted: Greet
) -> None:
    program = edge(backend=backend())
    client = greeted(program)
    assert client.ask(b"HELO x\r\n") == [b"250 2.0.0 ok\r\n"]
    for _ in range(3):
        assert client.ask(b"EHLO x\r\n") == GREETED
    assert client.ask(b"HELO x\r\n") == [b"250 2.0.0 ok\r\n"]
    assert clients.starttls(client).ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]


def test_a_handshake_that_never_begins_after_the_220_is_given_up(backend: StartBackend, edge: StartEdge, greeted: Greet) -> None:
    server = backend()
    program = edge("--handshake-timeout", "0.3", backend=server)
    client = greeted(program)
    assert client.ask(b"STARTTLS\r\n") == READY
    assert client.rest() == b""
    client.close()
    assert program.ended()[0]["reason"] == "handshake_timeout"
    starttls_total(program, "refused")
    assert len(server.peers) == 1


def after_the_upgrade(banner: bytes) -> Callable[[Peer], None]:
    """A backend that sends this on the second connection, and closes it."""

    def handler(peer: Peer) -> None:
        peer.say(banner if peer.header.tls else b"220 hi\r\n")
        if not peer.header.tls:
            peer.rest()

    return handler


def test_a_second_banner_that_refuses_answers_the_first_command(
    backend: StartBackend, edge: StartEdge, clients: Clients, greeted: Greet
) -> None:
    program = edge(backend=backend(after_the_upgrade(b"554-go\r\n554 away\r\n")))
    client = clients.starttls(greeted(program))
    assert client.ask(b"EHLO x\r\n") == [b"554-go\r\n", b"554 away\r\n"]
    assert client.rest() == b""
    client.close()
    assert program.ended()[0]["reason"] == "backend_refused"
    assert program.metric("fumi_edge_backend_errors_total", reason="banner") == 1


def test_a_second_banner_that_is_cut_off_is_a_421_to_the_first_command(
    backend: StartBackend, edge: StartEdge, clients: Clients, greeted: Greet
) -> None:
    program = edge(backend=backend(after_the_upgrade(b"220-mail.example\r\n220 cut of")))
    client = clients.starttls(greeted(program))
    assert client.ask(b"EHLO x\r\n")[0].startswith(b"421 4.3.2 ")
    assert client.rest() == b""
    client.close()
    ended = program.ended()[0]
    assert (ended["reason"], ended["error"]) == ("backend_refused", "closed in the middle of its banner")
    assert program.metric("fumi_edge_backend_errors_total", reason="banner") == 1


def test_a_backend_that_is_down_after_the_upgrade_is_a_421_to_the_first_command(
    backend: StartBackend, edge: StartEdge, clients: Clients, greeted: Greet
) -> None:
    server = backend()
    program = edge(backend=server)
    client = greeted(program)
    assert client.ask(b"STARTTLS\r\n") == READY
    server.close()
    client = clients.upgrade(client)
    assert client.ask(b"EHLO x\r\n")[0].startswith(b"421 4.3.2 ")
    assert client.rest() == b""


def test_without_a_backend_the_client_gets_421(edge: StartEdge, clients: Clients, backend: StartBackend) -> None:
    server = backend()
    server.close()
    program = edge(backend=server)
    assert clients.plain(program.starttls_port).rest().startswith(b"421 4.3.2 ")


def test_require_tls_forwards_only_commands_that_may_precede_starttls(
    backend: StartBackend, edge: StartEdge, clients: Clients, greeted: Greet
) -> None:
    server = backend()
    program = edge("--require-tls", backend=server)
    client = greeted(program)
    refused = [b"530 5.7.0 Must issue a STARTTLS command first\r\n"]
    for command in (
        b"MAIL FROM:<a@b>",
        b"RCPT TO:<a@b>",
        b"DATA",
        b"AUTH PLAIN AAAA",
        b"VRFY a",
        b"XCLIENT NAME=x",
        b"BDAT 5 LAST",
        b"mail x",
    ):
        assert client.ask(command + b"\r\n") == refused
    assert client.ask(b"NOOP\rMAIL FROM:<a@b>\r\n") == refused
    for command in (b"HELO x", b"NOOP", b"RSET", b"HELP"):
        assert client.ask(command + b"\r\n") == [b"250 2.0.0 ok\r\n"]
    client.say(b"MAIL FROM:<a@b>\r\nNOOP\r\nMAIL FROM:<a@b>\r\n")
    assert [client.reply() for _ in range(3)] == [refused, [b"250 2.0.0 ok\r\n"], refused]
    assert client.ask(b"EHLO x\r\n") == GREETED
    assert clients.starttls(client).ask(b"MAIL FROM:<a@b>\r\n") == [b"250 2.0.0 ok\r\n"]
    plain = greeted(program)
    assert plain.ask(b"MAIL FROM:<a@b>\r\n") == refused
    assert plain.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
    assert plain.rest() == b""
    plain.close()
    starttls_total(program, "refused")
    assert not any(line.upper().startswith((b"MAIL", b"RCPT")) for line in server.peer(0).heard + server.peer(2).heard)


def test_a_handshake_that_fails_after_the_220_ends_the_connection(backend: StartBackend, edge: StartEdge, greeted: Greet) -> None:
    server = backend()
    program = edge(backend=server)
    client = greeted(program)
    assert client.ask(b"STARTTLS\r\n") == READY
    client.say(b"EHLO in plaintext\r\n")
    client.rest()
    client.close()
    assert program.ended()[0]["reason"] == "handshake_protocol"
    starttls_total(program, "refused")
    assert len(server.peers) == 1


def test_the_last_reply_of_a_closing_backend_is_relayed(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    go = threading.Event()

    def handler(peer: Peer) -> None:
        peer.say(b"220 hi\r\n")
        go.wait(20)
        peer.say(b"421 4.3.2 shutting down\r\n")

    program = edge(backend=backend(handler))
    client = clients.plain(program.starttls_port)
    assert client.line() == b"220 hi\r\n"
    go.set()
    assert client.rest() == b"421 4.3.2 shutting down\r\n"
    client.close()
    assert program.ended()[0]["reason"] == "backend_closed"


def test_silence_before_the_upgrade_is_a_421(backend: StartBackend, edge: StartEdge, greeted: Greet) -> None:
    program = edge("--idle-timeout", "1", "--log-level", "debug", backend=backend())
    client = greeted(program)
    assert client.rest() == b"421 4.4.2 Error: timeout exceeded\r\n"
    client.close()
    assert program.ended()[0]["reason"] == "idle_timeout"


def test_commands_that_come_before_the_banner_are_answered_in_order(
    backend: StartBackend, edge: StartEdge, clients: Clients
) -> None:
    program = edge(backend=backend())
    client = clients.plain(program.starttls_port)
    client.say(b"NOOP\r\nEHLO x\r\n")
    assert client.reply() == [b"220 backend.test ESMTP\r\n"]
    assert client.reply() == [b"250 2.0.0 ok\r\n"]
    assert client.reply() == GREETED


def test_many_clients_upgrade_at_once(backend: StartBackend, edge: StartEdge, clients: Clients) -> None:
    program = edge(backend=backend())
    failures = []

    def session() -> None:
        try:
            client = clients.plain(program.starttls_port)
            client.reply()
            client.ask(b"EHLO x\r\n")
            client.ask(b"STARTTLS\r\n")
            client = clients.upgrade(client)
            assert client.ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
            assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
            assert client.rest() == b""
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=session) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    starttls_total(program, "upgraded", 60)
