"""Next hops that are down, slow, broken or hostile: the client hears a 451 and keeps the mail, and nothing is left open."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from fumi_core import Fumi
from fumi_core.client import connection, pool
from fumi_core.client import hop as client_hop
from fumi_core.delivery.next_hop import target as next_hop
from fumi_core.program import builtin
from fumi_core.testing import RunningServer, running
from tests.core.client import Client, Connect
from tests.core.scripted_hop import Answer, Part, StartHop
from tests.support.waiting import until

DOWN = b"451 4.4.1 Next hop is not available, try again later\r\n"
LOST = b"451 4.4.2 Lost connection to the next hop\r\n"
LATE = b"451 4.4.2 Next hop timed out\r\n"
NONSENSE = b"451 4.5.0 Next hop protocol error\r\n"

Front = Callable[..., RunningServer]


@pytest.fixture
def front() -> Iterator[Front]:
    with ExitStack() as stack:

        def make(address: str, protocol: str = "smtp", **options: Any) -> RunningServer:
            app = builtin.build(f"{protocol}:{address}", name="front.example", close_timeout=0.2, **options)
            return stack.enter_context(running(app))

        yield make


def talk(client: Client, text: str = "hi") -> bytes:
    """A whole transaction; the first refusal, or the reply to the message."""
    client.say("EHLO client.example")
    for line in ("MAIL FROM:<a@b.example>", "RCPT TO:<c@d.example>"):
        reply: bytes = client.say(line)
        if not reply.startswith(b"250"):
            return reply
    client.say("DATA")
    return bytes(client.say(f"{text}\r\n."))


@pytest.mark.parametrize("protocol", ["smtp", "lmtp"])
@pytest.mark.parametrize(
    ("broken", "reply"),
    [
        ({"BANNER": b"421 4.3.2 busy\r\n"}, DOWN),
        ({"BANNER": b"554 5.3.2 no mail here\r\n"}, DOWN),
        ({"BANNER": None}, LOST),
        ({"BANNER": b"HTTP/1.1 400 Bad Request\r\n"}, NONSENSE),
        ({"BANNER": b"\x15\x03\x01\x00\x02\x02\x46" * 1000}, NONSENSE),
        ({"BANNER": b"220-" + b"x" * 3000 + b"\r\n220 hop\r\n"}, NONSENSE),
        ({"BANNER": [b"220-hop\r\n" * 1000] * 1000}, NONSENSE),
        ({"BANNER": b"220 hop\r\n250 at once\r\n"}, NONSENSE),
        ({"BANNER": b"220-hop\r\n250 hop\r\n"}, NONSENSE),
        ({"HELLO": None}, LOST),
        ({"HELLO": b"421 4.7.0 go away\r\n"}, DOWN),
        ({"HELLO": b"550 5.7.1 go away\r\n", "HELO": b"550 5.7.1 go away\r\n"}, DOWN),
        ({"HELLO": b"250-hop\r\n", "HELO": None}, None),
        ({"MAIL": None}, LOST),
        ({"MAIL": b"421 4.3.2 down\r\n"}, b"451 4.3.2 down\r\n"),
        ({"MAIL": b"354 go on\r\n"}, NONSENSE),
        ({"MAIL": b"999 what\r\n"}, NONSENSE),
        ({"RCPT": None}, LOST),
        ({"RCPT": b"421 4.3.2 down\r\n"}, b"451 4.3.2 down\r\n"),
        ({"RCPT": b"550\r\n"}, b"550 5.1.1\r\n"),
        ({"RCPT": b"550 5.1.1 n\xc3\xb6 \x00such\ruser\r\n"}, b"550-5.1.1 n?? ?such\r\n550 5.1.1 user\r\n"),
        ({"RCPT": b"250 Ok\r\n250 Ok\r\n"}, NONSENSE),
        ({"DATA": None}, LOST),
        ({"DATA": b"250 Ok\r\n"}, NONSENSE),
        ({"DATA": b"451 4.3.0 later\r\n"}, b"451 4.3.0 later\r\n"),
        ({"DATA": b"354 go on\r\n250 2.0.0 Ok: queued already\r\n"}, NONSENSE),
        ({".": None}, LOST),
        ({".": b"250"}, None),
        ({".": b"421 4.3.2 down\r\n"}, b"451 4.3.2 down\r\n"),
        ({".": b"354 go on\r\n"}, NONSENSE),
        ({".": [b"250-2.0.0 Ok\r\n", None]}, LOST),
    ],
    ids=str,
)
def test_a_broken_next_hop_is_a_451_and_the_session_goes_on(
    scripted_hop: StartHop,
    connect: Connect,
    front: Front,
    monkeypatch: pytest.MonkeyPatch,
    broken: dict[str, Answer],
    reply: bytes,
    protocol: str,
) -> None:
    if reply is None:  # half a reply, and then silence
        monkeypatch.setattr(connection, "MAIL_TIMEOUT", 0.3)
        monkeypatch.setattr(connection, "END_TIMEOUT", 0.3)
    if "HELLO" in broken:
        broken = {**broken, "LHLO" if protocol == "lmtp" else "EHLO": broken["HELLO"]}
    hop = scripted_hop(**broken)
    server = front(hop.address, protocol)
    client = connect(server.port)
    assert talk(client) == (reply or LATE)
    assert client.say("NOOP").startswith(b"250")
    assert client.say("QUIT").startswith(b"221")
    server.run(server.app.close)
    until(lambda: hop.open == 0)


def test_an_unreachable_next_hop_is_451(connect: Connect, front: Front, tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # and nobody listens
        assert talk(connect(front(f"127.0.0.1:{sock.getsockname()[1]}").port)) == DOWN
    assert talk(connect(front(f"unix:{tmp_path / 'nothing'}").port)) == DOWN
    assert talk(connect(front("no-such-host.invalid:25").port)) == DOWN


@pytest.mark.parametrize("silent", ["BANNER", "EHLO", "MAIL", "RCPT", "DATA", "."])
def test_silence_is_451_and_the_connection_is_cut(
    scripted_hop: StartHop, connect: Connect, front: Front, monkeypatch: pytest.MonkeyPatch, silent: str
) -> None:
    for limit in ("EXTENSIONS_TIMEOUT", "MAIL_TIMEOUT", "RCPT_TIMEOUT", "DATA_TIMEOUT", "END_TIMEOUT"):
        for module in (connection, client_hop, next_hop):
            monkeypatch.setattr(module, limit, 0.3, raising=False)
    monkeypatch.setattr("fumi_core.delivery.next_hop.relay.DATA_TIMEOUT", 0.3)
    hop = scripted_hop(**{silent: b""})
    assert talk(connect(front(hop.address).port)) == LATE
    until(lambda: hop.open == 0)


def test_a_next_hop_that_stops_reading_is_given_up(connect: Connect, front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BLOCK_TIMEOUT", 0.3)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        client = connect(front(f"127.0.0.1:{listener.getsockname()[1]}").port)
        listener.listen()  # not before: the server asks at its start what is offered
        client.sock.sendall(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<c@d.example>\r\nDATA\r\nSubject: hi\r\n\r\n")
        peer, _ = listener.accept()
        with peer, peer.makefile("rb") as lines:
            peer.sendall(b"220 hop\r\n")
            for answer in (b"250 hop\r\n", b"250 Ok\r\n", b"250 Ok\r\n", b"354 go on\r\n"):
                lines.readline()
                peer.sendall(answer)
            for _ in range(4):
                client.reply()
            client.sock.sendall((b"x" * 70 + b"\r\n") * 300_000 + b".\r\n")
            assert client.reply() == LATE


def test_replies_that_come_byte_by_byte_are_replies(scripted_hop: StartHop, connect: Connect, front: Front) -> None:
    def drip(reply: bytes) -> list[bytes]:
        return [reply[at : at + 1] for at in range(len(reply))]

    hop = scripted_hop(
        BANNER=drip(b"220-hop\r\n220 hop\r\n"),
        EHLO=drip(b"250-hop\n250-8bitmime\r\n250 SIZE 1000\r\n"),
        MAIL=drip(b"250 Ok\r\n"),
        dot=drip(b"550-5.7.1 This\r\n550-5.7.1 is\r\n550 5.7.1 spam\r\n"),
    )
    assert talk(connect(front(hop.address).port)) == b"550-5.7.1 This\r\n550-5.7.1 is\r\n550 5.7.1 spam\r\n"


@pytest.mark.parametrize(
    ("early", "reply"),
    [
        (b"552 5.3.4 too big\r\n", b"552 5.3.4 too big\r\n"),
        (b"421 4.3.2 down\r\n", b"451 4.3.2 down\r\n"),
        (b"250 Ok\r\n", NONSENSE),
    ],
)
def test_a_verdict_before_the_end_refuses_the_message_or_is_nonsense(
    scripted_hop: StartHop, connect: Connect, front: Front, monkeypatch: pytest.MonkeyPatch, early: bytes, reply: bytes
) -> None:
    verdict: list[socket.socket] = []
    hop = scripted_hop()
    serve = hop._converse

    def converse(sock: socket.socket, lines: BinaryIO) -> None:
        verdict.append(sock)
        serve(sock, lines)

    monkeypatch.setattr(hop, "_converse", converse)
    client = connect(front(hop.address).port)
    client.envelope()
    client.say("DATA")
    client.sock.sendall(b"Subject: hi\r\n\r\n")
    until(lambda: hop.begun == 1)
    verdict[0].sendall(early)
    until(lambda: hop.open == 0)
    assert client.say(".") == reply
    assert hop.messages == []


def test_an_idle_connection_that_died_is_replaced_unseen(scripted_hop: StartHop, connect: Connect, front: Front) -> None:
    hop = scripted_hop(dot=[b"250 Ok\r\n", None])
    client = connect(front(hop.address).port)
    for number in (1, 2, 3):
        assert talk(client).startswith(b"250 ")
        until(lambda: hop.open == 0)
        assert (hop.connections, len(hop.messages)) == (number, number)


@pytest.mark.parametrize("again", [b"421 4.4.2 idle for too long\r\n", None])
def test_an_idle_connection_refused_at_mail_is_replaced_unseen(
    scripted_hop: StartHop, connect: Connect, front: Front, again: Part
) -> None:
    used: set[int] = set()

    def mail(line: bytes) -> Part:
        if hop.connections in used:
            return again
        used.add(hop.connections)
        return b"250 Ok\r\n"

    hop = scripted_hop(MAIL=mail)
    client = connect(front(hop.address).port)
    assert talk(client).startswith(b"250 ")
    assert talk(client).startswith(b"250 ")
    assert (hop.connections, len(hop.messages)) == (2, 2)


def test_the_time_that_an_idle_connection_took_to_fail_is_not_spent_again_on_a_new_one(
    scripted_hop: StartHop, connect: Connect, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    timeouts: list[float] = []

    async def recorded(*arguments: Any) -> connection.NextHopConnection:
        timeouts.append(arguments[-1])
        return await connection.connect(*arguments)

    answers: Iterator[Callable[[], Part]] = iter([lambda: b"250 ok\r\n", lambda: time.sleep(0.3), lambda: b"250 ok\r\n"])
    hop = scripted_hop(MAIL=lambda line: next(answers)())
    client = connect(front(hop.address).port)
    monkeypatch.setattr(client_hop, "connect", recorded)
    monkeypatch.setattr(client_hop, "CONNECT_TIMEOUT", client_hop.MIN_CONNECT_SECONDS + 0.2)
    assert talk(client).startswith(b"250")
    assert talk(client).startswith(b"250")
    assert timeouts[-1] == client_hop.MIN_CONNECT_SECONDS


def test_after_the_final_dot_nothing_is_tried_again(scripted_hop: StartHop, connect: Connect, front: Front) -> None:
    hop = scripted_hop(dot=None)
    client = connect(front(hop.address).port)
    assert talk(client) == LOST
    assert (hop.connections, len(hop.messages)) == (1, 1)


def test_a_connection_idle_too_long_is_closed(
    scripted_hop: StartHop, connect: Connect, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "IDLE_SECONDS", 0.1)
    hop = scripted_hop()
    assert talk(connect(front(hop.address).port)).startswith(b"250 ")
    until(lambda: hop.open == 0)
    assert hop.lines[-1] == b"QUIT"


def test_no_more_than_so_many_are_kept_idle(
    scripted_hop: StartHop, connect: Connect, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "MAX_IDLE", 2)
    hop = scripted_hop()
    server = front(hop.address)
    clients = [connect(server.port) for _ in range(5)]
    for client in clients:
        client.envelope()
    assert hop.open == 5
    for client in clients:
        client.say("QUIT")
    until(lambda: hop.open == 2)


@pytest.mark.parametrize("waiting", ["BANNER", "EHLO", "MAIL", "RCPT"])
def test_a_client_that_vanishes_while_the_next_hop_thinks_leaves_nothing_open(
    scripted_hop: StartHop, connect: Connect, front: Front, monkeypatch: pytest.MonkeyPatch, waiting: str
) -> None:
    monkeypatch.setattr(client_hop, "EXTENSIONS_TIMEOUT", 0.1)
    hop = scripted_hop(**{waiting: b""})
    server = front(hop.address)
    if waiting in ("BANNER", "EHLO"):
        until(lambda: hop.connections == 1 and hop.open == 0)  # the question at the start went unanswered
    client = connect(server.port)
    client.say("EHLO client.example")
    if waiting == "RCPT":
        client.say("MAIL FROM:<>")
    client.sock.sendall(b"RCPT TO:<c@d.example>\r\n" if waiting == "RCPT" else b"MAIL FROM:<>\r\n")
    said = hop.lines
    until(lambda: bool(hop.open if waiting == "BANNER" else said and hop.open and said[-1].startswith(waiting.encode())))
    client.reset()
    until(lambda: hop.open == 0)


@pytest.mark.parametrize("how", ["vanish", "bare newline", "too large"])
def test_a_message_that_breaks_off_here_breaks_off_there(
    scripted_hop: StartHop, connect: Connect, front: Front, how: str
) -> None:
    hop = scripted_hop()
    client = connect(front(hop.address, size=1_000_000).port)
    client.envelope()
    client.say("DATA")
    client.sock.sendall((b"x" * 70 + b"\r\n") * 2000)
    if how == "vanish":
        client.close()
    elif how == "bare newline":
        assert client.say(b"x\n.").startswith(b"550 5.6.11 ")
    else:
        assert client.say((b"x" * 70 + b"\r\n") * 20_000 + b".") == b"552 5.3.4 Error: message file too big\r\n"
    until(lambda: hop.open == 0)
    assert hop.messages == []
    assert len(hop.broken) == 1


def test_a_chunk_given_up_breaks_off_there(scripted_hop: StartHop, connect: Connect, front: Front) -> None:
    hop = scripted_hop()
    client = connect(front(hop.address).port)
    client.envelope()
    client.sock.sendall(b"BDAT 4\r\nhi\r\n")
    assert client.reply().startswith(b"250")
    assert client.say("RSET").startswith(b"250")
    until(lambda: len(hop.broken) == 1)
    assert talk(client).startswith(b"250 ")
    assert len(hop.messages) == 1


def test_a_server_that_closes_aborts_transactions_with_the_next_hop(scripted_hop: StartHop, connect: Connect) -> None:
    hop = scripted_hop(dot=b"")
    app: Fumi = builtin.build(f"smtp:{hop.address}", close_timeout=0.2)
    with running(app) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        client.sock.sendall(b"hi\r\n.\r\n")
        until(lambda: len(hop.messages) == 1)
    until(lambda: hop.open == 0)
    assert not client.reply().startswith(b"250")
