"""STARTTLS ports against the real program: the offer, the upgrade, and that nothing said in plaintext survives it."""

from __future__ import annotations

import socket
import threading

import pytest

READY = [b"220 2.0.0 Ready to start TLS\r\n"]
GREETED = [b"250-backend.test\r\n", b"250-PIPELINING\r\n", b"250-SIZE 1000\r\n", b"250 STARTTLS\r\n"]


@pytest.fixture
def greeted(clients):
    """A client that has the banner."""

    def greeted(program):
        client = clients.plain(program.starttls_port)
        assert client.reply()[-1].startswith(b"220")
        return client

    return greeted


def starttls_total(program, kit, result, count=1):
    kit.until(lambda: program.metric("fumi_edge_starttls_total", result=result) == count, f"starttls_total {result}")


def test_a_client_upgrades_and_the_backend_is_told_on_a_new_connection(backend, edge, clients, greeted, kit):
    server = backend()
    program = edge(backend=server)
    client = greeted(program)
    assert client.ask(b"EHLO plain.test\r\n") == GREETED
    assert client.ask(b"STARTTLS\r\n") == READY
    client = clients.upgrade(client)
    assert client.ask(b"EHLO secure.test\r\n") == [b"250-backend.test\r\n", b"250-PIPELINING\r\n", b"250 SIZE 1000\r\n"]
    assert client.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
    assert client.rest() == b""
    first, second = server.peer(0), server.peer(1)
    assert first.header.tls is None
    assert second.header.tls.version == "TLSv1.3"
    assert second.header.tls.sni == "localhost"
    assert first.header.unique_id == second.header.unique_id
    assert first.header.source == second.header.source
    kit.until(lambda: b"QUIT\r\n" in first.heard, "the first connection's QUIT")
    assert first.heard == [b"EHLO plain.test\r\n", b"QUIT\r\n"]
    assert second.heard == [b"EHLO secure.test\r\n", b"QUIT\r\n"]
    starttls_total(program, kit, "upgraded")
    assert len(server.peers) == 2


@pytest.mark.parametrize("behind", [b"EHLO x\r\n", b"MAIL FROM:<a@example.org>\r\n", b"\r\n", b"x"])
def test_bytes_behind_starttls_are_refused_and_never_reach_the_backend(backend, edge, greeted, kit, behind):
    server = backend()
    program = edge(backend=server)
    client = greeted(program)
    client.ask(b"EHLO plain.test\r\n")
    assert client.ask(b"STARTTLS\r\n" + behind)[0].startswith(b"554 5.7.0 ")
    assert client.rest() == b""
    starttls_total(program, kit, "injection")
    assert program.metric("fumi_edge_rejected_total", reason="injection") == 1
    kit.until(lambda: b"QUIT\r\n" in server.peer().heard, "QUIT")
    assert server.peer().heard == [b"EHLO plain.test\r\n", b"QUIT\r\n"]
    assert len(server.peers) == 1


def test_ehlo_and_starttls_may_come_in_one_packet(backend, edge, clients, greeted):
    program = edge(backend=backend())
    client = greeted(program)
    client.say(b"EHLO x\r\nSTARTTLS\r\n")
    assert client.reply() == GREETED
    assert client.reply() == READY
    client = clients.upgrade(client)
    assert client.ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]


def test_ehlo_may_come_byte_by_byte(backend, edge, clients, greeted):
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


def test_a_backend_that_offers_starttls_itself_is_not_offered_twice(backend, edge, greeted):
    def handler(peer):
        peer.say(b"220 hi\r\n")
        peer.line()
        peer.say(b"250-hi\r\n250-starttls\r\n250 SIZE\r\n")
        peer.rest()

    program = edge(backend=backend(handler))
    assert greeted(program).ask(b"EHLO x\r\n") == [b"250-hi\r\n", b"250-starttls\r\n", b"250 SIZE\r\n"]


def test_hide_starttls_hides_it_and_takes_it_all_the_same(backend, edge, clients, greeted):
    program = edge("--hide-starttls", backend=backend())
    client = greeted(program)
    assert client.ask(b"EHLO x\r\n") == [b"250-backend.test\r\n", b"250-PIPELINING\r\n", b"250 SIZE 1000\r\n"]
    assert client.ask(b"STARTTLS\r\n") == READY
    assert clients.upgrade(client).ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]


def test_banners_of_several_lines_are_relayed_and_then_swallowed_whole(backend, edge, clients):
    def handler(peer):
        for part in (b"220-first\r\n22", b"0-second\r", b"\n220 third\r\n"):
            peer.say(part)
        while line := peer.line():
            peer.say(b"250 " + line)

    program = edge(backend=backend(handler))
    client = clients.plain(program.starttls_port)
    assert client.reply() == [b"220-first\r\n", b"220-second\r\n", b"220 third\r\n"]
    assert client.ask(b"STARTTLS\r\n") == READY
    assert clients.upgrade(client).ask(b"NOOP me\r\n") == [b"250 NOOP me\r\n"]


