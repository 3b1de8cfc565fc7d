"""The SMTP dialogue in the log at level debug: what is in it, and above all what is not."""

from __future__ import annotations

import logging
from base64 import b64encode

import pytest

from fumi_core import Fumi
from fumi_core.server.dialogue_log import shown
from fumi_core.testing import running
from tests.core.client import Connect


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"EHLO client.example\r\n", "EHLO client.example"),
        (b"mail from:<a@b.example> SIZE=12 SMTPUTF8\r\n", "mail from:<a@b.example> SIZE=12 SMTPUTF8"),
        (b"MAIL FROM:root\r\n", "MAIL FROM:root"),
        (b"BDAT 12 LAST\r\n", "BDAT 12 LAST"),
        (b"XCLIENT ADDR=192.0.2.1 LOGIN=joe\r\n", "XCLIENT ADDR=192.0.2.1 LOGIN=joe"),
        (b"DATA\r\n", "DATA"),
        (b"AUTH PLAIN AGpvZQBzZWNyZXQ=\r\n", "AUTH PLAIN …"),
        (b"AUTH PLAIN\r\n", "AUTH PLAIN"),
        (b"AUTH secret\r\n", "AUTH …"),
        (b"NOOP secret\r\n", "NOOP …"),
        (b"EHLO dear friend\r\n", "EHLO …"),
        (b"Mail from: Bob and his wife\r\n", "Mail …"),
        (b"Help me with the secret\r\n", "Help …"),
        (b"AGpvZQBzZWNyZXQ=\r\n", "(18 bytes, not a command)"),
        (b"\r\n", "(2 bytes, not a command)"),
        (b"\xff\x00\r\n", "(4 bytes, not a command)"),
    ],
)
def test_of_a_line_what_has_the_form_of_a_command_is_shown(line: bytes, text: str) -> None:
    assert shown(line) == text


def dialogue(connect: Connect, level: int, caplog: pytest.LogCaptureFixture) -> list[str]:
    app = Fumi(allow_insecure_auth=True, close_timeout=0.2)
    app.on_auth(lambda ctx, next: ctx.accept("joe") if ctx.credentials.password == "secret" else None)
    plain, name, password = (b64encode(each).decode() for each in (b"\0joe\0wrong", b"joe", b"secret"))
    with caplog.at_level(level), running(app) as server:
        client = connect(server.port)
        client.say("EHLO client.example")
        for line in (f"AUTH PLAIN {plain}", "AUTH LOGIN", name, password, f"AUTH {password}", password):
            client.say(line)
        for line in ("MAIL FROM:<a@b.example>", "RCPT TO:<c@d.example>", "DATA", "secret text\r\n.", "QUIT"):
            client.say(line)
    return [record.getMessage() for record in caplog.records if record.name == "fumi.core.dialogue"]


def test_at_debug_the_dialogue_is_there_without_credentials_and_content(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    lines = dialogue(connect, logging.DEBUG, caplog)
    together = "\n".join(lines)
    for wanted in (
        'received="EHLO client.example"',
        'received="AUTH PLAIN …"',
        'sent="535 5.7.8 Error: authentication failed"',
        'received="MAIL FROM:<a@b.example>"',
        'received="RCPT TO:<c@d.example>"',
        "received=DATA",
        'sent="221 2.0.0 Bye"',
    ):
        assert wanted.replace("…", "\\u2026") in together
    for secret in (b"secret", b"\0joe\0wrong", b"joe"):
        assert secret.decode() not in together
        assert b64encode(secret).decode() not in together
    assert all(" id=" in line for line in lines)


def test_above_debug_it_is_not(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    assert dialogue(connect, logging.INFO, caplog) == []
