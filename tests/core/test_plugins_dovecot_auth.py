"""Dovecot checks logins; whatever it sends wrong, no login succeeds and no client hangs."""

from __future__ import annotations

import logging
import socket
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fumi_core import Fumi, plugins
from fumi_core.plugins.dovecot import channel, protocol
from fumi_core.testing import running
from tests.core.client import Client, Connect, ConnectFrom
from tests.core.dovecot_server import AUTH_HANDSHAKE, Peer, StartDovecot, response
from tests.support.ports import free_port
from tests.support.waiting import until

ACCEPTED = b"235 2.7.0 Authentication successful\r\n"
FAILED = b"535 5.7.8 Error: authentication failed\r\n"
TEMPORARY = b"454 4.7.0 Temporary authentication failure\r\n"


def build(address: str, **options: Any) -> Fumi:
    usual = {"auth_optional": True, "allow_insecure_auth": True, "auth_methods": ["PLAIN", "LOGIN", "XOAUTH2"]}
    app = Fumi(**{**usual, "close_timeout": 0.2, **options}).use(plugins.dovecot_auth(address))
    app.on_mail_from(lambda ctx, next: ctx.reject(f"You are {ctx.session.user}"))
    return app


def plain(user: str, password: str) -> str:
    return "AUTH PLAIN " + b64encode(f"\0{user}\0{password}".encode()).decode()


def xoauth2(user: str, token: str) -> str:
    return "AUTH XOAUTH2 " + b64encode(f"user={user}\x01auth=Bearer {token}\x01\x01".encode()).decode()


def log_in(connect: Connect, port: int, command: str = plain("joe", "secret")) -> bytes:
    client = connect(port)
    client.say("EHLO client.example")
    return client.say(command)


def who(client: Client) -> str:
    """The user that the session has."""
    return client.say("MAIL FROM:<>").decode().removeprefix("550 5.7.1 You are ").rstrip()


def answering(*reply: str) -> Callable[[Peer], None]:
    """A server that gives each request this reply."""

    def serve(peer: Peer) -> None:
        peer.raw(AUTH_HANDSHAKE)
        for request in peer.requests():
            if request[0] == "AUTH":
                peer.send(reply[0], request[1], *reply[1:])

    return serve


def test_a_login_is_checked_by_dovecot_with_what_is_known_of_the_client(dovecot: StartDovecot, connect_from: ConnectFrom) -> None:
    lines: list[list[str]] = []

    def serve(peer: Peer) -> None:
        peer.raw(AUTH_HANDSHAKE)
        for fields in peer.lines():
            lines.append(fields)
            if fields[0] == "AUTH":
                peer.send("OK", fields[1], "user=joe@example.org")

    app = build(dovecot(serve).address, proxy_protocol="required", assume_tls=True)
    with running(app) as server:
        client = connect_from(server.port, "2001:db8::7")
        client.say("EHLO client.example")
        assert client.say(plain("Joe", "s\u00e9cret\t")) == ACCEPTED
        assert who(client) == "joe@example.org"
    assert lines[0] == ["VERSION", "1", "1"]
    assert lines[1][0] == "CPID"
    assert lines[2][:3] == ["AUTH", "1", "PLAIN"]
    known = ["service=smtp", "secured", "lip=2001:db8::7", "lport=25", "rip=2001:db8::7", "rport=1234"]
    assert lines[2][3:-1] == known
    assert response(lines[2]) == "\0Joe\0s\u00e9cret\t".encode()


