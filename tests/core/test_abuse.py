"""Clients at their worst, at the worst moment: nothing leaks, nothing hangs, nobody is let in."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fumi_core import CloseContext, ConnectContext, DataContext, Fumi, MailContext, Next, RcptContext, plugins
from fumi_core.proxy_protocol import ProxyHeader
from fumi_core.server.observer import Observer
from fumi_core.testing import running
from tests.core.client import Connect
from tests.support.waiting import until


class Counting(Observer):
    def __init__(self) -> None:
        self.reasons: list[str] = []

    def rejected(self, reason: str) -> None:
        self.reasons.append(reason)


def connections(app: Fumi) -> int:
    assert app._server is not None
    return len(app._server.connections)


def refuses_slowly(app: Fumi, code: int = 421) -> None:
    @app.on_mail_from
    async def mail(ctx: MailContext, next: Next) -> None:
        await asyncio.sleep(0.1)
        ctx.reject("Enough", code)


def test_a_client_that_resets_while_it_is_refused_is_forgotten(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.2)
    closed: list[CloseContext] = []
    refuses_slowly(app)

    @app.on_close
    async def on_close(ctx: CloseContext, next: Next) -> None:
        await asyncio.sleep(0.01)
        closed.append(ctx)

    with running(app) as server:
        for _ in range(5):
            client = connect(server.port)
            client.say("EHLO x")
            client.sock.sendall(b"MAIL FROM:<>\r\n")
            time.sleep(0.02)  # so that the next line comes while the handler sleeps, and reading rests
            client.sock.sendall(b"RCPT TO:<a@b.example>\r\n")
            client.close()
        until(lambda: len(closed) == 5 and connections(app) == 0)
    assert "Traceback" not in caplog.text


def test_port_scans_leave_no_traceback(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    app = Fumi(auth_optional=True, max_clients=1, close_timeout=0.2).use(plugins.denylist(["127.0.0.1"]))
    with running(app) as server:
        for _ in range(50):
            connect(server.port, banner=False).reset()
        until(lambda: connections(app) == 0)
    assert "Traceback" not in caplog.text


def test_a_client_that_never_reads_is_timed_out(connect: Connect) -> None:
    app = Fumi(auth_optional=True, socket_timeout=2, close_timeout=0.2)
    app.observer = observer = Counting()
    with running(app) as server:
        client = connect(server.port)
        client.sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.sock.sendall(b"HELP\r\n" * 5_000_000)
        until(lambda: "timeout" in observer.reasons)
        # Lingering is for clients that read.
        until(lambda: connections(app) == 0)


def test_lingering_ends_though_reading_had_rested(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fumi_core.server.connection.LINGER_SECONDS", 0.1)
    app = Fumi(auth_optional=True, close_timeout=0.2)
    refuses_slowly(app)
    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        client.sock.sendall(b"MAIL FROM:<>\r\n")
        time.sleep(0.02)
        client.sock.sendall(b"RCPT TO:<a@b.example>\r\n")
        assert client.reply().startswith(b"421")
        until(lambda: connections(app) == 0)


@pytest.mark.parametrize(
    "first",
    [
        b"POST /" + b"A" * 5000 + b" HTTP/1.1\r\n",
        b"GET / HTTP/1.1\n",
        b"\x00" * 5000,
        b"\x16\x03\x01" + b"\xff" * 5000,
    ],
)
def test_another_protocol_cannot_carry_commands(connect: Connect, first: bytes) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.2)
    app.observer = observer = Counting()
    with running(app) as server:
        client = connect(server.port)
        client.sock.sendall(first + b"\r\nEHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<a@b.example>\r\nDATA\r\nhi\r\n.\r\n")
        assert client.reply() == b"554 5.5.1 Error: this is an SMTP server\r\n"
        assert client.reply() == b""
        assert server.messages == []
    assert observer.reasons == ["not_smtp"]


def test_thousands_of_pipelined_commands_wait_their_turn(connect: Connect) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.2)
    with running(app) as server:
        client, other = connect(server.port), connect(server.port)
        client.sock.sendall(b"HELP\r\n" * 20_000)
        assert other.say("NOOP").startswith(b"250")
        for _ in range(20_000):
            assert client.reply().startswith(b"214")
        assert client.say("NOOP").startswith(b"250")


@pytest.mark.parametrize("path", ["/a\r\n\r\nX-Forged: yes", "127.0.0.1", "unix", "/caf\udce9", "\0abstract", ""])
def test_the_path_of_a_unix_client_is_neither_an_address_nor_a_header(connect: Connect, path: str) -> None:
    app = Fumi(auth_optional=True, proxy_protocol="required", close_timeout=0.2)
    app.use(plugins.denylist(["127.0.0.1", "unix"]))
    with running(app) as server:
        client = connect(server.port, ProxyHeader(2, "PROXY", "UNIX", path, "/b").to_bytes())
        assert client.banner.startswith(b"220")
        client.envelope()
        client.say("DATA")
        assert client.say("hi\r\n.").startswith(b"250")
        session = server.messages[0].session
    assert session.remote_address.startswith("unix:")
    assert session.remote_address.isprintable()
    assert session.received_header().count("\r\n") == session.received_header().count("\r\n\t") + 1


def test_an_argument_that_is_not_text_is_converted(connect: Connect) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.2)

    @app.on_mail_from
    async def mail(ctx: MailContext, next: Next) -> None:
        await asyncio.sleep(0)
        ctx.reject(ValueError("oops"))  # type: ignore[arg-type]

    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        assert client.say("MAIL FROM:<>") == b"550 5.7.1 oops\r\n"


def test_after_a_slow_answer_the_client_has_its_whole_time_again(connect: Connect) -> None:
    app = Fumi(auth_optional=True, socket_timeout=2, close_timeout=0.2)

    @app.on_mail_from
    async def mail(ctx: MailContext, next: Next) -> None:
        await asyncio.sleep(1.8)

    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        assert client.say("MAIL FROM:<>").startswith(b"250")
        time.sleep(0.5)
        assert client.say("NOOP").startswith(b"250")


def test_a_loop_that_ends_does_not_wait_for_a_sleeping_handler() -> None:
    program = """