def test_a_slow_banner_is_waited_for_and_commands_wait_with_it(backend, edge, clients, kit):
    go = threading.Event()

    def handler(peer):
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


def test_a_banner_that_refuses_is_relayed_with_what_follows(backend, edge, clients):
    def handler(peer):
        peer.say(b"554-go\r\n554 away\r\n")
        while line := peer.line():
            peer.say(b"221 bye\r\n" if line.startswith(b"QUIT") else b"503 bad sequence\r\n")

    client = clients.plain(edge(backend=backend(handler)).starttls_port)
    assert client.reply() == [b"554-go\r\n", b"554 away\r\n"]
    assert client.ask(b"EHLO x\r\n") == [b"503 bad sequence\r\n"]
    assert client.ask(b"QUIT\r\n") == [b"221 bye\r\n"]


@pytest.mark.parametrize("last", [b"554 go away\r\n", b"421 4.7.0 busy\r\n", b"220 cut of", b"220-cut\r\n"])
def test_a_backend_that_closes_behind_its_banner_has_its_words_relayed(backend, edge, clients, last):
    server = backend(lambda peer: peer.say(last))
    program = edge(backend=server)
    client = clients.plain(program.starttls_port)
    assert client.rest() == last
    client.close()
    assert program.ended()[0]["reason"] == "backend_closed"
    assert len(server.peers) == 1


def test_helo_will_do_before_starttls_and_ehlo_may_come_again(backend, edge, clients, greeted):
    program = edge(backend=backend())
    client = greeted(program)
    assert client.ask(b"HELO x\r\n") == [b"250 2.0.0 ok\r\n"]
    for _ in range(3):
        assert client.ask(b"EHLO x\r\n") == GREETED
    assert client.ask(b"HELO x\r\n") == [b"250 2.0.0 ok\r\n"]
    assert client.ask(b"STARTTLS\r\n") == READY
    assert clients.upgrade(client).ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]


def test_a_handshake_that_never_begins_after_the_220_is_given_up(backend, edge, greeted, kit):
    server = backend()
    program = edge("--handshake-timeout", "0.3", backend=server)
    client = greeted(program)
    assert client.ask(b"STARTTLS\r\n") == READY
    assert client.rest() == b""
    client.close()
    assert program.ended()[0]["reason"] == "handshake_timeout"
    starttls_total(program, kit, "refused")
    assert len(server.peers) == 1


def test_a_second_banner_that_refuses_answers_the_first_command(backend, edge, clients, greeted):
    def handler(peer):
        if peer.header.tls:
            peer.say(b"554-go\r\n554 away\r\n")
            return
        peer.say(b"220 hi\r\n")
        peer.rest()

    program = edge(backend=backend(handler))
    client = greeted(program)
    assert client.ask(b"STARTTLS\r\n") == READY
    client = clients.upgrade(client)
    assert client.ask(b"EHLO x\r\n") == [b"554-go\r\n", b"554 away\r\n"]
    assert client.rest() == b""
    client.close()
    assert program.ended()[0]["reason"] == "backend_refused"
    assert program.metric("fumi_edge_backend_errors_total", reason="banner") == 1


def test_a_backend_that_is_gone_after_the_upgrade_is_a_421_to_the_first_command(backend, edge, clients, greeted):
    server = backend()
    program = edge(backend=server)
    client = greeted(program)
    assert client.ask(b"STARTTLS\r\n") == READY
    server.close()
    client = clients.upgrade(client)
    assert client.ask(b"EHLO x\r\n")[0].startswith(b"421 4.3.2 ")
    assert client.rest() == b""


def test_without_a_backend_the_client_gets_421(edge, clients, backend):
    server = backend()
    server.close()
    program = edge(backend=server)
    assert clients.plain(program.starttls_port).rest().startswith(b"421 4.3.2 ")


def test_require_tls_lets_nothing_through_but_what_leads_to_tls(backend, edge, clients, greeted, kit):
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
    assert client.ask(b"STARTTLS\r\n") == READY
    assert clients.upgrade(client).ask(b"MAIL FROM:<a@b>\r\n") == [b"250 2.0.0 ok\r\n"]
    plain = greeted(program)
    assert plain.ask(b"MAIL FROM:<a@b>\r\n") == refused
    assert plain.ask(b"QUIT\r\n") == [b"221 2.0.0 bye\r\n"]
    assert plain.rest() == b""
    plain.close()
    starttls_total(program, kit, "refused")
    assert not any(line.upper().startswith((b"MAIL", b"RCPT")) for line in server.peer(0).heard + server.peer(2).heard)


def test_a_client_that_never_upgrades_is_passed_through_untouched(backend, edge, greeted, kit):
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
    starttls_total(program, kit, "plaintext")
    assert len(server.peers) == 1


