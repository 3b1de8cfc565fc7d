"""The flag --dovecot-auth: with the flags beside it, at a reload, in --check and in the log."""

from __future__ import annotations

import os
import signal
from base64 import b64encode
from pathlib import Path

import pytest

from tests.core.client import Client, Connect
from tests.core.dovecot_server import AUTH_HANDSHAKE, DovecotServer, Peer, StartDovecot, response
from tests.core.programs import Start, run
from tests.support.ports import free_port
from tests.support.waiting import until

ACCEPTED = b"235 2.7.0 Authentication successful\r\n"


def serve(peer: Peer) -> None:
    """Knows joe@example.org by his password and his token, and has a failure that is not his."""
    peer.raw(AUTH_HANDSHAKE)
    for fields in peer.requests():
        given = response(fields) if fields[0] == "AUTH" else b""
        if given in (b"\0joe\0secret", b"user=joe\x01auth=Bearer token\x01\x01"):
            peer.send("OK", fields[1], "user=joe@example.org")
        else:
            peer.send("FAIL", fields[1], *(["temp"] if b"broken" in given else []))


@pytest.fixture
def fake(dovecot: StartDovecot) -> DovecotServer:
    return dovecot(serve)


def ready(connect: Connect, port: int) -> Client:
    client = connect(port)
    assert b"AUTH PLAIN LOGIN XOAUTH2\r\n" in client.say("EHLO client.example")
    return client


def plain(user: str, password: str) -> str:
    return "AUTH PLAIN " + b64encode(f"\0{user}\0{password}".encode()).decode()


def test_logins_are_dovecots_and_its_names_count_for_sender_login(fake: DovecotServer, start: Start, connect: Connect) -> None:
    port = free_port()
    flags = ["--proxy-protocol", "off", "--allow-insecure-auth", "--auth-required", "--sender-login"]
    program = start("--listen", f"127.0.0.1:{port}", "--deliver", "discard:", "--dovecot-auth", fake.address, *flags)
    client = ready(connect, port)
    assert client.say("MAIL FROM:<joe@example.org>").startswith(b"530 5.7.0")
    assert client.say(plain("joe", "wrong-password")).startswith(b"535 5.7.8")
    assert client.say(plain("joe", "broken-password")).startswith(b"454 4.7.0")
    assert client.say("AUTH XOAUTH2 " + b64encode(b"user=joe\x01auth=Bearer token\x01\x01").decode()) == ACCEPTED
    assert client.say("MAIL FROM:<ann@example.org>").startswith(b"553 5.7.1")
    assert client.say("MAIL FROM:<joe@example.org>").startswith(b"250")
    log = program.log.read_text()
    assert [line.split("fumi.core.mail ")[1].split(" id=")[0] for line in log.splitlines() if "authentication" in line] == [
        "authentication failed", "authentication deferred", "authentication accepted",
    ]  # fmt: skip
    assert "user=joe@example.org" in log
    assert not [word for word in ("wrong-password", "broken-password", "secret", "token") if word in log]


def test_an_app_may_use_it_too(fake: DovecotServer, start: Start, connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "joes.py").write_text("from fumi_core import Fumi\napp = Fumi(auth_methods=['PLAIN'])\n")
    port = free_port()
    flags = ["--proxy-protocol", "off", "--allow-insecure-auth", "--dovecot-auth", fake.address]
    start("--listen", f"127.0.0.1:{port}", *flags, "joes:app")
    client = connect(port)
    assert b"AUTH PLAIN\r\n" in client.say("EHLO client.example")
    assert client.say(plain("joe", "secret")) == ACCEPTED


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reload_keeps_the_connection_and_a_new_address_is_used(
    dovecot: StartDovecot, start: Start, connect: Connect, tmp_path: Path, workers: int
) -> None:
    first, second = dovecot(serve), dovecot(serve)
    (tmp_path / "fumi.toml").write_text(f'dovecot-auth = "{first.address}"\n')
    port = free_port()
    flags = ["--proxy-protocol", "off", "--allow-insecure-auth", "--config", "fumi.toml", "--workers", str(workers)]
    program = start("--listen", f"127.0.0.1:{port}", "--deliver", "discard:", *flags)
    until(lambda: first.connections == workers)
    os.kill(program.process.pid, signal.SIGHUP)
    until(lambda: program.log.read_text().count("reloaded") == 1)
    assert ready(connect, port).say(plain("joe", "secret")) == ACCEPTED
    assert first.connections == workers
    (tmp_path / "fumi.toml").write_text(f'dovecot-auth = "{second.address}"\n')
    os.kill(program.process.pid, signal.SIGHUP)
    until(lambda: second.connections == workers)
    until(lambda: program.log.read_text().count("reloaded") == 2)
    first.close()
    assert ready(connect, port).say(plain("joe", "secret")) == ACCEPTED


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--dovecot-auth", "ADDRESS"], ""),
        (["--dovecot-auth", "ADDRESS", "--auth-required", "--sender-login"], ""),
        (["--dovecot-auth", "ADDRESS", "--users", "users"], "--users and --dovecot-auth exclude each other"),
        (["--dovecot-auth", "127.0.0.1:1"], "--dovecot-auth 127.0.0.1:1: "),
        (["--dovecot-auth", "unix:/nowhere/auth"], "--dovecot-auth unix:/nowhere/auth: No such file or directory"),
        (["--dovecot-auth", "fd:3"], "--dovecot-auth: 'fd:3' is not an address to connect to"),
        (["--dovecot-auth", "nonsense"], "'nonsense' is not an address"),
        (["--auth-required"], "--auth-required needs --users FILE or --dovecot-auth ADDR"),
        (["--sender-login"], "--sender-login needs --users FILE or --dovecot-auth ADDR"),
    ],
)
def test_check_connects_to_dovecot_and_names_what_does_not_fit(
    fake: DovecotServer, tmp_path: Path, flags: list[str], reason: str
) -> None:
    (tmp_path / "users").write_text("")
    done = run("--check", "--listen", "127.0.0.1:0", *(each.replace("ADDRESS", fake.address) for each in flags), cwd=tmp_path)
    assert done.returncode == (2 if reason else 0), done.stderr
    assert reason in done.stderr
    assert done.stderr.count("\n") == bool(reason)


def test_check_names_a_server_that_is_not_dovecot(dovecot: StartDovecot, tmp_path: Path) -> None:
    smtp = dovecot(lambda peer: peer.raw("220 mail.example ESMTP\r\n"))
    done = run("--check", "--listen", "127.0.0.1:0", "--dovecot-auth", smtp.address, cwd=tmp_path)
    assert done.returncode == 2
    assert "unexpected data: unexpected line '220 mail.example ESMTP\\r' instead of VERSION" in done.stderr
