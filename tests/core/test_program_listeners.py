"""``[[core.listener]]``: an MX and a submission service in one process, each with settings of its own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from base64 import b64encode
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import click
import pytest

from fumi_core import cli
from fumi_core.program.listeners import LISTENER_KEYS
from fumi_core.program.users import hash_password
from fumi_core.program.work import CoreWork
from tests.core.client import Client, Connect
from tests.core.programs import Program, Start, get, run
from tests.support.ports import free_port
from tests.support.readme import ROOT
from tests.support.waiting import until

HASH = hash_password("secret")
EDGE = "[core]\nproxy-protocol = 'off'\n"
MESSAGE = "Subject: hi\r\n\r\nhi\r\n."


def at(port: int, *lines: str) -> str:
    return "\n".join(["[[core.listener]]", f"address = '127.0.0.1:{port}'", *lines, ""])


def mx(port: int, domain: str = "example.org") -> str:
    return at(port, f"domain = '{domain}'", "deliver = 'maildir:./mx'")


def submission(port: int) -> str:
    lines = ("users = 'users'", "auth-required = true", "allow-insecure-auth = true", "sender-login = true")
    return at(port, *lines, "deliver = 'maildir:./out'")


def log_in(client: Client) -> None:
    assert client.say("AUTH PLAIN " + b64encode(b"\0ann@example.org\0secret").decode()).startswith(b"235")


def deliver(client: Client, sender: str, recipient: str) -> None:
    client.envelope(sender, recipient)
    assert client.say("DATA").startswith(b"354")
    assert client.say(MESSAGE).startswith(b"250")


@pytest.fixture
def served(tmp_path: Path, start: Start) -> Callable[..., Program]:
    """Starts fumi-core with these tables."""

    def served(*tables: str, flags: tuple[str, ...] = ()) -> Program:
        (tmp_path / "users").write_text(f"ann@example.org:{HASH}\n")
        (tmp_path / "core.toml").write_text(EDGE + "".join(tables))
        return start("--config", "core.toml", *flags)

    return served


def stored(directory: Path) -> int:
    return len(list((directory / "new").iterdir())) if directory.exists() else 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_mx_and_a_submission_service_are_one_process(
    served: Callable[..., Program], connect: Connect, tmp_path: Path, workers: str
) -> None:
    public, own, metrics = free_port(), free_port(), free_port()
    program = served(mx(public), submission(own), flags=("--workers", workers, "--metrics", f"127.0.0.1:{metrics}"))
    client = connect(public)
    assert b"AUTH" not in client.say("EHLO x")
    client.say("MAIL FROM:<a@b.example>")
    assert client.say("RCPT TO:<x@elsewhere.example>").startswith(b"550")
    client.say("RSET")
    deliver(client, "a@b.example", "x@example.org")
    client.close()

    client = connect(own)
    assert b"AUTH PLAIN" in client.say("EHLO x")
    assert client.say("MAIL FROM:<ann@example.org>").startswith(b"530")
    log_in(client)
    assert client.say("MAIL FROM:<bob@example.org>").startswith(b"553")
    deliver(client, "ann@example.org", "x@elsewhere.example")
    client.close()

    assert (stored(tmp_path / "mx"), stored(tmp_path / "out")) == (1, 1)
    until(lambda: 'fumi_core_messages_total{result="accepted"} 2.0' in get(f"http://127.0.0.1:{metrics}/metrics")[1])
    assert program.log.read_text().count(" listening ") == 2
    assert program.stop() == 0


def test_a_reload_changes_one_listener_and_a_wrong_file_none(
    served: Callable[..., Program], connect: Connect, tmp_path: Path
) -> None:
    public, own = free_port(), free_port()
    program = served(mx(public), submission(own))
    (tmp_path / "core.toml").write_text(EDGE + mx(public, "example.net") + submission(own))
    program.process.send_signal(signal.SIGHUP)
    until(lambda: " reloaded" in program.log.read_text())
    client = connect(public)
    client.envelope("a@b.example", "x@example.net")
    assert client.say("RCPT TO:<x@example.org>").startswith(b"550")
    (tmp_path / "core.toml").write_text(EDGE + mx(public) + submission(own).replace("'users'", "'nowhere'"))
    program.process.send_signal(signal.SIGHUP)
    until(lambda: "reload failed: the old settings stay in use" in program.log.read_text())
    assert f"[[core.listener]] 127.0.0.1:{own}: --users nowhere: No such file" in program.log.read_text()
    connect(public).envelope("a@b.example", "x@example.net")
    client = connect(own)
    client.say("EHLO x")
    log_in(client)
    (tmp_path / "core.toml").write_text(EDGE + mx(public) + at(free_port(), "deliver = 'discard:'"))
    program.process.send_signal(signal.SIGHUP)
    until(lambda: "settings changed that need a restart settings=listener" in program.log.read_text())
    connect(public).envelope("a@b.example", "x@example.org")
    assert connect(own).banner.startswith(b"220")


def refusal(directory: Path, text: str) -> str:
    """The one line about a file."""
    (directory / "core.toml").write_text(text)
    done = run("--config", "core.toml", "--check", cwd=directory)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ("max-clients = 5", "[[core.listener]] 127.0.0.1:25: unknown key 'max-clients': it is for all listeners: write it"),
        ("mode = 'tls'", "[[core.listener]] 127.0.0.1:25: unknown key 'mode'"),
        ("size = true", "127.0.0.1:25: size = true: write a number of bytes"),
        ("auth-required = true", "[[core.listener]] 127.0.0.1:25: --auth-required needs --users FILE"),
        ("deliver = 'nowhere:'", "[[core.listener]] 127.0.0.1:25: --deliver: "),
        ("trusted-proxy = '::1'", "127.0.0.1:25: --trusted-proxy has no effect with --proxy-protocol off"),
        ("users = 'none'", "127.0.0.1:25: --users none: No such file"),
        ("[[core.listener]]\naddress = '127.0.0.1:25'", "[[core.listener]] 127.0.0.1:25 is given twice: remove one"),
        ("[[core.listener]]\nsize = 5", "[[core.listener]] number 2: no address: add one"),
    ],
)
def test_a_wrong_table_is_one_line(tmp_path: Path, lines: str, error: str) -> None:
    assert error in refusal(tmp_path, f"{EDGE}{at(25)}{lines}\n")


def test_tables_exclude_listen_and_an_app(tmp_path: Path) -> None:
    (tmp_path / "myapp.py").write_text("from fumi_core import Fumi\napp = Fumi()\n")
    assert "--listen and [[core.listener]] exclude each other" in refusal(tmp_path, f"{EDGE}listen = ':25'\n{at(25)}")
    done = run("--config", "core.toml", "myapp:app", cwd=tmp_path)
    assert done.stderr == "Error: [[core.listener]] belongs to the built-in app: remove the tables, or myapp:app\n"
    assert "unknown key 'listener': write [[core.listener]]" in refusal(tmp_path, "[[listener]]\naddress = ':25'\n")


def test_check_looks_at_each_listener(tmp_path: Path) -> None:
    (tmp_path / "core.toml").write_text(EDGE + at(free_port(), "deliver = 'discard:'") + at(free_port()))
    done = run("--config", "core.toml", "--check", cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "configuration OK")
    port = free_port()
    said = refusal(tmp_path, EDGE + at(free_port()) + at(port, "deliver = 'lmtp:127.0.0.1:1'"))
    assert f"[[core.listener]] 127.0.0.1:{port}: --deliver lmtp:127.0.0.1:1: " in said


VALUES = (
    *("true", "false", "0", "-1", "25", "0x" + "f" * 5000, "nan", "2020-01-01", '""', '"x"', '"\\u0000"', '"\\n"', '":25"'),
    *(
        '"discard:"',
        '"maildir:x"',
        '"maildir:x/%d/%n"',
        '"users"',
        '"example.org"',
        '"lmtp::1"',
        '"smtp:"',
        '"unix:/x"',
        '"off"',
        '"reject"',
        "[]",
        "[[]]",
        '["a", 1]',
        "{}",
    ),
)


GOOD = {
    "deliver": ('"discard:"', '"maildir:x"', '"maildir:x/%d/%n"', '"lmtp:unix:/x"', '"smtp:127.0.0.1:1"'),
    "domain": ('"example.org"', '["a.example", "b.example"]'),
    "dovecot-auth": ('"unix:/run/dovecot"',),
    "milter": ('"unix:/run/filter"', "[]"),
    "milter-failure": ('"accept"',),
    "name": ('"mx.example"',),
    "proxy-protocol": ('"off"', '"optional"'),
    "recipient-delimiter": ('"-"',),
    "size": ("1000",),
    "trusted-proxy": ('["10.0.0.0/8", "unix"]', "[]"),
    "users": ('"users"', '""'),
}


def value(chance: Random, key: str) -> str:
    return chance.choice(VALUES if chance.random() < 0.15 else GOOD.get(key, ("true", "false")))


def lines(chance: Random, keys: Sequence[str]) -> str:
    chosen = {chance.choice(keys) for _ in range(chance.randrange(4))}
    return "".join(f"'{key}' = {value(chance, key)}\n" for key in sorted(chosen))


def document(chance: Random) -> str:
    """Settings of all listeners, and tables."""
    text = "[core]\n" + lines(chance, LISTENER_KEYS.flags)
    for number in range(chance.randrange(1, 4)):
        address = chance.choice(VALUES) if chance.random() < 0.1 else f"'127.0.0.1:{number}'"
        text += f"[[core.listener]]\naddress = {address}\n" + lines(chance, ("listen", "app", *LISTENER_KEYS.flags))
    return text


@pytest.mark.parametrize("seed", range(4))
def test_generated_tables_are_listeners_or_one_error_at_the_start_and_at_a_reload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.chdir(tmp_path)
    path, good, reloaded = Path("core.toml"), 0, 0
    Path("users").write_text(f"ann@example.org:{HASH}\n")
    inputs = int(os.environ.get("FUZZ_INPUTS", "1200")) // 4
    for number in range(inputs):
        path.write_text(text := document(Random(f"{seed}:{number}")))
        try:
            work = CoreWork(cli.main.make_context("fumi-core", ["--config", str(path)]), dry=True)
            good += 1
            assert len(work._listening) == text.count("[[core.listener]]")
            path.write_text(text := document(Random(f"{seed}:{number}:again")))
            serving = [(served.settings, served.app.options) for served in work._served]
            try:
                asyncio.run(work.reload())
                reloaded += 1
            except click.ClickException:
                assert [(served.settings, served.app.options) for served in work._served] == serving
        except click.ClickException:
            continue
        except Exception as error:
            raise AssertionError(f"{error!r} for this file:\n{text}") from error
    assert good > inputs // 20
    assert reloaded > inputs // 50
    assert not {each.name for each in tmp_path.iterdir()} - {"core.toml", "users"}, "something was created"


def test_the_page_names_all_keys_of_a_table() -> None:
    page = (ROOT / "fumi_core" / "PROGRAM.md").read_text()
    text = page[page.index("A table needs `address`.") :].partition("which are for its listener alone")[0]
    assert set(re.findall(r"`([a-z-]+)`", text)) == {"address", *LISTENER_KEYS.flags}