def test_a_client_may_upgrade_after_a_message_in_plaintext(backend, edge, clients, greeted, kit):
    """STARTTLS is answered for as long as it was offered; what a message holds is no command."""
    server = backend()
    program = edge(backend=server)
    client = greeted(program)
    assert client.ask(b"EHLO x\r\n") == GREETED
    for _ in range(2):
        client.say(b"MAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n")
        assert [client.reply()[0][:3] for _ in range(3)] == [b"250", b"250", b"354"]
        assert client.ask(b"STARTTLS\r\n\n.\nSTARTTLS\r\n.\r\n") == [b"250 2.0.0 queued\r\n"]
    assert client.ask(b"STARTTLS\r\n") == READY
    assert clients.upgrade(client).ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]
    assert server.peer(1).header.tls is not None
    starttls_total(program, kit, "upgraded")


def test_bytes_after_starttls_are_refused_after_a_message_too(backend, edge, greeted):
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
def test_a_long_message_in_plaintext_arrives_as_it_is(backend, edge, greeted, kit, way, slow):
    text = b"".join(b"line %d \0\xff\n.\r\n..\r\n" % number for number in range(200_000))
    whole = text + b"\r\n.\r\n" if way == "DATA" else text
    received = []

    def handler(peer):
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
        received.append(kit.hash(b"".join(pieces)))
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
    assert received == [kit.hash(whole)]
    assert client.ask(b"STARTTLS\r\n") == READY


@pytest.mark.parametrize("end", ["close", "reset", "end"])
@pytest.mark.parametrize("opening", [b"DATA\r\n", b"BDAT 10 LAST\r\n"])
def test_a_message_that_breaks_off_in_plaintext_is_not_made_whole(backend, edge, greeted, kit, opening, end):
    """A QUIT of the edge's would be the last six octets of this chunk."""
    heard = []

    def handler(peer):
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
    assert kit.until(lambda: heard, "the end")[0] in (b"text", b"" if end == "reset" else b"text")


def test_a_whole_pipelined_message_in_plaintext_passes(backend, edge, greeted):
    server = backend()
    program = edge(backend=server)
    client = greeted(program)
    client.say(b"EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nSTARTTLS\r\n.\r\nQUIT\r\n")
    assert client.reply() == GREETED
    assert [client.reply()[0][:3] for _ in range(5)] == [b"250", b"250", b"354", b"250", b"221"]
    assert client.rest() == b""


def test_a_line_that_is_too_long_is_refused_and_forgotten(backend, edge, greeted, kit):
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


def test_a_long_auth_line_is_left_to_the_backend(backend, edge, greeted):
    server = backend()
    program = edge(backend=server)
    client = greeted(program)
    line = b"AUTH PLAIN " + b"A" * 10_000 + b"\r\n"
    assert client.ask(line) == [b"250 2.0.0 ok\r\n"]
    assert server.peer().heard == [line]


def test_starttls_takes_no_argument(backend, edge, greeted, clients):
    program = edge(backend=backend())
    client = greeted(program)
    assert client.ask(b"STARTTLS now\r\n")[0].startswith(b"501 5.5.4 ")
    assert client.ask(b"starttls \r\n") == READY
    assert clients.upgrade(client).ask(b"NOOP\r\n") == [b"250 2.0.0 ok\r\n"]


def test_a_handshake_that_fails_after_the_220_ends_the_connection(backend, edge, greeted, kit):
    server = backend()
    program = edge(backend=server)
    client = greeted(program)
    assert client.ask(b"STARTTLS\r\n") == READY
    client.say(b"EHLO in plaintext\r\n")
    client.rest()
    client.close()
    assert program.ended()[0]["reason"] == "handshake_protocol"
    starttls_total(program, kit, "refused")
    assert len(server.peers) == 1


def test_what_the_backend_says_when_it_closes_is_relayed(backend, edge, clients):
    go = threading.Event()

    def handler(peer):
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


def test_silence_before_the_upgrade_is_a_421(backend, edge, greeted):
    program = edge("--idle-timeout", "1", "--log-level", "debug", backend=backend())
    client = greeted(program)
    assert client.rest() == b"421 4.4.2 Error: timeout exceeded\r\n"
    client.close()
    assert program.ended()[0]["reason"] == "idle_timeout"


@pytest.mark.parametrize("hello", [b"\x16\x03\x01\x02\x00\x01\x00", b"\0\0\0\n", b"\x16\x03\x01\n\n"])
def test_tls_and_other_binary_on_a_starttls_port_is_turned_away(backend, edge, greeted, hello):
    program = edge(backend=backend())
    client = greeted(program)
    client.say(hello)
    assert client.rest().startswith(b"554 5.5.1 ")
    client.close()
    program.ended()
    assert program.metric("fumi_edge_rejected_total", reason="not_smtp") == 1


def test_commands_that_come_before_the_banner_are_answered_in_order(backend, edge, clients):
    program = edge(backend=backend())
    client = clients.plain(program.starttls_port)
    client.say(b"NOOP\r\nEHLO x\r\n")
    assert client.reply() == [b"220 backend.test ESMTP\r\n"]
    assert client.reply() == [b"250 2.0.0 ok\r\n"]
    assert client.reply() == GREETED


def test_many_clients_upgrade_at_once(backend, edge, clients, kit):
    program = edge(backend=backend())
    failures = []

    def session():
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
    starttls_total(program, kit, "upgraded", 60)
