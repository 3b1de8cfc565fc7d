"""logger: what is in the log of a session, and what never is."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fumi_core import AuthContext, CloseContext, ConnectContext, DataContext, Fumi, Next, plugins
from fumi_core.proxy_protocol import ProxyHeader
from fumi_core.runtime.logs import LogMessage
from fumi_core.testing import running
from tests.core.client import Connect
from tests.support.waiting import until

Lines = Callable[[], list[str]]


@pytest.fixture
def app() -> Fumi:
    app = Fumi(auth_optional=True, allow_insecure_auth=True, size=1000, close_timeout=0.2)
    return app.use(plugins.logger())


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """What the plugin logged, without the connection's id and port, and times."""
    caplog.set_level(logging.INFO, "fumi.core.events")

    def read() -> list[str]:
        records = [record.getMessage() for record in caplog.records if record.name == "fumi.core.events"]
        return [
            " ".join(word for word in line.split(" ") if not word.startswith(("id=", "client_port=", "seconds=")))
            for line in records
        ]

    return read


def test_a_session_is_a_line_an_event(app: Fumi, connect: Connect, lines: Lines) -> None:
    with running(app) as server:
        client = connect(server.port)
        client.envelope("a@b.example", "c@d.example", "e@f.example")
        client.say("DATA")
        client.say("hello\r\n.")
        client.say("QUIT")
        until(lambda: len(lines()) == 6)
    assert lines() == [
        "connection accepted client_ip=127.0.0.1",
        "sender accepted client_ip=127.0.0.1 from=a@b.example",
        "recipient accepted client_ip=127.0.0.1 to=c@d.example",
        "recipient accepted client_ip=127.0.0.1 to=e@f.example",
        "message accepted client_ip=127.0.0.1 from=a@b.example recipients=2 size=7",
        "connection closed client_ip=127.0.0.1 transactions=1",
    ]