def test_a_client_on_a_unix_socket_without_tls_is_neither_secured_nor_has_it_an_address(
    dovecot: StartDovecot, tmp_path: Path
) -> None:
    facts: list[list[str]] = []

    def serve(peer: Peer) -> None:
        peer.raw(AUTH_HANDSHAKE)
        for fields in peer.requests():
            facts.append(fields[3:-1])
            peer.send("OK", fields[1], "user=joe")

    app = build(dovecot(serve).address)
    with running(app) as server:
        path = str(tmp_path / "socket")

        async def listen() -> None:
            await app.listen(path=path)

        server.run(listen)
        with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as replies:
            sock.settimeout(60)
            sock.connect(path)
            sock.sendall(f"EHLO client.example\r\n{plain('joe', 'secret')}\r\n".encode())
            assert ACCEPTED in iter(replies.readline, b"")
    assert facts == [["service=smtp"]]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (["FAIL"], FAILED),
        (["FAIL", "user=joe"], FAILED),
        (["FAIL", "user=joe", "user_disabled"], FAILED),
        (["FAIL", "user=joe", "authz"], FAILED),
        (["FAIL", "code=user_disabled", "user=joe"], FAILED),
        (["FAIL", "reason=Come back\x01l on\x01t Monday"], FAILED[:-2] + b": Come back on Monday\r\n"),
        (["FAIL", "reason=" + "x" * 3000], FAILED[:-2] + b": " + b"x" * 200 + b"\r\n"),
        (["FAIL", "user=joe", "temp"], TEMPORARY),
        (["FAIL", "temp", "reason=no database"], TEMPORARY),
        (["FAIL", "code=temp_fail"], TEMPORARY),
        (["OK", "user=joe", "nologin"], FAILED),
        (["OK", "user=joe", "nologin", "reason=Moved"], FAILED[:-2] + b": Moved\r\n"),
        (["OK", "user=joe", "proxy", "host=192.0.2.1"], TEMPORARY),
        (["OK"], TEMPORARY),
        (["OK", "user="], TEMPORARY),
        (["OK", "user=joe\x01ladmin"], TEMPORARY),
        (["OK", "user=joe", "auth_user=master"], ACCEPTED),
        (["OK", "user=joe", "unknown=1", "unknown2"], ACCEPTED),
        (["CONT", ""], TEMPORARY),
        (["USER", "joe"], TEMPORARY),
    ],
    ids=str,
)
def test_dovecots_answers_lead_to_these_replies(
    dovecot: StartDovecot, connect: Connect, reply: list[str], expected: bytes
) -> None:
    with running(build(dovecot(answering(*reply)).address)) as server:
        assert log_in(connect, server.port) == expected


