"""fumi-core --reload MODULE:APP: a change of a file restarts the program, and a broken file does not end it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fumi_core.program.reloading import Watch
from tests.core.client import Connect
from tests.core.programs import PROGRAM, run
from tests.support.ports import free_port
from tests.support.waiting import until

APP = """
from fumi_core import Fumi
from helper import NAME

def make():
    return Fumi(auth_optional=True, name=NAME)
"""


class Reloading:
    """The real program, which replaces itself, with an app whose banner has the name in helper.py."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.port = directory, free_port()
        self._log = directory / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def write(self, text: str, name: str = "helper.py") -> None:
        # As an editor does: the new file takes the place of the old one.
        (self.directory / "new").write_text(text)
        (self.directory / "new").rename(self.directory / name)

    def start(self) -> None:
        flags = ["--reload", "--proxy-protocol", "off", "--listen", f"127.0.0.1:{self.port}", "app:make()"]
        with self._log.open("ab") as log:
            command = ["env", "--default-signal=INT", PROGRAM, *flags]  # a shell starts its background jobs without SIGINT
            self._process = subprocess.Popen(command, cwd=self.directory, stdout=log, stderr=log)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def log(self) -> list[str]:
        return self._log.read_text().splitlines()

    def logged(self, words: str) -> list[str]:
        return [line for line in self.log if words in line]

    def await_logged(self, words: str, times: int = 1) -> None:
        def is_there() -> bool:
            assert self.process.poll() is None, self.log
            return len(self.logged(words)) >= times

        until(is_there, words)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Reloading]:
    program = Reloading(tmp_path)
    program.write(APP, "app.py")
    program.write("NAME = 'one.example'")
    yield program
    program.kill()


def test_a_change_restarts_the_program_and_a_broken_file_waits_for_the_next_one(program: Reloading, connect: Connect) -> None:
    program.start()
    program.await_logged("INFO fumi.core listening")
    client = connect(program.port)
    assert client.banner.startswith(b"220 one.example ")
    # A client in a transaction does not hold up a restart for long.
    client.say("EHLO client.example")
    client.say("MAIL FROM:<a@b.example>")
    program.write("NAME = 'two.example'")
    program.await_logged("INFO fumi.core listening", 2)
    assert connect(program.port).banner.startswith(b"220 two.example ")
    assert program.logged("restarting changed=")[0].endswith(str(program.directory / "helper.py"))

    program.write("NAME = ")
    program.await_logged("cannot load the app, waiting for a change")
    program.write("NAME = None.name")
    program.await_logged("cannot load the app, waiting for a change", 2)
    assert all("helper.py:1)" in line for line in program.logged("cannot load"))
    program.write("NAME = 'three.example'")
    program.await_logged("INFO fumi.core listening", 3)
    assert connect(program.port).banner.startswith(b"220 three.example ")
    assert not program.logged("Traceback")
    assert program.stop() == 0


def test_a_file_that_is_broken_at_the_start_is_waited_for(program: Reloading, connect: Connect) -> None:
    (program.directory / "app.py").unlink()
    program.start()
    program.await_logged("cannot load the app, waiting for a change")
    assert len(program.log) == 1
    program.write(APP, "app.py")
    program.await_logged("INFO fumi.core listening")
    assert connect(program.port).banner.startswith(b"220 one.example ")
    assert program.stop(signal.SIGINT) == 0


def test_a_module_that_an_app_imports_and_that_is_not_written_yet_is_waited_for(program: Reloading, connect: Connect) -> None:
    (program.directory / "helper.py").unlink()
    program.start()
    program.await_logged("cannot load the app, waiting for a change")
    program.write("NAME = 'one.example'")
    program.await_logged("INFO fumi.core listening")
    assert connect(program.port).banner.startswith(b"220 one.example ")


def test_ctrl_c_ends_a_program_that_waits_for_a_change(program: Reloading) -> None:
    program.write("NAME = ")
    program.start()
    program.await_logged("cannot load the app, waiting for a change")
    assert program.stop(signal.SIGINT) == 130
    assert not program.logged("Traceback")


STUCK = """
import threading
from fumi_core import Fumi
from helper import NAME

def make():
    app = Fumi(auth_optional=True, name=NAME)
    app.on_mail_from(stick)
    return app

async def stick(ctx, next):
    open("stuck", "w").close()
    threading.Event().wait()
"""


