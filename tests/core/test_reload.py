"""SIGHUP: fumi-core reads --config and --users again; what it serves goes on."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from base64 import b64encode
from pathlib import Path

import pytest

from fumi_core.program.users import hash_password
from fumi_core.runtime.lifecycle import in_turn
from tests.core.client import Client, Connect
from tests.core.programs import Start
from tests.support.ports import free_port
from tests.support.waiting import until

# An app whose settings are read as long as there is a file "hold"; "reading" is there when it has begun.
SLOW = """
import time
from pathlib import Path
import fumi_core.program.work
from fumi_core import Fumi

app = Fumi(auth_optional=True)
read_again = fumi_core.program.work.read_again

def slowly(ctx):
    Path("reading").touch()
    while Path("hold").exists():
        time.sleep(0.01)
    return read_again(ctx)

fumi_core.program.work.read_again = slowly
"""
HASHES = {name: hash_password(f"{name}'s") for name in ("ann", "bob")}


def users(*names: str) -> str:
    return "".join(f"{name}:{HASHES[name]}\n" for name in names)


class Server:
    """A running fumi-core with a configuration file and a file of users."""

    def __init__(self, directory: Path, start: Start, connect: Connect, port: int) -> None:
        self.port = port
        self._directory = directory
        self._start = start
        self._connect = connect
        self._reloads = 0

    def start(self, *flags: str) -> Server:
        listen = ("--listen", f"127.0.0.1:{self.port}", "--proxy-protocol", "off", "--allow-insecure-auth")
        self.program = self._start(*listen, "--users", "users", "--config", "fumi.toml", *flags)
        return self

    def write(self, config: str, *names: str) -> None:
        (self._directory / "fumi.toml").write_text(config)
        (self._directory / "users").write_text(users(*names))

    def reload(self, line: str = " reloaded") -> None:
        self._reloads += 1
        self.program.process.send_signal(signal.SIGHUP)
        until(lambda: self.log.count(line) == self._reloads)

    @property
    def log(self) -> str:
        return str(self.program.log.read_text())

    def client(self) -> Client:
        return self._connect(self.port)

    def knows(self, name: str) -> bool:
        client = self.client()
        client.say("EHLO x")
        secret = b64encode(f"\0{name}\0{name}'s".encode()).decode()
        reply = client.say(f"AUTH PLAIN {secret}")
        client.close()
        return reply.startswith(b"235")

    def settings(self, clients: int = 8) -> set[tuple[bytes, bytes]]:
        """The banners and SIZEs that so many clients see."""
        seen = set()
        for _ in range(clients):
            client = self.client()
            size = re.search(rb"SIZE (\d+)", client.say("EHLO x"))
            assert size
            seen.add((client.banner.split(b" ESMTP ")[1].strip(), size[1]))
            client.close()
        return seen


@pytest.fixture
def server(tmp_path: Path, start: Start, connect: Connect) -> Server:
    return Server(tmp_path, start, connect, free_port())


@pytest.fixture(params=["1", "2"])
def workers(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_all_workers_reload_users_and_settings(server: Server, workers: str) -> None:
    server.write("size = 1000\nbanner = 'old'\ndeliver = 'discard:'\n", "ann")
    server.start("--workers", workers)
    old = server.client()
    assert b"SIZE 1000" in old.say("EHLO x")
    assert server.knows("ann")
    assert not server.knows("bob")
    server.write("size = 2000\nbanner = 'new'\ndeliver = 'discard:'\n", "bob")
    server.reload()
    assert server.settings() == {(b"new", b"2000")}
    assert all(server.knows("bob") for _ in range(4))
    assert not server.knows("ann")
    assert b"SIZE 1000" in old.say("EHLO x")  # a connection keeps what it began with
    old.close()
    assert server.program.stop() == 0


def test_domains_and_the_target_are_reloaded(server: Server, workers: str, tmp_path: Path) -> None:
    server.write("deliver = 'discard:'\ndomain = ['a.example']\n")
    server.start("--workers", workers)
    server.write("deliver = 'maildir:box'\ndomain = ['b.example']\n")
    server.reload()
    for _ in range(4):
        client = server.client()
        assert b"DSN" not in client.say("EHLO x")
        client.say("MAIL FROM:<x@x.example>")
        assert client.say("RCPT TO:<x@a.example>").startswith(b"550")
        assert client.say("RCPT TO:<x@b.example>").startswith(b"250")
        client.say("DATA")
        assert client.say(".").startswith(b"250")
    assert len(os.listdir(tmp_path / "box" / "new")) == 4


def test_an_app_gets_what_its_flags_change_and_keeps_the_rest(server: Server, workers: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        """
from fumi_core import Fumi
app = Fumi(auth_optional=True, banner='own', size=500)

@app.on_mail_from
async def no(ctx, next):
    ctx.reject("mine")
