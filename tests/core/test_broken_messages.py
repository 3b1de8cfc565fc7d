"""A message that breaks off between its chunks: its handlers keep their envelope until they have ended."""

from __future__ import annotations

import asyncio
import logging

import pytest

from fumi_core import Address, DataContext, Fumi, MailContext, MessageAborted, Next
from fumi_core.program.builtin import build
from fumi_core.testing import running
from tests.core.client import Connect
from tests.core.scripted_hop import StartHop

ENDINGS = [b"RSET", b"EHLO again", b"HELO again"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("chunk", [b"BDAT 0\r\n", b"BDAT 5\r\nhello"])
def test_handlers_of_a_message_that_is_given_up_have_its_envelope(
    connect: Connect, caplog: pytest.LogCaptureFixture, ending: bytes, chunk: bytes
) -> None:
    app = Fumi(auth_optional=True, close_timeout=0.2)
    seen: list[object] = []

    @app.on_mail_from
    async def mail(ctx: MailContext, next: Next) -> None:
        ctx.session.envelope.at_end += (lambda: seen.append("at_end"),)

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        try:
            await ctx.stream.read()
        except MessageAborted:
            await asyncio.sleep(0.02)
            envelope = ctx.session.envelope
            seen.append((envelope.mail_from and envelope.mail_from.address, [each.address for each in envelope.rcpt_to]))
            raise

    with running(app, record=False) as server, caplog.at_level(logging.INFO):
        client = connect(server.port)
        client.envelope()
        client.sock.sendall(chunk + ending + b"\r\nRCPT TO:<c@d.example>\r\nMAIL FROM:<>\r\n")
        assert [client.reply()[:3] for _ in range(4)] == [b"250", b"250", b"503", b"250"]
    assert seen == [("a@b.example", ["c@d.example"]), "at_end"]
    assert "Traceback" not in caplog.text


def test_a_rejected_chunk_leaves_the_envelope_to_the_handlers(connect: Connect) -> None:
    app = Fumi(auth_optional=True, size=10, close_timeout=0.2)
    seen: list[Address | None] = []

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        await ctx.stream.read()
        await asyncio.sleep(0.02)
        seen.append(ctx.session.envelope.mail_from)

    with running(app, record=False) as server:
        client = connect(server.port)
        client.envelope()
        client.sock.sendall(b"BDAT 5\r\nhelloBDAT 9\r\nand more!RSET\r\n")
        assert [client.reply()[:3] for _ in range(3)] == [b"250", b"552", b"250"]
    assert [sender and sender.address for sender in seen] == ["a@b.example"]


def test_a_message_that_a_client_abandons_is_not_logged_as_a_bypassed_next_hop(
    scripted_hop: StartHop, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    app = build(f"smtp:{scripted_hop().address}")
    with running(app) as server, caplog.at_level(logging.INFO):
        client = connect(server.port)
        for chunk in (b"BDAT 0\r\n", b"BDAT 5\r\nhello"):
            client.envelope()
            client.sock.sendall(chunk + b"RSET\r\nNOOP\r\n")
            assert [client.reply()[:3] for _ in range(3)] == [b"250"] * 3
    assert "bypassed" not in caplog.text
    assert "Traceback" not in caplog.text