def test_a_hook_that_keeps_the_event_loop_does_not_keep_a_restart(program: Reloading, connect: Connect) -> None:
    program.write(STUCK, "app.py")
    program.start()
    program.await_logged("INFO fumi.core listening")
    client = connect(program.port)
    client.say("EHLO client.example")
    client.sock.sendall(b"MAIL FROM:<a@b.example>\r\n")
    until((program.directory / "stuck").exists)
    program.write("NAME = 'two.example'")
    program.await_logged("INFO fumi.core listening", 2)
    assert connect(program.port).banner.startswith(b"220 two.example ")


FORKING = """
import multiprocessing, threading
from fumi_core import Fumi
from helper import NAME

def make():
    app = Fumi(auth_optional=True, name=NAME)
    app.on_mail_from(fork)
    return app

async def fork(ctx, next):
    child = multiprocessing.get_context("fork").Process(target=threading.Event().wait)
    child.start()
    with open("child", "w") as file:
        file.write(str(child.pid))
"""


def test_processes_of_the_app_do_not_keep_the_ports_of_a_program_that_restarts(program: Reloading, connect: Connect) -> None:
    program.write(FORKING, "app.py")
    program.start()
    program.await_logged("INFO fumi.core listening")
    client = connect(program.port)
    client.say("EHLO client.example")
    client.say("MAIL FROM:<a@b.example>")
    child = int((program.directory / "child").read_text())
    program.write("NAME = 'two.example'")
    program.await_logged("INFO fumi.core listening", 2)
    assert connect(program.port).banner.startswith(b"220 two.example ")
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


FAILING = """
from fumi_core import Fumi
from helper import NAME

def make():
    app = Fumi(auth_optional=True, name=NAME)
    app.at_listen(prepare)
    return app

async def prepare():
    if NAME == "one.example":
        raise ValueError("no database")
"""


def test_an_app_that_cannot_start_waits_for_a_change(program: Reloading, connect: Connect) -> None:
    program.write(FAILING, "app.py")
    program.start()
    program.await_logged("the app cannot start, waiting for a change")
    program.await_logged("ValueError: no database")
    program.write("NAME = 'two.example'")
    program.await_logged("INFO fumi.core listening", 2)
    assert connect(program.port).banner.startswith(b"220 two.example ")
    program.write("NAME = 'one.example'")
    program.await_logged("the app cannot start, waiting for a change", 2)
    assert program.stop(signal.SIGINT) == 130


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ((), "--reload is for MODULE:APP"),
        (("--workers", "2", "app:make()"), "--reload is for one process"),
        (("--check", "app:make()"), "remove --reload"),
        (("--listen", "fd:3", "app:make()"), "--reload binds its sockets again"),
        (("--metrics", "fd:3", "app:make()"), "--reload binds its sockets again"),
        (("--trusted-proxy", "127.0.0.1", "--proxy-protocol", "required", "--deliver", "discard:", "app:make()"), "--deliver"),
    ],
)
def test_what_a_reload_cannot_do_is_refused(program: Reloading, flags: tuple[str, ...], wanted: str) -> None:
    done = run("--reload", *flags, cwd=program.directory)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert wanted in done.stderr


def test_neither_a_variable_nor_a_file_asks_for_a_reload(program: Reloading, monkeypatch: pytest.MonkeyPatch) -> None:
    (program.directory / "core.toml").write_text("reload = true\n")
    assert "--reload" in run("--config", "core.toml", "app:make()", cwd=program.directory).stderr
    monkeypatch.setenv("FUMI_CORE_RELOAD", "1")
    assert "--reload is not a setting" in run("app:make()", cwd=program.directory).stderr


Change = Callable[[Path], object]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda path: path.write_text("longer"), True),
        (lambda path: os.utime(path, (1, 1)), True),
        (lambda path: path.with_name("other").rename(path), True),
        (lambda path: path.unlink(), False),
        (lambda path: path.read_text(), False),
    ],
)
def test_a_file_has_changed_by_its_time_its_size_or_its_inode(tmp_path: Path, change: Change, found: bool) -> None:
    path = tmp_path / "file"
    for each in (path, tmp_path / "other"):
        each.write_text("text")
        os.utime(each, (7, 7))
    watch = Watch()
    watch.add([str(path)])
    assert watch.changed() == []
    change(path)
    assert watch.changed() == ([str(path)] if found else [])


def test_a_file_that_did_not_exist_has_changed_when_it_does(tmp_path: Path) -> None:
    watch = Watch()
    watch.add([str(tmp_path / "file")])
    assert watch.changed() == []
    (tmp_path / "file").touch()
    assert watch.wait() == [str(tmp_path / "file")]