def test_lines_have_the_id_and_lasting_things_their_seconds(
    app: Fumi, connect: Connect, lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    with running(app) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        client.say("hello\r\n.")
        (received,) = server.messages
    logged = [record.msg for record in caplog.records if record.name == "fumi.core.events" and isinstance(record.msg, LogMessage)]
    assert {message.fields["id"] for message in logged} == {received.session.id}
    assert [message.words for message in logged if "seconds" in message.fields] == ["message accepted", "connection closed"]


def test_refusals_of_others_are_seen_with_code_and_words(app: Fumi, connect: Connect, lines: Lines) -> None:
    app.on_mail_from(lambda ctx, next: ctx.reject("Not you") if "bad" in ctx.address.address else next())
    app.on_rcpt_to(lambda ctx, next: ctx.reject("Nobody here\r\nforged", 551) if "bad" in ctx.address.address else next())
    app.on_data(lambda ctx, next: ctx.reject("4.2.2 Later", 450))
    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        client.say("MAIL FROM:<bad@b.example>")
        client.say("MAIL FROM:<a@b.example>")
        client.say("RCPT TO:<bad@d.example>")
        client.say("RCPT TO:<c@d.example>")
        client.say("DATA")
        assert client.say("hello\r\n.").startswith(b"450")
    assert [line for line in lines() if " code=" in line] == [
        'sender rejected client_ip=127.0.0.1 from=bad@b.example code=550 reply="Not you"',
        'recipient rejected client_ip=127.0.0.1 to=bad@d.example code=551 reply="Nobody here\\r\\nforged"',
        'message deferred client_ip=127.0.0.1 from=a@b.example recipients=1 size=7 code=450 reply="4.2.2 Later"',
    ]


def test_a_refused_connection_and_a_failing_handler_are_seen(app: Fumi, connect: Connect, lines: Lines) -> None:
    @app.on_connect
    async def connected(ctx: ConnectContext, next: Next) -> None:
        await asyncio.sleep(0)
        if refusing:
            ctx.reject("Go away", 554)
        raise KeyError("oops")

    with running(app) as server:
        refusing = True
        assert connect(server.port).banner.startswith(b"554")
        refusing = False
        assert connect(server.port).banner.startswith(b"421")
    assert lines()[0] == 'connection rejected client_ip=127.0.0.1 code=554 reply="Go away"'
    assert "connection deferred client_ip=127.0.0.1 error=KeyError" in lines()


def test_how_an_authentication_ended_is_logged_and_no_credential(
    app: Fumi, connect: Connect, lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    @app.on_auth
    async def auth(ctx: AuthContext, next: Next) -> None:
        if ctx.credentials.username == "blocked":
            ctx.reject("Blocked")
        if ctx.credentials.validate_password("secret"):
            ctx.accept("joe")

    with running(app) as server:
        for response in ("AGpvZQB3cm9uZw==", "AGJsb2NrZWQAd3Jvbmc=", "AGpvZQBzZWNyZXQ="):  # joe:wrong blocked:wrong joe:secret
            client = connect(server.port)
            client.say("EHLO x")
            client.say(f"AUTH PLAIN {response}")
    assert [line for line in lines() if line.startswith("auth")] == [
        "authentication failed client_ip=127.0.0.1 method=PLAIN code=535",
        "authentication failed client_ip=127.0.0.1 method=PLAIN code=535 reply=Blocked",
        "authentication accepted client_ip=127.0.0.1 method=PLAIN user=joe",
    ]
    assert not any(word in caplog.text for word in ("wrong", "secret", "AGpv", "AGJs"))


def test_a_message_is_logged_as_rejected_or_aborted_as_the_client_sees_it(app: Fumi, connect: Connect, lines: Lines) -> None:
    with running(app) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        assert client.say("x" * 2000 + "\r\n.").startswith(b"552")
        client.envelope()
        client.say("DATA")
        client.sock.sendall(b"half a message\r\n")
        client.close()
        until(lambda: "connection closed" in lines()[-1])
    messages = [line for line in lines() if line.startswith("message")]
    assert messages[0].startswith("message rejected client_ip=127.0.0.1 from=a@b.example recipients=1 size=2002 code=552")
    assert messages[1].startswith("message aborted client_ip=127.0.0.1 from=a@b.example recipients=1 ")


def test_the_size_is_the_messages_although_no_handler_reads_it(connect: Connect, lines: Lines, tmp_path: Path) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.2).use(plugins.logger())

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        ctx.reject("Not read")

    with running(app) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        assert client.say(b"x" * 998 * 500 + b"\r\n.").startswith(b"552")
    assert f"size={998 * 500 + 2} " in next(line for line in lines() if line.startswith("message"))


@pytest.mark.parametrize(("refusing", "verdict"), [(["c@d.example"], "accepted"), (["c@d.example", "e@f.example"], "deferred")])
def test_in_lmtp_the_refused_recipients_are_counted(connect: Connect, lines: Lines, refusing: list[str], verdict: str) -> None:
    app = Fumi(auth_optional=True, lmtp=True, close_timeout=0.2).use(plugins.logger())

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        for address in refusing:
            ctx.reject_recipient(address, "Full", 452)

    with running(app) as server:
        client = connect(server.port)
        client.say("LHLO x")
        client.say("MAIL FROM:<a@b.example>")
        client.say("RCPT TO:<c@d.example>")
        client.say("RCPT TO:<e@f.example>")
        client.say("DATA")
        client.say("hello\r\n.")
    expected = f"message {verdict} client_ip=127.0.0.1 from=a@b.example recipients=2 size=7 recipients_rejected={len(refusing)}"
    assert next(line for line in lines() if line.startswith("message")) == expected


def test_a_session_through_a_tls_proxy_is_logged_with_its_address(connect: Connect, lines: Lines) -> None:
    app = Fumi(auth_optional=True, proxy_protocol="required", assume_tls=True, close_timeout=0.2).use(plugins.logger())
    with running(app) as server:
        connect(server.port, ProxyHeader(2, "PROXY", "TCP4", ("192.0.2.1", 1), ("192.0.2.2", 25)).to_bytes())
    assert lines()[0] == "connection accepted client_ip=192.0.2.1 proxy=127.0.0.1 tls=yes"


def test_health_checks_of_a_proxy_are_logged_at_debug(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    app = Fumi(auth_optional=True, proxy_protocol="required", close_timeout=0.2).use(plugins.logger())
    caplog.set_level(logging.DEBUG, "fumi.core.events")
    with running(app) as server:
        assert connect(server.port, ProxyHeader(2, "LOCAL").to_bytes()).say("QUIT").startswith(b"221")
    assert [record.levelname for record in caplog.records if record.name == "fumi.core.events"] == ["DEBUG", "DEBUG"]


def test_disconnected_clients_leave_no_state(connect: Connect) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.2).use(plugins.logger())
    closed: list[CloseContext] = []
    app.on_close(lambda ctx, next: closed.append(ctx))
    remembered = app._handlers["close"][0].__self__._connected  # type: ignore[attr-defined]
    with running(app) as server:
        for _ in range(5):
            connect(server.port).say("QUIT")
            connect(server.port).reset()
        until(lambda: len(closed) == 10)
        assert remembered == {}


def test_basic_logging_shows_the_fields() -> None:
    program = """
import logging, socket
from fumi_core import Fumi, plugins
from fumi_core.testing import running
logging.basicConfig(level=logging.INFO)
with running(Fumi(close_timeout=0.2).use(plugins.logger())) as server:
    sock = socket.create_connection(("127.0.0.1", server.port))
    sock.recv(100)
    sock.close()
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    assert "INFO:fumi.core.events:connection accepted id=" in done.stderr
    assert " client_ip=127.0.0.1" in done.stderr