import asyncio
import os
import re
from fumi_core import Fumi
async def main():
    app = Fumi(auth_optional=True)
    @app.on_mail_from
    async def mail(ctx, next):
        await asyncio.sleep(1000)
    await app.listen(0)
    reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
    writer.write(b"EHLO x\\r\\nMAIL FROM:<>\\r\\n")
    await asyncio.sleep(0.2)
asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_close_cancels_handlers_that_do_not_end(connect: Connect) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.05)
    seen: list[str] = []

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    app.on_close(lambda ctx, next: seen.append("closed"))
    with running(app) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        client.sock.sendall(b"hi\r\n.\r\n")
        time.sleep(0.05)
        server.run(app.close)
        assert seen == ["cancelled", "closed"]
        assert client.reply().startswith(b"421 4.3.2")


def test_a_delivery_that_is_cancelled_leaves_no_file(connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fumi_core.delivery import maildir

    app = Fumi(auth_optional=True, close_timeout=0.2)

    @app.on_data
    async def impatient(ctx: DataContext, next: Next) -> None:
        async with asyncio.timeout(0.05):
            await next()

    app.use(maildir.Maildir(tmp_path / "box"))
    real = os.fsync

    def slow(fd: int) -> None:
        time.sleep(0.2)
        real(fd)

    with running(app) as server, monkeypatch.context() as patch:
        patch.setattr("fumi_core.delivery.maildir.os.fsync", slow)
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        assert client.say("hi\r\n.").startswith(b"451")
    assert not [*(tmp_path / "box" / "tmp").iterdir(), *(tmp_path / "box" / "new").iterdir()]


def test_a_failing_handler_is_logged_though_its_client_has_disconnected(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.2)
    closed: list[CloseContext] = []
    app.on_close(lambda ctx, next: closed.append(ctx))

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        await ctx.stream.__anext__()
        raise KeyError("lost?")

    with running(app) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        client.sock.sendall(b"some text\r\n")
        time.sleep(0.05)
        client.close()
        until(lambda: len(closed) == 1)
    assert "KeyError: 'lost?'" in caplog.text


def test_rset_between_chunks_ends_the_reader_before_the_next_transaction_begins(connect: Connect) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.2)
    seen: list[str] = []

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        try:
            await ctx.stream.read()
        finally:
            await asyncio.sleep(0.05)
            seen.append("reader ended")

    @app.on_mail_from
    async def mail(ctx: MailContext, next: Next) -> None:
        await asyncio.sleep(0)
        seen.append("mail")

    with running(app) as server:
        client = connect(server.port)
        client.envelope()
        client.say("BDAT 3\r\na")
        client.sock.sendall(b"RSET\r\nMAIL FROM:<>\r\nRCPT TO:<c@d.example>\r\nBDAT 3 LAST\r\nb\r\n")
        replies = [client.reply()[:3] for _ in range(4)]
        assert replies == [b"250"] * 4
        assert [message.body for message in server.messages] == [b"b\r\n"]
    assert seen == ["mail", "reader ended", "mail", "reader ended"]


def test_nothing_leaks_when_clients_connect_and_disconnect_at_random(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    import random

    chance = random.Random(2821)
    app = Fumi(auth_optional=True, close_timeout=0.2)
    opened: list[ConnectContext] = []
    closed: list[CloseContext] = []

    @app.on_mail_from
    @app.on_rcpt_to
    async def slow(ctx: MailContext | RcptContext, next: Next) -> None:
        await asyncio.sleep(chance.random() * 0.004)

    app.on_connect(lambda ctx, next: opened.append(ctx))
    app.on_close(lambda ctx, next: closed.append(ctx))
    text = b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<a@b.example>\r\nDATA\r\n" + b"x" * 50 + b"\r\n.\r\nBDAT 9\r\nQUIT\r\n"
    with running(app) as server:
        for _ in range(300):
            sock = socket.create_connection(("127.0.0.1", server.port))
            for _ in range(chance.randrange(4)):
                sock.sendall(text[: chance.randrange(len(text))])
                time.sleep(chance.random() * 0.003)
            if chance.random() < 0.5:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            sock.close()
        # Until then the last of them may not have been accepted yet.
        until(lambda: len(closed) == 300 and connections(app) == 0)
        assert app.connection_count.clients == 0
    assert len(opened) == 300
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("name", ["my own pc", 'a" (x)\\ <y@z>;', "Büro", "x" * 255])
def test_whatever_a_client_calls_itself_the_trace_line_is_one(connect: Connect, name: str) -> None:
    app = Fumi(auth_optional=True, name="mx.example", close_timeout=0.2)
    with running(app) as server:
        client = connect(server.port)
        assert client.say(f"EHLO {name}").startswith(b"250")
        assert client.say("MAIL FROM:<>").startswith(b"250")
        assert client.say("RCPT TO:<a@b.example>").startswith(b"250")
        client.say("DATA")
        assert client.say("hi\r\n.").startswith(b"250")
        session = server.messages[0].session
    first, *rest = session.received_header().split("\r\n\t")
    assert session.client_hostname == name
    assert re.fullmatch(r"Received: from [A-Za-z0-9.?]+ \(\[127\.0\.0\.1\]\)", first)
    assert rest[0].startswith("by mx.example with ESMTP id ")