@pytest.mark.parametrize("parameters", [["user=joe", "proxy"], ["user="]], ids=str)
def test_each_login_that_dovecot_accepts_and_this_server_cannot_is_one_line(
    dovecot: StartDovecot, connect: Connect, parameters: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fumi.core")
    with running(build(dovecot(answering("OK", *parameters)).address)) as server:
        for _ in range(3):
            assert log_in(connect, server.port) == TEMPORARY
    assert [record.getMessage().partition(" id=")[0] for record in caplog.records] == ["unusable reply from Dovecot"] * 3


def test_a_login_name_that_is_not_utf8_is_rejected(dovecot: StartDovecot, connect: Connect) -> None:
    def serve(peer: Peer) -> None:
        peer.raw(AUTH_HANDSHAKE)
        for request in peer.requests():
            peer.raw(b"OK\t%b\tuser=jo\xeb\n" % request[1].encode())

    with running(build(dovecot(serve).address)) as server:
        assert log_in(connect, server.port) == TEMPORARY


@pytest.mark.parametrize(
    ("offered", "expected"),
    [
        ("PLAIN LOGIN", ("LOGIN", [b"joe", b"secret"])),
        ("PLAIN", ("PLAIN", [b"\0joe\0secret"])),
    ],
)
def test_login_is_sent_as_plain_where_dovecot_has_only_that(
    dovecot: StartDovecot, connect: Connect, offered: str, expected: tuple[str, list[bytes]]
) -> None:
    asked: list[str] = []
    responses: list[bytes] = []

    def serve(peer: Peer) -> None:
        peer.raw("VERSION\t1\t2\n" + "".join(f"MECH\t{each}\n" for each in offered.split()) + "DONE\n")
        for fields in peer.requests():
            responses.append(response(fields))
            if fields[0] == "AUTH":
                asked.append(fields[2])
            if fields[0] == "AUTH" and fields[2] == "LOGIN":
                peer.send("CONT", fields[1], b64encode(b"Password:").decode())
            else:
                peer.send("OK", fields[1], "user=joe")

    with running(build(dovecot(serve).address)) as server:
        client = connect(server.port)
        client.say("EHLO client.example")
        assert client.say("AUTH LOGIN " + b64encode(b"joe").decode()).startswith(b"334")
        assert client.say(b64encode(b"secret")) == ACCEPTED
    assert (asked[0], responses) == expected


def test_a_wrong_token_is_explained_to_the_client_before_it_fails(dovecot: StartDovecot, connect: Connect) -> None:
    def serve(peer: Peer) -> None:
        peer.raw(AUTH_HANDSHAKE)
        for fields in peer.requests():
            if fields[0] == "AUTH" and b"Bearer right" in response(fields):
                peer.send("OK", fields[1], "user=joe")
            elif fields[0] == "AUTH":
                peer.send("CONT", fields[1], b64encode(b'{"status":"401"}').decode())
            else:
                assert fields == ["CONT", fields[1], ""]
                peer.send("FAIL", fields[1], "user=joe")

    with running(build(dovecot(serve).address)) as server:
        client = connect(server.port)
        client.say("EHLO client.example")
        challenge = client.say(xoauth2("joe", "wrong"))
        assert b"401" in b64decode(challenge.removeprefix(b"334 "))
        assert client.say("") == FAILED
        assert client.say(xoauth2("joe", "right")) == ACCEPTED


def test_only_the_mechanisms_that_dovecot_has_are_offered(dovecot: StartDovecot, connect: Connect) -> None:
    def serve(peer: Peer) -> None:
        peer.raw("VERSION\t1\t1\nMECH\tplain\nDONE\n")
        assert list(peer.requests()) == []

    with running(build(dovecot(serve).address)) as core:
        assert b"AUTH PLAIN LOGIN\r\n" in connect(core.port).say("EHLO client.example")
        assert log_in(connect, core.port, xoauth2("joe", "token")) == b"504 5.5.4 Unrecognized authentication type\r\n"


def test_a_password_with_a_nul_is_wrong_and_not_sent_to_dovecot(dovecot: StartDovecot, connect: Connect) -> None:
    with running(build(dovecot(answering("OK", "user=joe")).address)) as server:
        client = connect(server.port)
        client.say("EHLO client.example")
        client.say("AUTH LOGIN " + b64encode(b"joe").decode())
        assert client.say(b64encode(b"sec\0ret")) == FAILED


@pytest.mark.parametrize(("version", "size", "expected"), [("1", 9000, FAILED), ("2", 9000, ACCEPTED)])
def test_a_login_longer_than_dovecots_limit_fails_and_no_other(
    dovecot: StartDovecot, connect: Connect, version: str, size: int, expected: bytes
) -> None:
    """Dovecot closes the connection that sends such a line, with the logins of all others on it."""
    lengths: list[int] = []

    def serve(peer: Peer) -> None:
        peer.raw(AUTH_HANDSHAKE.replace("VERSION\t1\t2", f"VERSION\t1\t{version}"))
        for fields in peer.requests():
            lengths.append(len("\t".join(fields)) + 1)
            peer.send("OK", fields[1], "user=joe")

    with running(build(dovecot(serve).address)) as server:
        # Four bytes of base64 are three of the password.
        assert log_in(connect, server.port, plain("joe", "x" * (size * 3 // 4))) == expected
        assert log_in(connect, server.port) == ACCEPTED
    assert max(lengths) <= (8192 if version == "1" else 16384)


def test_many_logins_share_one_connection_and_are_answered_in_any_order(dovecot: StartDovecot, connect: Connect) -> None:
    def serve(peer: Peer) -> None:
        peer.raw(AUTH_HANDSHAKE)
        waiting = []
        for fields in peer.requests():
            waiting.append(fields)
            if len(waiting) == 20:
                for each in reversed(waiting):
                    user = response(each).split(b"\0")[1].decode()
                    peer.send(*(("OK", each[1], f"user={user}") if user.startswith("good") else ("FAIL", each[1])))

    fake = dovecot(serve)
    with running(build(fake.address)) as server:
        clients = {}
        for number in range(20):
            name = f"{'good' if number % 2 else 'bad'}{number}"
            clients[name] = client = connect(server.port)
            client.say("EHLO client.example")
            client.sock.sendall(plain(name, "secret").encode() + b"\r\n")
        for name, client in clients.items():
            assert client.reply() == (ACCEPTED if name.startswith("good") else FAILED), name
            assert who(client) == (name if name.startswith("good") else "None")
    assert fake.connections == 1


def test_after_a_restart_dovecot_gets_requests_over_a_new_connection(dovecot: StartDovecot, connect: Connect) -> None:
    fake = dovecot(answering("OK", "user=joe"))
    with running(build(fake.address)) as server:
        for number in range(3):
            assert log_in(connect, server.port) == ACCEPTED
            assert fake.connections == number + 1
            fake.drop()


def test_a_login_that_is_under_way_at_a_restart_is_sent_again(dovecot: StartDovecot, connect: Connect) -> None:
    turns = iter([False, True])

    def serve(peer: Peer) -> None:
        peer.raw(AUTH_HANDSHAKE)
        answer = next(turns)
        for fields in peer.requests():
            if not answer:
                return
            peer.send("OK", fields[1], "user=joe")

    with running(build(dovecot(serve).address)) as server:
        assert log_in(connect, server.port) == ACCEPTED


def test_while_dovecot_is_down_logins_are_deferred_and_the_log_has_a_line_at_both_ends(
    dovecot: StartDovecot, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fumi.core")
    port = free_port()
    with running(build(f"127.0.0.1:{port}")) as server:
        for _ in range(5):
            assert log_in(connect, server.port) == TEMPORARY
        dovecot(answering("OK", "user=joe"), port)
        for _ in range(3):
            assert log_in(connect, server.port) == ACCEPTED
    lines = [record.getMessage() for record in caplog.records if "Dovecot" in record.getMessage()]
    assert lines == [
        f'Dovecot unavailable address=127.0.0.1:{port} error="Connection refused"',
        f"Dovecot available address=127.0.0.1:{port}",
    ]


@pytest.mark.parametrize("said", ["", "OK", "OK\t1\tuser="])
def test_a_dovecot_that_hangs_or_never_ends_its_line_defers_logins_and_is_left(
    dovecot: StartDovecot, connect: Connect, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setattr(channel, "REPLY_TIMEOUT", 0.5)
    turns = iter([False, True])

    def serve(peer: Peer) -> None:
        peer.raw(AUTH_HANDSHAKE)
        answer = next(turns)
        for fields in peer.requests():
            if answer:
                peer.send("OK", fields[1], "user=joe")
            else:
                peer.raw(said)

    with running(build(dovecot(serve).address)) as server:
        assert log_in(connect, server.port) == TEMPORARY
        assert log_in(connect, server.port) == ACCEPTED


def test_one_login_that_dovecot_does_not_answer_is_cancelled_and_holds_up_no_other(
    dovecot: StartDovecot, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "REPLY_TIMEOUT", 0.5)
    seen: list[list[str]] = []
    reached = threading.Event()

    def serve(peer: Peer) -> None:
        peer.raw(AUTH_HANDSHAKE)
        for fields in peer.requests():
            seen.append(fields[:2])
            reached.set()
            if fields[0] == "AUTH" and b"slow" not in response(fields):
                peer.send("OK", fields[1], "user=joe")
            if fields[0] == "CANCEL":
                peer.send("OK", fields[1], "user=too-late")

    fake = dovecot(serve)
    with running(build(fake.address)) as server:
        slow = connect(server.port)
        slow.say("EHLO client.example")
        slow.sock.sendall(plain("slow", "secret").encode() + b"\r\n")
        assert reached.wait(60)
        assert log_in(connect, server.port) == ACCEPTED
        assert slow.reply() == TEMPORARY
        until(lambda: ["CANCEL", "1"] in seen)
        assert who(slow) == "None"
        assert log_in(connect, server.port) == ACCEPTED
    assert fake.connections == 1


def test_a_client_that_disconnects_cancels_its_login(dovecot: StartDovecot, connect: Connect) -> None:
    seen: list[list[str]] = []

    def serve(peer: Peer) -> None:
        peer.raw(AUTH_HANDSHAKE)
        for fields in peer.requests():
            seen.append(fields)  # noqa: PERF402 (at once, not at the end)

    def cancelled() -> bool:
        return [fields for fields in seen if fields[0] == "CANCEL"] == [["CANCEL", "1"]]

    with running(build(dovecot(serve).address)) as server:
        client = connect(server.port)
        client.say("EHLO client.example")
        client.sock.sendall(plain("joe", "secret").encode() + b"\r\n")
        until(lambda: bool(seen))
        client.reset()
        until(cancelled)


@pytest.mark.parametrize(
    "handshake",
    [
        "", "\n", "VERSION\t2\t0\n", "VERSION\n", "MECH\tPLAIN\n", "OK\t1\tuser=joe\n", "VERSION\t1\t1\nDONE\n",
        "VERSION\t1\t1\nOK\t1\tuser=joe\n", "220 mail.example ESMTP\r\n", "x" * 70_000,
        AUTH_HANDSHAKE + "OK\t1\tuser=joe\n", AUTH_HANDSHAKE + "OK\n", AUTH_HANDSHAKE + "OK\tx\tuser=joe\n",
    ],
    ids=lambda text: repr(text[:30]) + str(len(text)),
)  # fmt: skip
def test_a_server_that_is_not_dovecot_accepts_no_login_and_hangs_no_client(
    dovecot: StartDovecot, connect: Connect, monkeypatch: pytest.MonkeyPatch, handshake: str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(channel, "CONNECT_TIMEOUT", 0.3)
    monkeypatch.setattr(channel, "REPLY_TIMEOUT", 0.6)

    def serve(peer: Peer) -> None:
        peer.raw(handshake)
        for _ in peer.lines():
            pass

    with running(build(dovecot(serve).address)) as server:
        assert log_in(connect, server.port) == TEMPORARY
        assert log_in(connect, server.port) == TEMPORARY
    assert len([record for record in caplog.records if "Dovecot" in record.getMessage()]) == 1
    assert "Traceback" not in caplog.text
    assert "secret" not in caplog.text


def test_a_reply_to_another_login_authenticates_no_client(dovecot: StartDovecot, connect: Connect) -> None:
    """Neither a second reply, nor one without a request."""

    def serve(peer: Peer) -> None:
        peer.raw(AUTH_HANDSHAKE)
        for fields in peer.requests():
            number = int(fields[1])
            user = response(fields).split(b"\0")[1]
            if user == b"first":
                peer.raw(f"FAIL\t{number}\nOK\t{number}\tuser=first\n")
            else:
                peer.raw(f"OK\t{number - 1}\tuser=first\nOK\t{number + 1}\tuser=first\nOK\t{number}\tuser=joe\n")

    with running(build(dovecot(serve).address)) as server:
        assert log_in(connect, server.port, plain("first", "wrong")) == FAILED
        assert log_in(connect, server.port, plain("second", "wrong")) == TEMPORARY


def test_when_the_numbers_of_requests_are_used_up_there_is_a_new_connection(
    dovecot: StartDovecot, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "MAX_NUMBER", 2)
    fake = dovecot(answering("OK", "user=joe"))
    with running(build(fake.address)) as server:
        for _ in range(5):
            assert log_in(connect, server.port) == ACCEPTED
    assert fake.connections == 3


@pytest.mark.parametrize("address", ["fd:3", ":1234", "nonsense", "unix:", ""])
def test_an_address_that_cannot_be_connected_to_is_an_error(address: str) -> None:
    with pytest.raises(ValueError, match=r"^dovecot_auth: "):
        plugins.dovecot_auth(address)


def test_lines_are_escaped_and_read_back() -> None:
    fields = ["AUTH", "a\tb", "\0\x01\r\n", "\x01\x01t", "p\u00e4sse", ""]
    line = protocol.line(*fields)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert protocol.fields(line[:-1]) == fields
    assert protocol.fields(b"x\x01yz\x01") == ["xyz"]


def test_concurrent_logins_while_dovecot_restarts_are_accepted_or_deferred(dovecot: StartDovecot, connect: Connect) -> None:
    fake = dovecot(answering("OK", "user=joe"))
    replies: list[bytes] = []
    with running(build(fake.address)) as server:

        def many() -> None:
            for _ in range(20):
                client = Client(server.port)
                client.say("EHLO client.example")
                replies.append(client.say(plain("joe", "secret")))
                client.close()

        threads = [threading.Thread(target=many) for _ in range(8)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while any(thread.is_alive() for thread in threads):
            assert time.monotonic() < deadline
            fake.drop()
            threads[0].join(0.02)
    assert len(replies) == 160
    assert set(replies) <= {ACCEPTED, TEMPORARY}
    assert replies.count(ACCEPTED) > 0
