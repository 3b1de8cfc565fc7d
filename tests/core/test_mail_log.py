"""What the built-in app's log says of mail, and what it does not."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import smtplib
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fumi_core import AuthContext, DataContext, Fumi, Next, plugins
from fumi_core.program import mail_log
from fumi_core.testing import running
from tests.core.client import Connect
from tests.core.programs import PROGRAM
from tests.support.ports import free_port
from tests.support.readme import ROOT
from tests.support.waiting import until

Log = Callable[[str], list[dict[str, Any]]]


Core = Callable[..., tuple[int, Log]]


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    """Starts fumi-core with these flags; gives its port, and what gives the events of a name in its log."""
    running = []

    def start(*flags: str) -> tuple[int, Log]:
        port, path = free_port(), tmp_path / "log"
        command = [PROGRAM, "--listen", f"127.0.0.1:{port}", "--proxy-protocol", "off", "--log-format", "json", *flags]
        with path.open("w") as output:
            running.append(subprocess.Popen(command, stderr=output, cwd=tmp_path))

        def log(name: str) -> list[dict[str, Any]]:
            return [entry for entry in map(json.loads, path.read_text().splitlines()) if entry["event"] == name]

        def found(name: str) -> list[dict[str, Any]]:
            until(lambda: bool(log(name)))
            return log(name)

        found("listening")
        return port, found

    yield start
    for process in running:
        process.terminate()
        process.wait(30)


def test_a_message_leaves_a_line_that_names_it(core: Core, tmp_path: Path) -> None:
    port, log = core("--deliver", "maildir:inbox")
    with smtplib.SMTP("127.0.0.1", port) as client:
        client.sendmail("ann@example.com", ["joe@example.org", "eve@example.org"], "Subject: x\r\n\r\nsecret words\r\n")
    (line,) = log("message accepted")
    (name,) = [path.name for path in (tmp_path / "inbox" / "new").iterdir()]
    assert line["logger"] == "fumi.core.mail"
    assert (line["from"], line["to"], line["client_ip"]) == ("ann@example.com", "joe@example.org,eve@example.org", "127.0.0.1")
    assert line["reply"] == f"2.0.0 Ok: queued as {name}" or name in line["reply"]
    assert line["size"] == len("Subject: x\r\n\r\nsecret words\r\n")
    (session,) = log("session ended")
    assert line["id"] == session["id"]
    assert "secret" not in (tmp_path / "log").read_text()


def test_rejected_recipients_are_logged_with_the_reason(core: Core) -> None:
    port, log = core("--deliver", "maildir:inbox", "--domain", "example.org", "--size", "1000")
    with smtplib.SMTP("127.0.0.1", port) as client:
        client.ehlo()
        client.mail("")
        client.rcpt('"forged line" INFO@elsewhere.example')
        client.rcpt("joe@elsewhere.example")
        client.rcpt("joe@example.org")
        assert client.data("x" * 2000)[0] == 552
    (line,) = log("recipient rejected")
    assert (line["from"], line["to"], line["code"], line["reply"]) == (
        "<>",
        "joe@elsewhere.example",
        550,
        "5.7.1 Relay access denied",
    )
    (line,) = log("message rejected")
    assert (line["to"], line["code"]) == ("joe@example.org", 552)


def test_4xx_replies_are_logged_as_deferred(core: Core, tmp_path: Path) -> None:
    port, log = core("--deliver", "maildir:inbox")
    (tmp_path / "inbox" / "tmp").rmdir()  # nothing can be written
    with smtplib.SMTP("127.0.0.1", port) as client, pytest.raises(smtplib.SMTPDataError):
        client.sendmail("ann@example.com", "joe@example.org", "x\r\n")
    (line,) = log("message deferred")
    assert (line["to"], line["code"]) == ("joe@example.org", 451)
    assert isinstance(line["client_port"], int)


def test_of_many_recipients_some_are_named(core: Core) -> None:
    port, log = core("--deliver", "maildir:inbox")
    with smtplib.SMTP("127.0.0.1", port) as client:
        client.sendmail("ann@example.com", [f"{number}@example.org" for number in range(13)], "x\r\n")
    (line,) = log("message accepted")
    assert line["to"].endswith("9@example.org,and 3 more")


def test_a_failed_login_is_logged_with_its_client_and_nothing_that_was_typed(core: Core, tmp_path: Path) -> None:
    done = subprocess.run([PROGRAM, "--hash-password"], input=b"secret\n", capture_output=True, check=True)
    (tmp_path / "users").write_text(f"joe:{done.stdout.decode().strip()}\n")
    port, log = core("--deliver", "discard:", "--users", "users", "--allow-insecure-auth")
    with smtplib.SMTP("127.0.0.1", port) as client:
        client.ehlo()
        for password, code in (("typed-wrong", 535), ("secret", 235)):
            words = base64.b64encode(f"\0joe\0{password}".encode()).decode()
            assert client.docmd("AUTH", "PLAIN " + words)[0] == code
    (line,) = log("authentication failed")
    assert (line["client_ip"], line["method"]) == ("127.0.0.1", "PLAIN")
    assert "typed-wrong" not in (tmp_path / "log").read_text()


def test_a_message_that_is_too_large_with_a_chunk_leaves_a_line(core: Core) -> None:
    port, log = core("--deliver", "maildir:inbox", "--size", "10")
    for chunks in (b"BDAT 11 LAST\r\nhello world", b"BDAT 11\r\nhello world", b"BDAT 5\r\nhelloBDAT 6\r\n world"):
        with smtplib.SMTP("127.0.0.1", port) as client:
            client.ehlo()
            client.mail("ann@example.com")
            client.rcpt("joe@example.org")
            client.send(chunks)
            while client.getreply()[0] != 552:
                pass
    assert [(line["to"], line["code"]) for line in log("message rejected")] == [("joe@example.org", 552)] * 3


def test_a_recipient_named_twice_and_refused_leaves_no_line_of_an_accepted_message(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    app = Fumi(auth_optional=True, lmtp=True, close_timeout=0.2).use(mail_log.transactions).use(plugins.logger())

    @app.on_data
    async def data(ctx: DataContext, next: Next) -> None:
        ctx.reject_recipient("c@d.example", "Mailbox full", 452)

    with caplog.at_level("INFO"), running(app) as server:
        client = connect(server.port)
        for line in ("LHLO x", "MAIL FROM:<>", "RCPT TO:<c@d.example>", "RCPT TO:<c@d.example>", "DATA"):
            client.say(line)
        assert [client.say("hi\r\n."), client.reply()] == [b"452 4.3.1 Mailbox full\r\n"] * 2
    assert "message deferred" in caplog.text
    assert "message accepted" not in caplog.text


def _plain(password: str) -> str:
    return base64.b64encode(f"\0joe\0{password}".encode()).decode()


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([f"AUTH PLAIN {_plain('right')}"], ["authentication accepted method=PLAIN user=joe"]),
        ([f"AUTH PLAIN {_plain('wrong')}"], ["authentication failed method=PLAIN"]),
        ([f"AUTH PLAIN {_plain('broken')}"], ["authentication deferred method=PLAIN"]),
        (["AUTH PLAIN", "*"], ["authentication aborted method=PLAIN"]),
        (["AUTH LOGIN", "*"], ["authentication aborted method=LOGIN"]),
        (["AUTH LOGIN", "not base64"], ["authentication aborted method=LOGIN"]),
        (["AUTH PLAIN x"], ["authentication aborted method=PLAIN"]),
        (["AUTH LOGIN", "A" * 20_000], ["authentication aborted method=LOGIN"]),
        (["AUTH PLAIN YW5uAGpvZQByaWdodA=="], ["authentication failed method=PLAIN"]),  # joe, for ann
        (["AUTH LOGIN", "am9l"], ["authentication aborted method=LOGIN"]),
        (["AUTH XOAUTH2 dXNlcj1qb2UBYXV0aD1CZWFyZXIgeAEB"], ["authentication failed method=XOAUTH2"]),
        (["AUTH XOAUTH2 dXNlcj1qb2UBYXV0aD1CZWFyZXIgeAEB", ""], ["authentication failed method=XOAUTH2"]),
        (
            ["AUTH LOGIN", "*", f"AUTH PLAIN {_plain('wrong')}", f"AUTH PLAIN {_plain('right')}"],
            [
                "authentication aborted method=LOGIN",
                "authentication failed method=PLAIN",
                "authentication accepted method=PLAIN user=joe",
            ],
        ),
    ],
)
def test_an_authentication_has_one_line_however_it_ends(
    connect: Connect, caplog: pytest.LogCaptureFixture, lines: list[str], told: list[str]
) -> None:
    app = Fumi(allow_insecure_auth=True, auth_methods=("PLAIN", "LOGIN", "XOAUTH2"), close_timeout=0.2, logger=True)
    app.use(mail_log.authentications)

    def decide(ctx: AuthContext, next: Next) -> None:
        if ctx.credentials.password == "broken":
            raise RuntimeError("on purpose")
        if ctx.credentials.validate_password("right"):
            ctx.accept("joe")

    app.on_auth(decide)
    with caplog.at_level(logging.INFO), running(app) as server:
        client = connect(server.port)
        client.say("EHLO client.example")
        for line in lines:
            client.say(line)
        client.close()
        until(lambda: "session ended" in caplog.text)
    assert _authentications(caplog) == told


@pytest.mark.parametrize("page", ["ops/README.md", "fumi_core/PROGRAM.md"])
@pytest.mark.parametrize("log", [mail_log.authentications, plugins.logger()], ids=["the built-in app", "the plugin"])
def test_fail2ban_finds_the_clients_with_wrong_passwords_and_no_others(
    connect: Connect, caplog: pytest.LogCaptureFixture, log: Callable[[Fumi], None], page: str
) -> None:
    (failregex,) = re.findall(r"failregex = ([^`]+)`", (ROOT / page).read_text())
    app = Fumi(allow_insecure_auth=True, close_timeout=0.2, logger=True).use(log)

    def decide(ctx: AuthContext, next: Next) -> None:
        if ctx.credentials.password == "broken":
            ctx.reject("4.7.0 The users' database is down", 454)
        if ctx.credentials.validate_password("right"):
            ctx.accept("joe")

    app.on_auth(decide)
    found = {}
    for password in ("right", "wrong", "broken"):
        caplog.clear()
        with caplog.at_level(logging.INFO), running(app) as server:
            client = connect(server.port)
            client.say("EHLO client.example")
            client.say(f"AUTH PLAIN {_plain(password)}")
            client.close()
            until(lambda: "session ended" in caplog.text)
        lines = [record.getMessage() for record in caplog.records]
        found[password] = [re.findall(failregex.replace("<HOST>", r"(\S+)"), line) for line in lines]
        found[password] = [hosts for hosts in found[password] if hosts]
    assert found == {"right": [], "wrong": [["127.0.0.1"]], "broken": []}


@pytest.mark.parametrize("ending", ["a half-close", "a reset", "the end of the server"])
def test_an_authentication_has_its_line_when_the_connection_ends_during_the_check(
    connect: Connect, caplog: pytest.LogCaptureFixture, ending: str
) -> None:
    app = Fumi(allow_insecure_auth=True, close_timeout=0.2, logger=True)
    app.use(mail_log.authentications)
    checking, checked = threading.Event(), threading.Event()

    async def decide(ctx: AuthContext, next: Next) -> None:
        checking.set()
        while not checked.is_set():
            await asyncio.sleep(0.001)
        ctx.accept("joe")

    app.on_auth(decide)
    with caplog.at_level(logging.INFO), running(app) as server:
        client = connect(server.port)
        client.say("EHLO client.example")
        client.sock.sendall(f"AUTH PLAIN {_plain('right')}\r\n".encode())
        assert checking.wait(60)
        if ending == "a half-close":
            client.close()
            checked.set()
        elif ending == "a reset":
            client.reset()
        else:
            server.run(app.close)
        until(lambda: "session ended" in caplog.text)
    counted = {result: count for (_, result), count in app.tally.authentications.items() if count}
    assert counted == {"ok" if ending == "a half-close" else "aborted": 1}
    assert _authentications(caplog) == [
        "authentication accepted method=PLAIN user=joe"
        if ending == "a half-close"
        else 'authentication failed method=PLAIN error="connection closed before the reply"'
    ]


def _authentications(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines that tell of one, without what they all have."""
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("authentication")]
    return [re.sub(r" id=\S+ client_ip=127.0.0.1 client_port=\d+", "", line) for line in lines]
