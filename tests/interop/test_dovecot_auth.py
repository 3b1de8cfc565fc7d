"""Logins and recipients of a real Dovecot, and its IMAP server, which reads what a Maildir for each recipient has."""

from __future__ import annotations

import asyncio
import os
import resource
import select
import signal
import smtplib
import ssl
import tempfile
import threading
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fumi_core import Fumi, plugins
from fumi_core.plugins.dovecot import channel
from fumi_core.proxy_protocol import ProxyHeader
from fumi_core.testing import running
from tests.core.client import Client
from tests.interop.dovecot_logins import DovecotLogins
from tests.interop.starting import StartEdge
from tests.support.ports import free_port
from tests.support.programs import Programs
from tests.support.readme import ROOT, sections
from tests.support.starter import BIN
from tests.support.waiting import until

ACCEPTED, FAILED, TEMPORARY = b"235", b"535", b"454"
REASON = b"535 5.7.8 Error: authentication failed: "


@pytest.fixture
def place(programs: Programs) -> Iterator[Path]:
    """A directory that all users may enter, as they may not enter pytest's."""
    with tempfile.TemporaryDirectory(prefix="fumi-mail-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)
        programs.close()


@pytest.fixture
def dovecot(programs: Programs, place: Path) -> Iterator[Callable[..., DovecotLogins]]:
    started: list[DovecotLogins] = []

    def start(**options: Any) -> DovecotLogins:
        started.append(DovecotLogins(programs, place, **options))
        return started[-1]

    yield start
    for each in started:
        each.close()


def build(dovecot: DovecotLogins, **options: Any) -> Fumi:
    usual = {"auth_optional": True, "allow_insecure_auth": True, "auth_methods": ["PLAIN", "LOGIN", "XOAUTH2"]}
    app = Fumi(**{**usual, "close_timeout": 0.2, **options}).use(plugins.dovecot_auth(dovecot.auth))
    app.on_mail_from(lambda ctx, next: ctx.reject(f"You are {ctx.session.user}"))
    return app


def encoded(text: str) -> str:
    return b64encode(text.encode()).decode()


def plain(user: str, password: str) -> str:
    return "AUTH PLAIN " + encoded(f"\0{user}\0{password}")


def xoauth2(user: str, token: str) -> str:
    return "AUTH XOAUTH2 " + encoded(f"user={user}\x01auth=Bearer {token}\x01\x01")


def of_client(number: int) -> bytes:
    """The PROXY header of a client of its own: Dovecot delays the logins of one that has failed, by seconds."""
    return ProxyHeader(2, "PROXY", "TCP4", (f"192.0.{number // 200}.{number % 200 + 1}", 1234), ("198.51.100.1", 587)).to_bytes()


def log_in(port: int, command: str, header: bytes = b"") -> bytes:
    """The reply that ends this AUTH."""
    client = Client(port, header)
    try:
        client.say("EHLO client.example")
        reply = client.say(command)
        return client.say("") if reply.startswith(b"334") else reply
    finally:
        client.close()


DECISIONS = [
    (plain("joe@d.example", "secret"), ACCEPTED),
    (plain("JOE@D.example", "secret"), ACCEPTED),
    (plain("joe@d.example", "wrong"), FAILED),
    (plain("eve@d.example", "secret"), FAILED),
    (plain("joe@d.example", "x" * 8500), FAILED),
    (xoauth2("joe@d.example", "of-joe@d.example"), ACCEPTED),
    (xoauth2("joe@d.example", "of-ann@d.example"), FAILED),
    (xoauth2("joe@d.example", "stale"), FAILED),
    (xoauth2("joe@d.example", "broken"), TEMPORARY),
    (plain("moved@d.example", "secret"), REASON + b"Moved"),
    (plain("moved@d.example", "wrong"), FAILED),
    (plain("elsewhere@d.example", "secret"), TEMPORARY),
    (plain("banned@d.example", "secret"), FAILED),
    (plain("tarpit@d.example", "secret"), ACCEPTED),
    (plain("tarpit@d.example", "wrong"), FAILED),
]


def test_dovecot_decides(dovecot: Callable[..., DovecotLogins]) -> None:
    with running(build(dovecot(), proxy_protocol="required")) as server:
        for number, (command, expected) in enumerate(DECISIONS):
            reply = log_in(server.port, command, of_client(number))
            assert reply.startswith(expected), (command, reply)


@pytest.mark.parametrize(("mechanisms", "offered"), [("plain", "PLAIN LOGIN"), ("login", "PLAIN LOGIN"), ("xoauth2", "XOAUTH2")])
def test_login_is_offered_and_checked_by_what_dovecot_has(
    dovecot: Callable[..., DovecotLogins], mechanisms: str, offered: str
) -> None:
    with running(build(dovecot(mechanisms=mechanisms))) as server:
        client = Client(server.port)
        assert f"AUTH {offered}\r\n".encode() in client.say("EHLO client.example")
        client.close()
        for password, expected in (("secret", ACCEPTED), ("wrong", FAILED)) if "LOGIN" in offered else ():
            assert log_in(server.port, plain("joe@d.example", password)).startswith(expected)
            client = Client(server.port)
            client.say("EHLO client.example")
            assert client.say(f"AUTH LOGIN {encoded('joe@d.example')}").startswith(b"334")
            assert client.say(encoded(password)).startswith(expected)
            client.close()


def test_a_delayed_failure_holds_up_no_other_login(dovecot: Callable[..., DovecotLogins]) -> None:
    with running(build(dovecot(failure_delay=20), proxy_protocol="required")) as server:
        slow = Client(server.port, of_client(0))
        slow.say("EHLO client.example")
        slow.sock.sendall(plain("joe@d.example", "wrong").encode() + b"\r\n")
        for number in range(1, 6):
            assert log_in(server.port, plain("joe@d.example", "secret"), of_client(number)).startswith(ACCEPTED)
        assert select.select([slow.sock], [], [], 0)[0] == []
        slow.close()


def test_dovecot_learns_of_the_client(dovecot: Callable[..., DovecotLogins]) -> None:
    started = dovecot()
    with running(build(started, assume_tls=True)) as server:
        assert log_in(server.port, plain("joe@d.example", "secret")).startswith(ACCEPTED)
        until(lambda: "client in: AUTH" in started.log(), "Dovecot's log")
    (line,) = (line for line in started.log().splitlines() if "client in: AUTH" in line)
    assert "service=smtp\tsecured\tlip=127.0.0.1\tlport=" in line.replace("#011", "\t")
    assert "rip=127.0.0.1" in line


def test_a_thousand_logins_at_once_are_all_answered(dovecot: Callable[..., DovecotLogins]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    try:
        with running(build(dovecot(failure_delay=1), proxy_protocol="required")) as server:
            replies = asyncio.run(_at_once(server.port, 1000))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [reply[:3] for reply in replies[::2]] == [ACCEPTED] * 500
    assert {reply[:3] for reply in replies[1::2]} == {FAILED}


async def _at_once(port: int, count: int) -> list[bytes]:
    """Connect so many clients, then have all log in, every second one with a wrong password."""
    clients = []
    for number in range(count):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(of_client(number))
        await reader.readline()
        writer.write(b"HELO client.example\r\n")
        await reader.readline()
        clients.append((reader, writer))
    for number, (_, writer) in enumerate(clients):
        writer.write(plain("joe@d.example", "wrong" if number % 2 else "secret").encode() + b"\r\n")
    replies = [await reader.readline() for reader, _ in clients]
    for _, writer in clients:
        writer.close()
    return replies


def test_a_restart_under_load_accepts_or_defers_and_logs_one_line_each_way(
    dovecot: Callable[..., DovecotLogins], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fumi.core")
    started = dovecot()
    replies: list[tuple[str, bytes]] = []
    over = threading.Event()
    with running(build(started)) as server:

        def load(password: str) -> None:
            while not over.is_set():
                replies.append((password, log_in(server.port, plain("joe@d.example", password))[:3]))

        threads = [threading.Thread(target=load, args=(password,)) for password in ("secret", "secret", "wrong")]
        for thread in threads:
            thread.start()
        for _ in range(2):
            count = replies.count(("secret", ACCEPTED))
            until(lambda count=count: replies.count(("secret", ACCEPTED)) > count + 5, "logins")  # type: ignore[misc]
            started.kill()
            count = replies.count(("secret", TEMPORARY))
            until(lambda count=count: replies.count(("secret", TEMPORARY)) > count + 5, "deferrals")  # type: ignore[misc]
            started.start()
            count = replies.count(("secret", ACCEPTED))
            until(lambda count=count: replies.count(("secret", ACCEPTED)) > count + 5, "logins again")  # type: ignore[misc]
        over.set()
        for thread in threads:
            thread.join()
    found = Counter(replies)
    assert {reply for password, reply in found if password == "secret"} == {ACCEPTED, TEMPORARY}
    assert {reply for password, reply in found if password == "wrong"} <= {FAILED, TEMPORARY}
    lines = [record.getMessage().split(" address=")[0] for record in caplog.records if "Dovecot" in record.getMessage()]
    assert lines == ["Dovecot unavailable", "Dovecot available"] * 2
    assert "secret" not in caplog.text


def test_a_dovecot_that_hangs_is_deferred_and_used_again_when_it_goes_on(
    dovecot: Callable[..., DovecotLogins], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "REPLY_TIMEOUT", 1.0)
    monkeypatch.setattr(channel, "CONNECT_TIMEOUT", 1.0)
    started = dovecot()
    with running(build(started)) as server:
        assert log_in(server.port, plain("joe@d.example", "secret")).startswith(ACCEPTED)
        process = started.auth_process()
        os.kill(process, signal.SIGSTOP)
        try:
            for _ in range(2):
                assert log_in(server.port, plain("joe@d.example", "secret")).startswith(TEMPORARY)
        finally:
            os.kill(process, signal.SIGCONT)
        until(lambda: log_in(server.port, plain("joe@d.example", "secret")).startswith(ACCEPTED), "a login")


def test_recipients_are_dovecots_users(dovecot: Callable[..., DovecotLogins]) -> None:
    started = dovecot()
    app = Fumi(auth_optional=True, close_timeout=0.2, lenient_addresses=True).use(plugins.dovecot_users(started.userdb))
    with running(app) as server:
        client = Client(server.port)
        client.say("EHLO client.example")
        client.say("MAIL FROM:<>")
        for recipient, expected in {
            "joe@d.example": b"250", "JOE+news@d.example": b"250", '"joe"@d.example': b"250",
            "eve@d.example": b"550 5.1.1", "joe@other.example": b"550 5.1.1", '"joe\tx"@d.example': b"5",
            "x" * 200 + "@d.example": b"550 5.1.1", "*@d.example": b"550 5.1.1", "joe*ann@d.example": b"550 5.1.1",
        }.items():  # fmt: skip
            assert client.say(f"RCPT TO:<{recipient}>").startswith(expected), recipient
        started.kill()
        assert client.say("RCPT TO:<joe@d.example>").startswith(b"451 4.3.0")
        started.start()
        assert client.say("RCPT TO:<joe@d.example>").startswith(b"250")
        client.close()


def test_a_login_by_dovecot_sends_to_maildirs_that_its_imap_server_reads(
    dovecot: Callable[..., DovecotLogins], programs: Programs
) -> None:
    started, port = dovecot(), free_port()
    flags = ["--proxy-protocol", "off", "--listen", f"127.0.0.1:{port}", "--name", "mx.example", "--allow-insecure-auth"]
    flags += ["--dovecot-auth", started.auth, "--auth-required", "--sender-login", "--deliver", f"maildir:{started.maildirs}"]
    programs.start(BIN / "fumi-core", *flags, port=port, log="core.log")
    client = Client(port)
    client.say("EHLO client.example")
    assert client.say(plain("joe@d.example", "wrong")).startswith(FAILED)
    assert client.say(plain("Joe@d.example", "secret")).startswith(ACCEPTED)
    assert client.say("MAIL FROM:<ann@d.example>").startswith(b"553 5.7.1")
    assert client.say("MAIL FROM:<joe@d.example>").startswith(b"250")
    assert client.say("RCPT TO:<eve@d.example>").startswith(b"550 5.1.1")
    for recipient in ("joe@d.example", "ann+news@d.example"):
        assert client.say(f"RCPT TO:<{recipient}>").startswith(b"250")
    assert client.say("DATA").startswith(b"354")
    assert client.say("Subject: hello\r\n\r\nthe text\r\n.").startswith(b"250")
    client.close()
    for name, address in (("joe", "joe@d.example"), ("ann", "ann+news@d.example")):
        (message,) = started.read(f"{name}@d.example")
        assert message.startswith(f"Return-Path: <joe@d.example>\r\nDelivered-To: {address}\r\nReceived: ".encode())
        assert message.endswith(b"Subject: hello\r\n\r\nthe text\r\n")
    log = (programs.directory / "core.log").read_text()
    assert not [word for word in ("secret", "wrong") if word in log]


def test_behind_an_edge_users_log_in_over_tls_and_other_servers_use_starttls(
    dovecot: Callable[..., DovecotLogins], programs: Programs, edge: StartEdge
) -> None:
    started, port = dovecot(), free_port()
    flags = ["--listen", f"127.0.0.1:{port}", "--name", "mx.example", "--domain", "d.example", "--sender-login"]
    flags += ["--dovecot-auth", started.auth, "--deliver", f"maildir:{started.maildirs}"]
    programs.start(BIN / "fumi-core", *flags, port=port, log="core.log")
    ports = edge(port)
    tls = ssl.create_default_context()
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    with smtplib.SMTP_SSL("127.0.0.1", ports.tls_port, timeout=60, context=tls) as client:
        with pytest.raises(smtplib.SMTPAuthenticationError, match="535"):
            client.login("joe@d.example", "wrong")
        client.login("joe@d.example", "secret")
        with pytest.raises(smtplib.SMTPSenderRefused, match=r"553.*not owned by your login"):
            client.sendmail("ann@d.example", ["ann@d.example"], "Subject: no\r\n\r\n")
        client.sendmail("joe@d.example", ["ann@d.example"], "Subject: by tls\r\n\r\n")
    with smtplib.SMTP("127.0.0.1", ports.starttls_port, timeout=60) as client:
        client.starttls(context=tls)
        refused = client.sendmail("x@world.example", ["ann@d.example", "eve@d.example"], "Subject: by starttls\r\n\r\n")
    assert {name: code for name, (code, _) in refused.items()} == {"eve@d.example": 550}
    assert [b"with ESMTPSA " in each for each in started.read("ann@d.example")] == [True, False]
    asked = [line.replace("#011", "\t") for line in started.log().splitlines() if "client in: AUTH" in line]
    from_the_core = [line for line in asked if "service=smtp" in line]
    assert len(from_the_core) >= 2
    assert all("\tsecured\tlip=127.0.0.1\t" in line for line in from_the_core)


def test_the_pages_configuration_of_dovecot_makes_the_socket(dovecot: Callable[..., DovecotLogins], place: Path) -> None:
    """The block of PROGRAM.md, with another group, in this Dovecot's own file."""
    (text,) = (each.text for each in sections((ROOT / "fumi_core/PROGRAM.md").read_text()) if each.title == "Users of Dovecot")
    block = text.split("```\n")[1]
    assert "group = fumi-core\n" in block
    started = dovecot()
    started.kill()
    with (started.directory / "dovecot.conf").open("a") as file:
        file.write(block.replace("group = fumi-core", "group = mail"))
    started.start()
    socket = started.directory / "base" / "auth-fumi"
    assert socket.stat().st_mode & 0o777 == 0o660
    app = Fumi(auth_optional=True, allow_insecure_auth=True, close_timeout=0.2).use(plugins.dovecot_auth(f"unix:{socket}"))
    with running(app) as server:
        assert log_in(server.port, plain("joe@d.example", "secret")).startswith(ACCEPTED)
