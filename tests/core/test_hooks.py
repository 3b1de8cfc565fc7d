"""What handlers can do, phase by phase, and what the client hears of it."""

from __future__ import annotations

import asyncio
import logging
import threading
from functools import partial

import pytest

from fumi_core import CloseContext, ConnectContext, DataContext, Fumi, MailContext, MessageAborted, Next, RcptContext, SMTPError
from fumi_core.handlers.stream import MessageStream
from fumi_core.testing import running
from tests.core.client import Connect, Send
from tests.support.waiting import until


@pytest.fixture
def app() -> Fumi:
    return Fumi(auth_optional=True, name="mx.example", close_timeout=0.2)


def test_every_phase_can_refuse_with_its_own_default_code(app: Fumi, connect: Connect) -> None:
    @app.on_mail_from
    async def mail(ctx: MailContext, next: Next) -> None:
        if ctx.address.address == "bad@b.example":
            ctx.reject("Sender refused")
        await next()

    @app.on_rcpt_to
    async def rcpt(ctx: RcptContext, next: Next) -> None:
        if ctx.address.address == "bad@d.example":
            ctx.reject("No such user")
        await next()

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        if b"bad" in await ctx.stream.read():
            ctx.reject("Too much")
        await next()

    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        assert client.say("MAIL FROM:<bad@b.example>") == b"550 5.7.1 Sender refused\r\n"
        assert client.say("RCPT TO:<c@d.example>").startswith(b"503")
        assert client.say("MAIL FROM:<a@b.example>").startswith(b"250")
        assert client.say("RCPT TO:<bad@d.example>") == b"550 5.1.1 No such user\r\n"
        assert client.say("DATA").startswith(b"503")
        assert client.say("RCPT TO:<c@d.example>").startswith(b"250")
        assert client.say("DATA").startswith(b"354")
        assert client.say("bad\r\n.") == b"552 5.7.1 Too much\r\n"
        client.envelope()
        client.say("DATA")
        assert client.say("good\r\n.") == b"250 2.0.0 Ok\r\n"
        assert len(server.messages) == 1
        assert server.messages[0].envelope.rcpt_to[0].address == "c@d.example"


def test_a_rejected_connection_gets_the_rejection_in_place_of_the_banner(app: Fumi, connect: Connect) -> None:
    @app.on_connect
    def connected(ctx: ConnectContext, next: Next) -> None:
        ctx.reject("Go away")

    with running(app) as server:
        client = connect(server.port)
        assert client.banner == b"550 5.7.1 Go away\r\n"
        assert client.reply() == b""


def test_an_enhanced_code_of_the_message_is_kept(app: Fumi, connect: Connect) -> None:
    @app.on_mail_from
    async def mail(ctx: MailContext, next: Next) -> None:
        raise SMTPError("4.7.1 Later\nin two lines\r\nand three", 450)

    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        assert client.say("MAIL FROM:<>") == b"450-4.7.1 Later\r\n450-4.7.1 in two lines\r\n450 4.7.1 and three\r\n"


def test_characters_that_a_reply_cannot_have_are_replaced(app: Fumi, connect: Connect) -> None:
    @app.on_mail_from
    async def mail(ctx: MailContext, next: Next) -> None:
        ctx.reject("\x00é\r\n250 2.0.0 forged" + "x" * 2000, 554)

    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        reply = client.say("MAIL FROM:<>")
        assert all(line.startswith(b"554") and len(line) <= 512 for line in reply.splitlines(keepends=True))
        assert client.say("NOOP") == b"250 2.0.0 Ok\r\n"


