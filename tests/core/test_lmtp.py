"""LMTP (RFC 2033): a reply for each recipient."""

from __future__ import annotations

import smtplib
from collections.abc import Callable

import pytest

from fumi_core import Address, DataContext, Fumi, Next
from fumi_core.testing import running
from tests.core.client import Connect


def test_each_recipient_gets_its_own_answer(connect: Connect) -> None:
    app = Fumi(auth_optional=True, lmtp=True, close_timeout=0.2)

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        await ctx.stream.read()
        ctx.reject_recipient("e@d.example", "Mailbox full", 452)
        ctx.accept("stored")

    with running(app) as server:
        client = connect(server.port)
        for line in ("LHLO x", "MAIL FROM:<>", "RCPT TO:<c@d.example>", "RCPT TO:<e@d.example>", "RCPT TO:<f@d.example>", "DATA"):
            client.say(line)
        assert client.say("hi\r\n.") == b"250 2.0.0 stored\r\n"
        assert client.reply() == b"452 4.3.1 Mailbox full\r\n"
        assert client.reply() == b"250 2.0.0 stored\r\n"
        assert client.say("NOOP").startswith(b"250")


def test_one_rejection_is_the_reply_for_every_recipient(connect: Connect) -> None:
    app = Fumi(auth_optional=True, lmtp=True, close_timeout=0.2)
    app.on_data(lambda ctx, next: ctx.reject("No", 554))
    with running(app) as server:
        client = connect(server.port)
        for line in ("LHLO x", "MAIL FROM:<>", "RCPT TO:<c@d.example>", "RCPT TO:<e@d.example>", "DATA"):
            client.say(line)
        assert [client.say("hi\r\n."), client.reply()] == [b"554 5.7.1 No\r\n"] * 2


def test_the_standard_library_delivers_by_it() -> None:
    app = Fumi(auth_optional=True, lmtp=True, close_timeout=0.2)
    with running(app) as server:
        with smtplib.LMTP("127.0.0.1", server.port) as lmtp:
            assert lmtp.sendmail("a@b.example", ["c@d.example"], "Subject: hi\r\n\r\nhi\r\n") == {}
        assert server.messages[0].session.transmission_type == "LMTP"


def test_a_recipient_cannot_be_rejected_alone_in_smtp(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.2)

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        await ctx.stream.read()
        ctx.reject_recipient("e@d.example", "Mailbox full", 452)

    with running(app) as server:
        client = connect(server.port)
        client.envelope("a@b.example", "c@d.example", "e@d.example")
        client.say("DATA")
        assert client.say("hi\r\n.") == b"451 4.3.0 Local error in processing\r\n"
        assert not server.messages
    assert "reject_recipient() is for LMTP" in caplog.text


@pytest.mark.parametrize("change", [list.clear, list.pop, lambda rcpt_to: rcpt_to.append(rcpt_to[0])])
@pytest.mark.parametrize("ending", ["hi\r\n.", "a bare\nnewline"])
def test_each_recipient_gets_a_reply_whatever_an_app_does_to_the_envelope(
    connect: Connect, change: Callable[[list[Address]], object], ending: str
) -> None:
    app = Fumi(auth_optional=True, lmtp=True, close_timeout=0.2)

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        change(ctx.session.envelope.rcpt_to)

    with running(app, record=False) as server:
        client = connect(server.port)
        for line in ("LHLO x", "MAIL FROM:<>", "RCPT TO:<c@d.example>", "RCPT TO:<e@d.example>", "DATA"):
            client.say(line)
        replies = [client.say(f"text\r\n{ending}"), client.reply()]
        assert replies == [replies[0]] * 2
        assert replies[0][:3] == (b"250" if ending[-1] == "." else b"550")
        assert client.say("NOOP")[:3] == (b"250" if ending[-1] == "." else b"")
