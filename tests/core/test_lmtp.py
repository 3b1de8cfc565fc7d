"""LMTP (RFC 2033): a reply for each recipient."""

from __future__ import annotations

import smtplib
from typing import Any

from fumi_core import Fumi
from fumi_core.testing import running


def test_each_recipient_gets_its_own_answer(connect: Any) -> None:
    app = Fumi(auth_optional=True, lmtp=True, close_timeout=0.2)

    @app.on_data
    async def data(ctx: Any, next: Any) -> None:
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


def test_one_refusal_is_said_to_every_recipient(connect: Any) -> None:
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