def test_an_exception_is_451_and_logged_and_the_server_goes_on(
    app: Fumi, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    @app.on_mail_from
    async def mail(ctx: MailContext, next: Next) -> None:
        await asyncio.sleep(0)
        raise KeyError("oops")

    with running(app) as server, caplog.at_level(logging.ERROR):
        client = connect(server.port)
        client.say("EHLO x")
        assert client.say("MAIL FROM:<>") == b"451 4.3.0 Local error in processing\r\n"
        assert client.say("NOOP").startswith(b"250")
    assert "KeyError: 'oops'" in caplog.text


def test_an_exception_in_on_connect_is_421_and_the_end(app: Fumi, connect: Connect) -> None:
    @app.on_connect
    async def connected(ctx: ConnectContext, next: Next) -> None:
        raise KeyError("oops")

    with running(app) as server:
        client = connect(server.port)
        assert client.banner.startswith(b"421 4.3.0 ")
        assert client.reply() == b""


def test_a_421_from_a_handler_closes(app: Fumi, connect: Connect) -> None:
    @app.on_rcpt_to
    async def rcpt(ctx: RcptContext, next: Next) -> None:
        ctx.reject("Enough", 421)

    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        client.say("MAIL FROM:<>")
        assert client.say("RCPT TO:<a@b.example>").startswith(b"421 ")
        assert client.reply() == b""


def test_a_data_handler_may_set_the_text_of_the_250(app: Fumi, connect: Connect) -> None:
    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        ctx.accept("queued as X")

    with running(app) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        assert client.say("hi\r\n.") == b"250 2.0.0 queued as X\r\n"


def test_a_slow_handler_keeps_the_order_and_delays_no_other_client(app: Fumi, connect: Connect) -> None:
    release = threading.Event()

    @app.on_mail_from
    async def mail(ctx: MailContext, next: Next) -> None:
        if ctx.address.address == "slow@b.example":
            await asyncio.to_thread(release.wait, 20)
        await next()

    with running(app) as server:
        slow, quick = connect(server.port), connect(server.port)
        slow.say("EHLO x")
        slow.sock.sendall(b"MAIL FROM:<slow@b.example>\r\nNOOP\r\nBOGUS\r\n")
        quick.envelope()
        release.set()
        assert [slow.reply()[:3] for _ in range(3)] == [b"250", b"250", b"500"]


def test_a_handler_that_reads_nothing_is_fine(app: Fumi, connect: Connect) -> None:
    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        pass

    with running(app) as server:
        client = connect(server.port)
        for _ in range(2):
            client.envelope()
            client.say("DATA")
            assert client.say((b"x" * 70 + b"\r\n") * 40000 + b".") == b"250 2.0.0 Ok\r\n"


def test_a_refusal_after_a_little_text_waits_for_the_end_and_keeps_nothing(app: Fumi, connect: Connect) -> None:
    streams: list[MessageStream] = []

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        streams.append(ctx.stream)
        await ctx.stream.__anext__()
        ctx.reject("Enough", 554)

    with running(app, record=False) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        assert client.say((b"x" * 70 + b"\r\n") * 40000 + b".\r\nNOOP") == b"554 5.7.1 Enough\r\n"
        assert client.reply() == b"250 2.0.0 Ok\r\n"
    assert not streams[0].has_text


def test_a_message_that_breaks_off_raises_in_the_reader_and_on_close_follows(
    app: Fumi, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[object] = []

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        try:
            await ctx.stream.read()
        except MessageAborted:
            seen.append("aborted")
            raise

    @app.on_close
    async def closed(ctx: CloseContext, next: Next) -> None:
        seen.append("closed")

    def ended(connections: int) -> bool:
        return seen.count("closed") == connections

    with running(app, record=False) as server, caplog.at_level(logging.INFO):
        for count, text in enumerate((b"", b"half a message\r\n"), 1):
            client = connect(server.port)
            client.envelope()
            client.say("DATA")
            client.sock.sendall(text)
            client.close()
            until(partial(ended, count))
    assert seen == ["aborted", "closed"] * 2
    assert "Traceback" not in caplog.text
    assert caplog.text.count("message aborted") == 2


def test_a_message_cut_off_by_the_servers_end_is_one_line(app: Fumi, connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    reading: list[bool] = []

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        reading.append(True)
        await ctx.stream.read()

    with caplog.at_level(logging.INFO), running(app, record=False) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        client.sock.sendall(b"half a message\r\n")
        until(lambda: reading == [True])
    assert "Traceback" not in caplog.text
    assert caplog.text.count("message aborted") == 1


def test_on_close_comes_once_for_each_connection_that_reached_on_connect(app: Fumi, connect: Connect) -> None:
    opened: list[str] = []
    closed: list[str] = []
    app.on_connect(lambda ctx, next: opened.append(ctx.session.id))
    app.on_close(lambda ctx, next: closed.append(ctx.session.id))
    with running(app) as server:
        connect(server.port).say("QUIT")
        connect(server.port).close()
        connect(server.port).reset()
        browser = connect(server.port)
        browser.say("GET / HTTP/1.0")
        browser.close()
        until(lambda: len(closed) == 4)
    assert sorted(opened) == sorted(closed)
    assert len(set(closed)) == 4


@pytest.mark.parametrize("ahead", [b"", b"DATA\r\n"])
def test_a_handler_is_cancelled_when_its_client_disconnects(app: Fumi, connect: Connect, ahead: bytes) -> None:
    seen: list[str] = []

    @app.on_rcpt_to
    async def rcpt(ctx: RcptContext, next: Next) -> None:
        seen.append("waiting")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    app.on_close(lambda ctx, next: seen.append("closed"))
    with running(app) as server:
        client = connect(server.port)
        client.say("EHLO x")
        client.say("MAIL FROM:<>")
        client.sock.sendall(b"RCPT TO:<a@b.example>\r\n" + ahead)
        until(lambda: seen == ["waiting"])
        client.reset()
        until(lambda: seen == ["waiting", "cancelled", "closed"])


def test_a_client_that_sends_all_and_half_closes_gets_all_replies(app: Fumi, connect: Connect) -> None:
    @app.on_mail_from
    async def mail(ctx: MailContext, next: Next) -> None:
        await asyncio.sleep(0.01)

    with running(app) as server:
        client = connect(server.port)
        client.sock.sendall(b"EHLO x\r\nMAIL FROM:<>\r\nRCPT TO:<a@b.example>\r\nNOOP\r\n")
        client.sock.shutdown(1)
        assert [client.reply()[:3] for _ in range(5)] == [b"250", b"250", b"250", b"250", b""]


def test_a_skipped_stream_ends_with_the_message(app: Fumi, connect: Connect) -> None:
    ended: list[int] = []

    @app.on_data
    async def skip(ctx: DataContext, next: Next) -> None:
        await ctx.stream.skip()
        ended.append(ctx.stream.size)

    with running(app) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        client.sock.sendall(b"x" * 300_000 + b"\r\n")
        assert client.say(".") == b"250 2.0.0 Ok\r\n"
    assert ended == [300_002]


def test_a_skipped_stream_that_breaks_off_raises(app: Fumi, connect: Connect) -> None:
    aborted: list[bool] = []

    @app.on_data
    async def skip(ctx: DataContext, next: Next) -> None:
        try:
            await ctx.stream.skip()
        except MessageAborted:
            aborted.append(True)
            raise

    with running(app) as server:
        client = connect(server.port)
        client.envelope()
        client.say("DATA")
        client.sock.sendall(b"x\r\n")
        client.close()
        until(lambda: aborted == [True])


def test_an_app_may_run_again_and_records_each_message_once(app: Fumi, send: Send) -> None:
    for _ in range(2):
        with running(app) as server:
            send(server.port, "Subject: hi\r\n\r\nhi\r\n")
            assert len(server.messages) == 1


def test_plugins_and_use_chain() -> None:
    seen: list[Fumi] = []
    app = Fumi()
    assert app.use(seen.append) is app
    assert seen == [app]
