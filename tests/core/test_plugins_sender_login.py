"""Who has logged in sends as that user and as nobody else."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from fumi_core import Fumi, plugins
from fumi_core.program.users import hash_password
from fumi_core.testing import running
from tests.core.client import Client, Connect
from tests.core.programs import Start
from tests.support.ports import free_port
from tests.support.starter import finished

NOT_YOURS = b"553 5.7.1 Sender address rejected: not owned by your login\r\n"


def build(user: Any, *given: Any, **more: Any) -> Fumi:
    app = Fumi(auth_optional=True, allow_insecure_auth=True, close_timeout=0.2)
    app.on_auth(lambda ctx, next: ctx.accept(user))
    return app.use(plugins.sender_login(*given, **more))


def logged_in(client: Client) -> Client:
    client.say("EHLO client.example")
    assert client.say("AUTH PLAIN " + base64.b64encode(b"\0x\0y").decode()).startswith(b"235")
    return client


def answer(client: Client, sender: str) -> bytes:
    smtputf8 = "" if sender.isascii() else " SMTPUTF8"
    reply = client.say(f"MAIL FROM:<{sender}>{smtputf8}")
    client.say("RSET")
    return reply


@pytest.mark.parametrize(
    ("login", "domains", "own", "others"),
    [
        (
            "joe@example.org", [],
            ["joe@example.org", "JOE@Example.Org", ""],
            ["ann@example.org", "joe@example.net", "joe@sub.example.org", "joe+tag@example.org", '"joe@example.org"@example.net'],
        ),
        (
            "joe@example.org", ["example.net"],
            ["joe@example.org", ""],
            ["joe@example.net", '"joe@example.org"@example.net'],
        ),
        (
            "joe", ["example.org", "example.net"],
            ["joe@example.org", "Joe@EXAMPLE.net", ""],
            ["ann@example.org", "joe@example.com", "joe@sub.example.org", "joejoe@example.org"],
        ),
        ("joe", [], [""], ["joe@example.org", "joe@localhost"]),
        (
            "J\u00fcrgen@b\u00fccher.example", [],
            ["ju\u0308rgen@xn--bcher-kva.example", "j\u00fcrgen@B\u00dcCHER.example"],
            ["jurgen@bucher.example"],
        ),
        ("j\u00fcrgen", ["xn--bcher-kva.example"], ["ju\u0308rgen@b\u00fccher.example"], ["jurgen@b\u00fccher.example"]),
    ],
)  # fmt: skip
def test_a_login_sends_under_its_own_addresses(
    connect: Connect, login: str, domains: list[str], own: list[str], others: list[str]
) -> None:
    with running(build(login, domains)) as server:
        client = logged_in(connect(server.port))
        for sender in own:
            assert answer(client, sender) == b"250 2.1.0 Ok\r\n", sender
        for sender in others:
            assert answer(client, sender) == NOT_YOURS, sender


def test_clients_that_have_not_logged_in_are_not_checked(connect: Connect) -> None:
    with running(build("joe", ["example.org"])) as server:
        client = connect(server.port)
        client.say("EHLO client.example")
        assert answer(client, "joe@example.org").startswith(b"250")


def test_users_that_are_no_texts_need_a_function_that_names_them(connect: Connect) -> None:
    with running(build({"name": "joe"}, ["example.org"])) as server:
        assert answer(logged_in(connect(server.port)), "joe@example.org").startswith(b"451 4.3.0")
    with running(build({"name": "joe"}, ["example.org"], login=lambda user: user["name"])) as server:
        client = logged_in(connect(server.port))
        assert answer(client, "joe@example.org").startswith(b"250")
        assert answer(client, "ann@example.org") == NOT_YOURS


def test_an_invalid_domain_is_an_error() -> None:
    with pytest.raises(ValueError, match="is not a domain"):
        plugins.sender_login(["joe@example.org"])


def test_the_flag_holds_the_users_to_their_addresses(start: Start, connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "users").write_text(f"x:{hash_password('y')}\n")
    port = free_port()
    flags = ["--proxy-protocol", "off", "--users", "users", "--allow-insecure-auth", "--domain", "example.org", "--sender-login"]
    program = start("--listen", f"127.0.0.1:{port}", "--deliver", "maildir:box", *flags)
    client = logged_in(connect(port))
    assert answer(client, "x@example.org").startswith(b"250")
    assert answer(client, "ann@example.org") == NOT_YOURS
    assert "sender rejected" in program.log.read_text()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ([], "--sender-login needs --users FILE"),
        (["--users", "plain"], "--sender-login: no user can send mail: name the users by their addresses"),
        (["--users", "plain", "--domain", "example.org"], ""),
        (["--users", "full"], ""),
        (["--users", "full", "app:app"], "--sender-login belongs to the built-in app"),
    ],
)
def test_a_flag_that_has_no_effect_or_stops_all_mail_is_refused(tmp_path: Path, flags: list[str], reason: str) -> None:
    (tmp_path / "plain").write_text(f"joe:{hash_password('x')}\n")
    (tmp_path / "full").write_text(f"joe@example.org:{hash_password('x')}\n")
    (tmp_path / "app.py").write_text("from fumi_core import Fumi\napp = Fumi()\n")
    done = finished("fumi-core", "--check", "--sender-login", *flags, cwd=tmp_path)
    assert done.returncode == (2 if reason else 0), done.stderr
    assert reason in done.stderr
    assert done.stderr.count("\n") == bool(reason)