"""
    )
    server.write("size = 1000\n", "ann")
    server.start("--workers", workers, "mine:app")
    assert server.settings() == {(b"own", b"1000")}
    server.write("", "bob")
    server.reload()
    assert server.settings() == {(b"own", b"500")}
    assert server.knows("bob")
    assert not server.knows("ann")
    client = server.client()
    client.say("EHLO x")
    assert b"mine" in client.say("MAIL FROM:<x@x.example>")


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("users", "nobody\n", "users:1"),
        ("fumi.toml", "size = ", "Invalid"),
        ("fumi.toml", "size = 'much'", "much"),
        ("fumi.toml", "deliver = 'pigeon:'", "pigeon"),
        ("users", None, "No such file"),
    ],
)
def test_a_broken_file_leaves_everything_as_it_was(
    server: Server, workers: str, tmp_path: Path, file: str, text: str | None, problem: str
) -> None:
    server.write("size = 1000\nbanner = 'old'\ndeliver = 'discard:'\n", "ann")
    server.start("--workers", workers)
    server.write("size = 2000\nbanner = 'new'\ndeliver = 'discard:'\n", "bob")
    if text is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(text)
    server.reload("reload failed")
    (line,) = [line for line in server.log.splitlines() if "reload failed" in line]
    assert " ERROR " in line
    assert problem in line
    assert server.settings() == {(b"old", b"1000")}
    assert server.knows("ann")
    assert not server.knows("bob")


def test_settings_that_need_a_restart_are_named(server: Server, workers: str) -> None:
    server.write("deliver = 'discard:'\nsize = 1\nbanner = 'b'\n", "ann")
    server.start("--workers", workers)
    server.write(f"workers = 5\nmetrics = '127.0.0.1:{free_port()}'\ndeliver = 'discard:'\nsize = 2\nbanner = 'b'\n", "ann")
    server.reload()
    assert "need a restart settings=metrics" in server.log  # --workers is a flag here, and flags win
    assert server.settings() == {(b"b", b"2")}


def test_a_worker_that_comes_later_has_the_new_settings(server: Server) -> None:
    server.write("size = 1000\nbanner = 'old'\ndeliver = 'discard:'\n", "ann")
    server.start("--workers", "2")
    server.write("size = 2000\nbanner = 'new'\ndeliver = 'discard:'\n", "bob")
    server.reload()
    server.write("size = 3000\nbanner = 'newest'\ndeliver = 'discard:'\n", "bob")  # which nobody was told of
    children = Path(f"/proc/{server.program.process.pid}/task/{server.program.process.pid}/children")
    before = set(children.read_text().split())
    for pid in before:
        os.kill(int(pid), signal.SIGKILL)
    until(lambda: len(set(children.read_text().split()) - before) == 2)
    assert server.settings() == {(b"new", b"2000")}
    assert server.knows("bob")


def test_workers_that_die_during_a_reload_are_replaced_with_the_new_settings(server: Server, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    server.write("", "ann")
    server.start("--workers", "2", "slow:app")
    children = Path(f"/proc/{server.program.process.pid}/task/{server.program.process.pid}/children")
    (tmp_path / "hold").touch()
    server.write("", "bob")
    server.program.process.send_signal(signal.SIGHUP)
    until((tmp_path / "reading").exists)
    for pid in children.read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    until(lambda: server.log.count("worker died") == 2)
    (tmp_path / "hold").unlink()
    until(lambda: " reloaded" in server.log)
    assert all(server.knows("bob") for _ in range(4))
    assert server.program.stop() == 0


def test_mail_does_not_wait_for_files_that_hang(server: Server, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    server.write("", "ann")
    server.start("slow:app")
    (tmp_path / "hold").touch()
    server.write("", "bob")
    server.program.process.send_signal(signal.SIGHUP)
    until((tmp_path / "reading").exists)
    assert server.knows("ann")
    assert not server.knows("bob")
    assert " reloaded" not in server.log
    (tmp_path / "hold").unlink()
    until(lambda: " reloaded" in server.log)
    assert server.knows("bob")


def test_files_that_are_not_read_in_time_change_nothing(server: Server, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW + "fumi_core.program.work.READ_TIMEOUT = 0.5\n")
    server.write("", "ann")
    server.start("slow:app")
    (tmp_path / "hold").touch()
    server.write("", "bob")
    server.program.process.send_signal(signal.SIGHUP)
    until(lambda: "the files were not read within 0.5 seconds" in server.log)
    (tmp_path / "hold").unlink()
    assert server.knows("ann")
    assert not server.knows("bob")
    assert server.program.stop() == 0


def test_sighup_while_an_app_is_imported_is_a_reload(server: Server, tmp_path: Path, workers: str) -> None:
    (tmp_path / "early.py").write_text(
        """
import os, signal
from fumi_core import Fumi

os.kill(os.getpid(), signal.SIGHUP)
app = Fumi(auth_optional=True)
"""
    )
    server.write("", "ann")
    server.start("--workers", workers, "early:app")
    until(lambda: " reloaded" in server.log)
    assert server.program.stop() == 0


def test_many_calls_during_a_run_cause_one_further_run() -> None:
    begun = 0

    async def scenario() -> None:
        gate = asyncio.Event()

        async def act() -> None:
            nonlocal begun
            begun += 1
            await gate.wait()

        async def rest() -> None:
            await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})

        ask = in_turn(act)
        ask()
        await asyncio.sleep(0)
        for _ in range(100):
            ask()
        gate.set()
        await rest()
        assert begun == 2
        ask()
        await rest()
        assert begun == 3

    asyncio.run(scenario())


def test_the_log_level_is_taken_over(server: Server) -> None:
    server.write("deliver = 'discard:'\n", "ann")
    server.start()
    server.write("deliver = 'discard:'\nlog-format = 'json'\n", "ann")
    server.reload('"event": "reloaded"')
