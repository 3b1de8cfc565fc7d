"""What XCLIENT and XFORWARD make of a session, as its handlers see it."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any

from fumi_core import ConnectContext, Fumi, Next
from fumi_core.handlers.contexts import Context
from fumi_core.proxy_protocol import ProxyHeader
from fumi_core.testing import running

HELLO = b"EHLO proxy.example\r\n"
MESSAGE = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\nx\r\n.\r\n"


@contextmanager
def recorded(*phases: str, **options: Any) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """An app that notes the session's facts in each of these phases, and its port."""
    app = Fumi(auth_optional=True, use_xclient=True, use_xforward=True, close_timeout=0.2, **options)
    seen: list[dict[str, Any]] = []

    def note(ctx: Context, next: Next) -> Awaitable[None]:
        session = ctx.session
        seen.append({name: getattr(session, name) for name in session.__slots__})
        return next()

    for phase in phases:
        getattr(app, f"on_{phase}")(note)
    with running(app) as server:
        yield seen, server.port


def talk(port: int, *said: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as sock, sock.makefile("rb") as replies:
        sock.sendall(b"".join(said) + b"QUIT\r\n")
        return replies.read()


def test_xclient_makes_the_session_another_clients() -> None:
    with recorded("data") as (seen, port):
        talk(
            port,
            b"XCLIENT ADDR=IPv6:2001:db8::7 PORT=4711 NAME=spike.example HELO=spike PROTO=ESMTP LOGIN=joe\r\n",
            b"XCLIENT DESTADDR=192.0.2.2 DESTPORT=25 HELO=spike PROTO=ESMTP LOGIN=joe\r\n",
            MESSAGE,
        )
    assert (seen[0]["remote_address"], seen[0]["remote_port"]) == ("2001:db8::7", 4711)
    assert (seen[0]["local_address"], seen[0]["local_port"]) == ("192.0.2.2", 25)
    assert (seen[0]["user"], seen[0]["client_hostname"], seen[0]["opening_command"]) == ("joe", "spike", "EHLO")
    assert seen[0]["xclient"] == {
        "ADDR": "2001:db8::7",
        "PORT": "4711",
        "NAME": "spike.example",
        "HELO": "spike",
        "PROTO": "ESMTP",
        "LOGIN": "joe",
        "DESTADDR": "192.0.2.2",
        "DESTPORT": "25",
    }


def test_connect_handlers_judge_the_client_that_xclient_names() -> None:
    app = Fumi(auth_optional=True, use_xclient=True, close_timeout=0.2)

    @app.on_connect
    def judge(ctx: ConnectContext, next: Next) -> Awaitable[None] | None:
        if ctx.session.remote_address == "192.0.2.66":
            ctx.reject("5.7.1 Go away", 554)
        return next()

    with running(app) as server:
        answer = talk(server.port, b"XCLIENT ADDR=192.0.2.66\r\n", HELLO)
    assert answer.endswith(b"\r\n554 5.7.1 Go away\r\n")


def test_on_close_runs_once_though_on_connect_ran_twice() -> None:
    with recorded("connect", "close") as (seen, port):
        talk(port, b"XCLIENT ADDR=192.0.2.7\r\n")
    assert [each["remote_address"] for each in seen] == ["127.0.0.1", "192.0.2.7", "192.0.2.7"]


def test_an_authenticated_proxy_is_not_the_user_of_the_clients_it_names() -> None:
    with recorded("mail_from", allow_insecure_auth=True) as (seen, port):
        talk(port, b"XCLIENT ADDR=192.0.2.7 LOGIN=joe\r\n", b"XCLIENT ADDR=192.0.2.8\r\n", HELLO, MESSAGE)
    assert seen[0]["user"] is None


def test_attributes_unavailable_in_xclient_are_unknown() -> None:
    with recorded("data") as (seen, port):
        talk(port, b"XCLIENT ADDR=[UNAVAILABLE] NAME=[TEMPUNAVAIL] PORT=[UNAVAILABLE]\r\n", HELLO, MESSAGE)
    assert (seen[0]["remote_address"], seen[0]["remote_port"]) == ("unknown", 0)
    assert seen[0]["xclient"] == {"ADDR": None, "NAME": None, "PORT": None}


def test_xforward_is_for_one_transaction() -> None:
    with recorded("data") as (seen, port):
        talk(port, HELLO, b"XFORWARD ADDR=192.0.2.7 IDENT=x+3Dy\r\n", MESSAGE, MESSAGE)
    assert [each["xforward"] for each in seen] == [{"ADDR": "192.0.2.7", "IDENT": "x=y"}, {}]
    assert seen[0]["remote_address"] == "127.0.0.1"


def test_a_client_behind_a_tls_proxy_forges_nothing() -> None:
    header = ProxyHeader(2, "PROXY", "TCP4", ("203.0.113.9", 5), ("192.0.2.1", 25)).to_bytes()
    with recorded("data", proxy_protocol="required") as (seen, port):
        answer = talk(port, header, HELLO, b"XCLIENT ADDR=127.0.0.1 LOGIN=root\r\n", b"XFORWARD ADDR=127.0.0.1\r\n", MESSAGE)
    assert answer.count(b"550 5.7.0 Error: insufficient authorization\r\n") == 2
    assert b"XCLIENT" not in answer
    assert (seen[0]["remote_address"], seen[0]["user"], seen[0]["xforward"]) == ("203.0.113.9", None, {})


def test_a_client_that_the_proxy_does_not_name_is_not_the_proxy() -> None:
    with recorded(proxy_protocol="required") as (_, port):
        replies = talk(port, b"PROXY UNKNOWN\r\n", HELLO, b"XCLIENT ADDR=192.0.2.9\r\n", b"XFORWARD NAME=x\r\n")
    assert b"XCLIENT" not in replies
    assert replies.count(b"\r\n550 5.7.0 Error: insufficient authorization") == 2


def test_a_trusted_proxy_may_name_a_second_client() -> None:
    with recorded("data") as (seen, port):
        talk(port, b"XCLIENT ADDR=203.0.113.9\r\n", HELLO, b"XCLIENT ADDR=203.0.113.10\r\n", HELLO, MESSAGE)
    assert seen[0]["remote_address"] == "203.0.113.10"


def test_thousands_of_empty_chunks_in_one_packet_are_answered_one_by_one() -> None:
    with recorded() as (_, port):
        answer = talk(port, HELLO, MESSAGE[: MESSAGE.index(b"DATA")], b"BDAT 0\r\n" * 3000, b"BDAT 0 LAST\r\n")
    assert answer.count(b"250 2.0.0 Ok\r\n") == 3001
